"""Linear layers through cuBLAS, and with LoRA: the low-rank terms are added into the same result by the products
themselves.

What they compute: ops/linalg.py, ops/lora.py, ops/fused.py. The base is bfloat16 (or float16, float32), adapters and
what else is trained are float32, as their gradients; in a pass they are rounded to the activations' dtype once, all of
them in one launch.
Axes: N tokens, in and out the layer's widths, r the rank, R the sum of ranks of layers that share an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from ... import ops
from ...backend import Array, cast
from ...ops.fused import one_after_another
from ...ops.linalg import rows, unread
from .branches import Fork
from .gemm import gemm
from .lists import narrowed, narrowed_stack
from .memory import keep
from .source import C_NAMES, columns, fits, over_packs


def add_bias(y: Array, bias: Array | None) -> None:
    """y (N, out) += bias (out,), in place."""
    if bias is None:
        return
    if fits(y, bias):
        over_packs("elementwise", "add_bias", y.size, y, y, bias, np.int64(y.size), np.int32(y.shape[1]))
    else:
        y += bias.astype(y.dtype, copy=False)


def linear_applies(x: Array, weight: Any, bias: Array | None = None, *, value: bool = True) -> bool:
    return (
        isinstance(x, cupy.ndarray)
        and x.dtype.name in C_NAMES
        and isinstance(weight, cupy.ndarray)
        and (weight.dtype == x.dtype or weight.dtype == np.float32)
        and x.size > 0
    )


@ops.linear.kernel("cuda", linear_applies)
def linear(x: Array, weight: Array, bias: Array | None = None, *, value: bool = True, needs: tuple[bool, ...]):
    """An unfrozen weight is float32 beside narrower activations: its gradient is summed and left in float32."""
    shape_x, shape_y, kind = x.shape, (*x.shape[:-1], weight.shape[0]), weight.dtype
    W = narrowed(weight, x.dtype) if needs[1] else cast(weight, x.dtype)
    if value:
        y = gemm(rows(x), W.T)
        add_bias(y, bias)
        y = y.reshape(shape_y)
    else:
        y = unread(shape_y, x)
    kept: Any = keep(x) if needs[1] else None

    def vjp(dy):
        g = rows(dy)
        dx = gemm(g, W).reshape(shape_x) if needs[0] else None
        dweight = gemm(g.T, rows(kept()), dtype=kind) if needs[1] else None
        dbias = g.sum(axis=0, dtype=np.float32) if len(needs) > 2 and needs[2] else None
        return (dx, dweight, dbias)[: len(needs)]

    return y, vjp


def applies(
    x: Array, weight: Any, bias: Array | None, lora_A: Array, lora_B: Array, *, scale: float, value: bool = True
) -> bool:
    return (
        isinstance(x, cupy.ndarray)
        and x.dtype.name in C_NAMES
        and isinstance(weight, cupy.ndarray)
        and weight.dtype == x.dtype
        and x.size > 0
        and lora_A.dtype == lora_B.dtype == np.float32
    )


@ops.lora_linear.kernel("cuda", applies)
def lora_linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    lora_A: Array,
    lora_B: Array,
    *,
    scale: float,
    value: bool = True,
    needs: tuple[bool, ...],
):
    shape_x, tokens = x.shape, rows(x)
    A, B = narrowed(lora_A, x.dtype), narrowed(lora_B, x.dtype)
    u = gemm(tokens, A.T)  # (N, r)
    shape_y = (*shape_x[:-1], weight.shape[0])
    if value:
        y = gemm(tokens, weight.T)
        gemm(u, B.T, y, alpha=scale, beta=1.0)
        add_bias(y, bias)
        y = y.reshape(shape_y)
    else:
        y = unread(shape_y, x)
    kept: Any = keep(x) if needs[3] else None
    u = u if needs[4] else None
    del tokens

    def vjp(dy):
        g = rows(dy)
        v: Any = None
        dx = d_lora_A = d_lora_B = None
        with Fork() as fork:
            if needs[0]:
                dx = gemm(g, weight)
            if needs[0] or needs[3]:
                with fork.branch(1):
                    v = gemm(g, B, alpha=scale)  # (N, r)
                    d_lora_A = gemm(v.T, rows(kept()), dtype=np.float32) if needs[3] else None
            if needs[4]:
                with fork.branch(2):
                    d_lora_B = gemm(g.T, u, alpha=scale, dtype=np.float32)
        if dx is not None:
            dx = gemm(v, A, dx, beta=1.0).reshape(shape_x)
        return dx, None, (g.sum(axis=0, dtype=np.float32) if needs[2] else None), d_lora_A, d_lora_B

    return y, vjp


# --- layers that read the same x --------------------------------------------------------------------------------------

JOIN_BELOW = 1 << 23  # entries: gradients of layers are copied side by side where that costs less than more products


def group_applies(x: Array, *layers: Any, scales: tuple[float, ...], value: bool = True) -> bool:
    if not (isinstance(x, cupy.ndarray) and x.dtype.name in C_NAMES and x.size > 0):
        return False
    weights, factors = layers[::4], [factor for factor in (*layers[2::4], *layers[3::4]) if factor is not None]
    return all(isinstance(weight, cupy.ndarray) and weight.dtype == x.dtype for weight in weights) and all(
        isinstance(factor, cupy.ndarray) and factor.dtype == np.float32 for factor in factors
    )


@ops.lora_linears.kernel("cuda", group_applies)
def lora_linears(x: Array, *layers: Any, scales: tuple[float, ...], value: bool = True, needs: tuple[bool, ...]):
    """The layers as one: W one under the other (models/together.py puts them so), A too, and B as the blocks of a
    matrix that is zero elsewhere. Forward is then three products for all, and backward five.
    """
    weights = layers[::4]
    used = {scale for A, scale in zip(layers[2::4], scales, strict=True) if A is not None}
    W = one_under_the_other(weights)
    if W is None or len(used) != 1 or len(scales) == 1:
        return one_after_another(lora_linear, x, *layers, scales=scales, value=value, needs=needs)
    (scale,) = used
    shape_x, tokens, dtype = x.shape, rows(x), x.dtype
    As, Bs = ([factor for factor in layers[place::4] if factor is not None] for place in (2, 3))
    sizes = [(len(weight), 0 if A is None else len(A)) for weight, A in zip(weights, layers[2::4], strict=True)]
    stack = narrowed_stack(As, Bs, sizes, dtype)
    u = gemm(tokens, stack.lora_A.T)  # (N, R)
    starts = np.cumsum([0, *(out for out, _ in sizes)]).tolist()
    if value:
        y = gemm(tokens, W.T)  # (N, Σ out)
        gemm(u, stack.lora_B.T, y, alpha=scale, beta=1.0)
        ys = [columns(y, start, (*shape_x[:-1], out)) for start, (out, _) in zip(starts[:-1], sizes, strict=True)]
        for part, bias in zip(ys, layers[1::4], strict=True):
            if bias is not None:
                part += bias.astype(dtype, copy=False)
    else:
        ys = [unread((*shape_x[:-1], out), x) for out, _ in sizes]
    needs_bias, needs_A, needs_B = needs[2::4], needs[3::4], needs[4::4]
    kept: Any = keep(x) if any(needs_A) else None
    kept_u: Any = u if any(needs_B) else None
    del tokens

    def vjp(*dys):
        gs = [rows(dy) for dy in dys]
        g = side_by_side(gs)
        parts = gs if g is None else [g]
        v = dx = d_lora_A = None
        d_lora_B: Any = None
        with Fork() as fork:
            if needs[0]:
                dx = product_of_parts(parts, W)
            if needs[0] or any(needs_A):
                with fork.branch(1):
                    v = product_of_parts(parts, stack.lora_B, scale)  # (N, R)
                    d_lora_A = gemm(v.T, rows(kept()), dtype=np.float32) if any(needs_A) else None  # (R, in)
            if any(needs_B):
                with fork.branch(2):  # (Σ out, R): its blocks are what is asked
                    d_lora_B = cupy.empty((starts[-1], kept_u.shape[1]), np.float32)
                    start = 0
                    for part in parts:
                        gemm(part.T, kept_u, d_lora_B[start : start + part.shape[1]], alpha=scale)
                        start += part.shape[1]
        if dx is not None and v is not None:
            dx = gemm(v, stack.lora_A, dx, beta=1.0).reshape(shape_x)
        gradients: list[Any] = []
        rank_start = 0
        for index, (out, rank) in enumerate(sizes):
            A_part = B_part = None
            if needs_A[index]:
                A_part = own_rows(d_lora_A, slice(rank_start, rank_start + rank))
            if needs_B[index]:
                block = d_lora_B[starts[index] : starts[index + 1]]
                B_part = columns(block, rank_start, (out, rank))
            d_bias = gs[index].sum(axis=0, dtype=np.float32) if needs_bias[index] else None
            gradients += [None, d_bias, A_part, B_part]
            rank_start += rank
        return dx, *gradients

    return tuple(ys), vjp


def one_under_the_other(matrices: Sequence[Array]) -> Array | None:
    """Contiguous matrices of one width that follow one another in memory, as one; None where they do not."""
    first, end = matrices[0], matrices[0].data.ptr
    for matrix in matrices:
        if matrix.data.ptr != end or not matrix.flags.c_contiguous or matrix.shape[1] != first.shape[1]:
            return None
        end += matrix.nbytes
    return cupy.ndarray((sum(map(len, matrices)), first.shape[1]), first.dtype, first.data)


def side_by_side(parts: Sequence[Array]) -> Array | None:
    """(N, width) parts as one (N, Σ width) matrix: what they are columns of, a copy if it is small, or None."""
    widths = [part.shape[1] for part in parts]
    total, first = sum(widths), parts[0]
    row = total * first.itemsize
    start, adjacent = first.data.ptr, True
    for part, width in zip(parts, widths, strict=True):
        adjacent = adjacent and part.data.ptr == start and part.strides == (row, part.itemsize)
        start += width * part.itemsize
    if adjacent and len(first) > 1:
        return cupy.ndarray((len(first), total), first.dtype, first.data)
    if len(first) * total > JOIN_BELOW:
        return None
    if len(parts) > 3 or not fits(*parts):
        return cupy.concatenate(parts, axis=1)
    joined = cupy.empty((len(first), total), first.dtype)
    three = [*parts, *(parts[-1],) * (3 - len(parts))]
    sizes = [np.int32(width) for width in (*widths, 0, 0)[:3]]
    over_packs("elementwise", "side_by_side", joined.size, joined, *three, joined, np.int64(joined.size), *sizes)
    return joined


def product_of_parts(parts: Sequence[Array], matrix: Array, alpha: float = 1.0) -> Array:
    """alpha · (parts side by side) · matrix, a part after the other, added up by the products themselves."""
    result, start = None, 0
    for part in parts:
        stop = start + part.shape[1]
        result = gemm(part, matrix[start:stop], result, alpha, beta=0.0 if result is None else 1.0)
        start = stop
    assert result is not None
    return result


def own_rows(array: Array, part: slice) -> Array:
    """array[part] as an array of its own rather than a view: nobody else writes to these rows, so no copy is needed."""
    start = array.data + part.start * array.strides[0]
    return cupy.ndarray((part.stop - part.start, array.shape[1]), array.dtype, start)
