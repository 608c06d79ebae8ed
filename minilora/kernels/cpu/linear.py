"""Linear layers, plain and with LoRA, split by rows; where it pays, with W + s·B A built in one reused scratch.

Axes: N tokens, in and out the layer's widths, r the rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ... import ops
from ...backend import Array, cast
from ...ops.linalg import rows
from .elementwise import computes
from .memory import empty, keep
from .threads import parallel_rows, row_blocks, run_all, scratch

MOST_ROWS = 512  # of one product: more gain nothing, fewer pack the weight too often
LEAST_ROWS = 32
SKINNY_ENTRIES = 1 << 17  # of the wide operand in a product with r columns: it is used twice while in the cache
MERGE_GAIN = 1 << 18  # entries that merging has to save, for the threads to be called once more
WEIGHT_BLOCK = 96  # rows of W at a time while W + s·B A is built


def dense(weight: Any) -> bool:
    return isinstance(weight, np.ndarray) and weight.ndim == 2


def over_gemm_rows(fn, n: int) -> None:
    """fn on row blocks of a matrix product with n rows."""
    parallel_rows(fn, n, most=MOST_ROWS, least=LEAST_ROWS)


def merged(weight: np.ndarray, lora_A: np.ndarray, lora_B: np.ndarray, scale: float) -> np.ndarray:
    """W + s·B A (out, in), in the calling thread's scratch: good until the next call."""
    result = scratch("merged", weight.shape, lora_A.dtype)

    def build(a: int, b: int) -> None:
        for start in range(a, b, WEIGHT_BLOCK):
            part = slice(start, min(start + WEIGHT_BLOCK, b))
            np.matmul(lora_B[part] * scale, lora_A, out=result[part])
            result[part] += weight[part]

    parallel_rows(build, len(weight), most=MOST_ROWS, least=LEAST_ROWS)
    return result


def merging_pays(count: int, contracted: int, produced: int) -> bool:
    """Whether W + s·B A pays for a product (count, contracted) × (contracted, produced): it saves more than it costs.

    Building it is a pass over W; without it the low-rank term is a pass over the result.
    """
    return (count - contracted) * produced > MERGE_GAIN


def sum_of_parts(parts) -> np.ndarray:
    """Σ over the first axis, in its order."""
    return parts[0] if len(parts) == 1 else parts.sum(axis=0)


def linear_applies(x: Array, weight: Any, bias: Array | None = None) -> bool:
    return computes(x) and x.size > 0 and dense(weight) and (bias is None or isinstance(bias, np.ndarray))


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


def lora_applies(x: Array, weight: Any, bias: Array | None, lora_A: Array, lora_B: Array, *, scale: float) -> bool:
    return linear_applies(x, weight, bias) and computes(x, lora_A, lora_B)


@ops.lora_linear.kernel("cpu", lora_applies)
def lora_linear(
    x: Array, weight: Any, bias: Array | None, lora_A: Array, lora_B: Array, *, scale: float, needs: tuple[bool, ...]
):
    shape_x, (outside, inside), rank = x.shape, weight.shape, len(lora_A)
    tokens = rows(x)
    count = len(tokens)
    y, u = empty((count, outside), x.dtype), np.empty((count, rank), x.dtype)
    merge = merging_pays(count, inside, outside)
    matrix = merged(weight, lora_A, lora_B, scale) if merge else cast(weight, x.dtype)
    bias = None if bias is None else cast(bias, x.dtype)
    scaled_B = lora_B * x.dtype.type(scale)

    def forward(a: int, b: int) -> None:
        np.matmul(tokens[a:b], matrix.T, out=y[a:b])
        np.matmul(tokens[a:b], lora_A.T, out=u[a:b])
        if not merge:
            add_product(u[a:b], scaled_B.T, y[a:b])
        if bias is not None:
            y[a:b] += bias

    over_gemm_rows(forward, count)
    kept_u: Any = u if needs[4] else None
    kept: Any = keep(x) if needs[3] else None

    def vjp(dy):
        g = rows(dy)
        dx: Any = empty((count, inside), g.dtype) if needs[0] else None
        merge = needs[0] and merging_pays(count, outside, inside)
        if needs[0]:
            matrix = merged(weight, lora_A, lora_B, scale) if merge else cast(weight, g.dtype)
        blocks = row_blocks(count, MOST_ROWS, LEAST_ROWS)
        parts_A: Any = np.empty((len(blocks), rank, inside), g.dtype) if needs[3] else None
        parts_B: Any = np.empty((len(blocks), rank, outside), g.dtype) if needs[4] else None
        step = max(16, SKINNY_ENTRIES // max(inside, outside))

        def backward(number: int, begin: int, end: int) -> None:
            if needs[0]:
                np.matmul(g[begin:end], matrix, out=dx[begin:end])
            for a in range(begin, end, step):
                b = min(a + step, end)
                if needs[3] or (needs[0] and not merge):
                    v = np.matmul(g[a:b], scaled_B)
                if needs[0] and not merge:
                    dx[a:b] += np.matmul(v, lora_A, out=scratch("term", (b - a, inside), g.dtype))
                if needs[3]:
                    add_to(parts_A[number], v.T, kept(a, b), a == begin)
                if needs[4]:
                    add_to(parts_B[number], kept_u[a:b].T, g[a:b], a == begin)

        run_all([partial(backward, number, a, b) for number, (a, b) in enumerate(blocks)])
        dbias = g.sum(axis=0) if needs[2] else None
        d_lora_A = sum_of_parts(parts_A) if needs[3] else None
        d_lora_B = sum_of_parts(parts_B).T * g.dtype.type(scale) if needs[4] else None
        return (dx.reshape(shape_x) if needs[0] else None), None, dbias, d_lora_A, d_lora_B

    return y.reshape(*shape_x[:-1], outside), vjp


def add_to(total: np.ndarray, left: np.ndarray, right: np.ndarray, first: bool) -> None:
    """total = left right where it is the first term, else total += left right."""
    if first:
        np.matmul(left, right, out=total)
    else:
        total += np.matmul(left, right)


def add_product(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> None:
    """total += left right, some rows at a time, so that the product stays in the cache."""
    step = max(1, (1 << 16) // total.shape[1])
    for start in range(0, len(total), step):
        part = slice(start, start + step)
        term = scratch("term", total[part].shape, total.dtype)
        np.matmul(left[part], right, out=term)
        total[part] += term
