"""Linear layers, plain and with LoRA, split by rows.

The low-rank terms are added block by block, while what they are added to is in the cache. Building W + s·B A for each
pass, so that they cost no pass of their own, was measured too and is slower: it is a pass over memory for every W.

Axes: N tokens, in and out the layer's widths, r the rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ... import ops
from ...backend import Array, cast
from ...ops.linalg import rows, unread
from .elementwise import computes
from .memory import empty, keep
from .threads import parallel_rows, row_blocks, run_all, scratch

MOST_ROWS = 512  # of one product: more gain nothing, fewer pack the weight too often
LEAST_ROWS = 32
SKINNY_ENTRIES = 1 << 19  # of the wide operand in a product with r columns: it is used twice while in the cache


def dense(weight: Any) -> bool:
    return isinstance(weight, np.ndarray) and weight.ndim == 2


def over_gemm_rows(fn, n: int) -> None:
    """fn on row blocks of a matrix product with n rows."""
    parallel_rows(fn, n, most=MOST_ROWS, least=LEAST_ROWS)


def sum_of_parts(parts) -> np.ndarray:
    """Σ over the first axis, in its order."""
    return parts[0] if len(parts) == 1 else parts.sum(axis=0)


def linear_applies(x: Array, weight: Any, bias: Array | None = None, *, value: bool = True) -> bool:
    return value and computes(x) and x.size > 0 and dense(weight) and (bias is None or isinstance(bias, np.ndarray))


@ops.linear.kernel("cpu", linear_applies)
def linear(x: Array, weight: Any, bias: Array | None = None, *, needs: tuple[bool, ...]):
    shape_x, width = x.shape, weight.shape[0]
    tokens = rows(x)
    y = empty((len(tokens), width), x.dtype)
    narrow, weight = weight, cast(weight, x.dtype)
    bias = None if bias is None else cast(bias, x.dtype)

    def forward(a: int, b: int) -> None:
        np.matmul(tokens[a:b], weight.T, out=y[a:b])
        if bias is not None:
            y[a:b] += bias

    over_gemm_rows(forward, len(tokens))
    kept: Any = tokens if needs[1] else None

    def vjp(dy):
        g = rows(dy)
        dx = dweight = None
        if needs[0]:
            wide = cast(narrow, g.dtype)
            dx = empty((len(g), wide.shape[1]), g.dtype)
            over_gemm_rows(lambda a, b: np.matmul(g[a:b], wide, out=dx[a:b]), len(g))
            dx = dx.reshape(shape_x)
        if needs[1]:
            dweight = np.empty(narrow.shape, g.dtype)
            over_gemm_rows(lambda a, b: np.matmul(g[:, a:b].T, kept, out=dweight[a:b]), width)
        dbias = g.sum(axis=0) if len(needs) > 2 and needs[2] else None
        return (dx, dweight, dbias)[: len(needs)]

    return y.reshape(*shape_x[:-1], width), vjp


def lora_applies(
    x: Array, weight: Any, bias: Array | None, lora_A: Array, lora_B: Array, *, scale: float, value: bool = True
) -> bool:
    return linear_applies(x, weight, bias) and computes(x, lora_A, lora_B)


@ops.lora_linear.kernel("cpu", lora_applies)
def lora_linear(
    x: Array,
    weight: Any,
    bias: Array | None,
    lora_A: Array,
    lora_B: Array,
    *,
    scale: float,
    value: bool = True,
    needs: tuple[bool, ...],
):
    (y,), vjp = lora_linears(x, weight, bias, lora_A, lora_B, scales=(scale,), value=value, needs=needs)
    return y, vjp


class Layer:
    """One of the layers that read the same x: its weight, its factors (None for none) and what its backward pass needs.

    columns: its place among the R columns of u and v of all layers together.
    """

    def __init__(
        self, inputs: tuple[Any, ...], scale: float, dtype: np.dtype, needs: tuple[bool, ...], first_column: int
    ) -> None:
        self.weight, bias, self.lora_A, self.lora_B = inputs
        self.bias = None if bias is None else cast(bias, dtype)
        self.scale, self.dtype = dtype.type(scale), dtype
        self.outside, self.inside = self.weight.shape
        _, self.needs_bias, self.needs_A, self.needs_B = needs
        self.rank = 0 if self.lora_A is None else len(self.lora_A)
        self.columns = slice(first_column, first_column + self.rank)
        self.scaled_B: Any = None if self.lora_B is None else self.lora_B * self.scale


def group_applies(x: Array, *layers: Any, scales: tuple[float, ...], value: bool = True) -> bool:
    for start in range(0, len(layers), 4):
        weight, bias, lora_A, lora_B = layers[start : start + 4]
        if not linear_applies(x, weight, bias) or (lora_A is not None and not computes(x, lora_A, lora_B)):
            return False
    return True


@ops.lora_linears.kernel("cpu", group_applies)
def lora_linears(x: Array, *layers: Any, scales: tuple[float, ...], value: bool = True, needs: tuple[bool, ...]):
    shape_x, inside = x.shape, x.shape[-1]
    tokens = rows(x)
    count, dtype = len(tokens), x.dtype
    group: list[Layer] = []
    for number, scale in enumerate(scales):
        part = slice(4 * number, 4 * number + 4)
        total_rank = group[-1].columns.stop if group else 0
        group.append(Layer(layers[part], scale, dtype, needs[1:][part], total_rank))
    factors = [layer.lora_A for layer in group if layer.lora_A is not None]
    stacked_A: Any = np.concatenate(factors) if factors else None  # (R, in): one product gives every layer's u
    ranks = len(stacked_A) if factors else 0
    u = np.empty((count, ranks), dtype)
    ys, matrices = [], []
    if value:
        ys = [empty((count, layer.outside), dtype) for layer in group]
        matrices = [cast(layer.weight, dtype) for layer in group]

    def forward(a: int, b: int) -> None:
        if factors:
            np.matmul(tokens[a:b], stacked_A.T, out=u[a:b])
        for layer, y, matrix in zip(group, ys, matrices, strict=False):  # none where no value is asked for
            np.matmul(tokens[a:b], matrix.T, out=y[a:b])
            if layer.rank:
                add_product(u[a:b, layer.columns], layer.scaled_B.T, y[a:b])
            if layer.bias is not None:
                y[a:b] += layer.bias

    over_gemm_rows(forward, count)
    kept_u: Any = u if any(layer.needs_B for layer in group) else None
    kept: Any = keep(x) if any(layer.needs_A for layer in group) else None

    def vjp(*dys):
        gs = [rows(dy) for dy in dys]
        matrices = [cast(layer.weight, dtype) for layer in group] if needs[0] else []
        dx: Any = empty((count, inside), dtype) if needs[0] else None
        blocks = row_blocks(count, MOST_ROWS, LEAST_ROWS)
        parts_A: Any = np.empty((len(blocks), ranks, inside), dtype) if kept else None
        parts_B = [np.empty((len(blocks), layer.rank, layer.outside), dtype) for layer in group if layer.needs_B]
        step = max(16, SKINNY_ENTRIES // max(inside, *(layer.outside for layer in group)))

        def backward(number: int, begin: int, end: int) -> None:
            for index, (g, matrix) in enumerate(zip(gs, matrices, strict=False)):
                if index == 0:
                    np.matmul(g[begin:end], matrix, out=dx[begin:end])
                else:
                    product = scratch("product", (end - begin, inside), dtype)
                    dx[begin:end] += np.matmul(g[begin:end], matrix, out=product)
            for a in range(begin, end, step):
                b = min(a + step, end)
                v = scratch("v", (b - a, ranks), dtype)
                if ranks and (kept or needs[0]):
                    for layer, g in zip(group, gs, strict=True):
                        if layer.rank:
                            np.matmul(g[a:b], layer.scaled_B, out=v[:, layer.columns])
                    if needs[0]:
                        dx[a:b] += np.matmul(v, stacked_A, out=scratch("term", (b - a, inside), dtype))
                if kept:
                    if kept.left is not None:
                        v *= kept.left[a:b]
                    add_to(parts_A[number], v.T, kept.rows(a, b), a == begin)
                with_B = (pair for pair in zip(group, gs, strict=True) if pair[0].needs_B)
                for (layer, g), part in zip(with_B, parts_B, strict=True):
                    add_to(part[number], kept_u[a:b, layer.columns].T, g[a:b], a == begin)

        run_all([partial(backward, number, a, b) for number, (a, b) in enumerate(blocks)])
        d_lora_A: Any = sum_of_parts(parts_A) if kept else None
        if kept and kept.right is not None:
            d_lora_A *= kept.right
        remaining = iter(parts_B)
        gradients: list[Any] = [dx.reshape(shape_x) if needs[0] else None]
        for layer, g in zip(group, gs, strict=True):
            gradients += [
                None,
                g.sum(axis=0) if layer.needs_bias else None,
                d_lora_A[layer.columns] if layer.needs_A else None,
                sum_of_parts(next(remaining)).T * layer.scale if layer.needs_B else None,
            ]
        return tuple(gradients)

    shapes = [(*shape_x[:-1], layer.outside) for layer in group]
    if not value:
        return tuple(unread(shape, x) for shape in shapes), vjp
    return tuple(y.reshape(shape) for y, shape in zip(ys, shapes, strict=True)), vjp


def add_to(total: np.ndarray, left: np.ndarray, right: np.ndarray, first: bool) -> None:
    """total = left right where it is the first term, else total += left right."""
    if first:
        np.matmul(left, right, out=total)
    else:
        total += np.matmul(left, right)


def add_product(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> None:
    """total += left right, some rows at a time, so that the product stays in the cache."""
    step = max(1, SKINNY_ENTRIES // total.shape[1])
    for start in range(0, len(total), step):
        part = slice(start, start + step)
        term = scratch("term", total[part].shape, total.dtype)
        np.matmul(left[part], right, out=term)
        total[part] += term
