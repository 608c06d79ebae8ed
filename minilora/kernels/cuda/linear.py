"""LoRA linear layers through cuBLAS: the low-rank terms are added into the same result by the products themselves.

What they compute: ops/lora.py. The base is bfloat16 (or float16, float32), adapters and their gradients are float32; in
a pass A and B are rounded to the activations' dtype once, all of them in one launch.
Axes: N tokens, in and out the layer's widths, r the rank, R the sum of ranks of layers that share an input.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ... import ops
from ...backend import Array
from ...ops.linalg import rows
from .gemm import gemm
from .lists import narrowed
from .memory import keep
from .source import C_NAMES, fits, over_packs


def add_bias(y: Array, bias: Array | None) -> None:
    """y (N, out) += bias (out,), in place."""
    if bias is None:
        return
    if fits(y, bias):
        over_packs("elementwise", "add_bias", y.size, y, y, bias, np.int64(y.size), np.int32(y.shape[1]))
    else:
        y += bias.astype(y.dtype, copy=False)


def applies(x: Array, weight: Any, bias: Array | None, lora_A: Array, lora_B: Array, *, scale: float) -> bool:
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
    x: Array, weight: Array, bias: Array | None, lora_A: Array, lora_B: Array, *, scale: float, needs: tuple[bool, ...]
):
    shape_x, tokens = x.shape, rows(x)
    A, B = narrowed(lora_A, x.dtype), narrowed(lora_B, x.dtype)
    u = gemm(tokens, A.T)  # (N, r)
    y = gemm(tokens, weight.T)
    gemm(u, B.T, y, alpha=scale, beta=1.0)
    add_bias(y, bias)
    kept: Any = keep(x) if needs[3] else None
    u = u if needs[4] else None
    del tokens

    def vjp(dy):
        g = rows(dy)
        v = gemm(g, B, alpha=scale) if needs[0] or needs[3] else None  # (N, r)
        dx = None
        if needs[0]:
            dx = gemm(g, weight)
            gemm(v, A, dx, beta=1.0)
            dx = dx.reshape(shape_x)
        d_lora_A = gemm(v.T, rows(kept()), dtype=np.float32) if needs[3] else None
        d_lora_B = gemm(g.T, u, alpha=scale, dtype=np.float32) if needs[4] else None
        return dx, None, (g.sum(axis=0, dtype=np.float32) if needs[2] else None), d_lora_A, d_lora_B

    return y.reshape(*shape_x[:-1], weight.shape[0]), vjp


# --- layers that read the same x --------------------------------------------------------------------------------------


def group_applies(x: Array, *layers: Any, scales: tuple[float, ...]) -> bool:
    if not (isinstance(x, cupy.ndarray) and x.dtype.name in C_NAMES and x.size > 0):
        return False
    weights, factors = layers[::4], [factor for factor in (*layers[2::4], *layers[3::4]) if factor is not None]
    return all(isinstance(weight, cupy.ndarray) and weight.dtype == x.dtype for weight in weights) and all(
        isinstance(factor, cupy.ndarray) and factor.dtype == np.float32 for factor in factors
    )


@ops.lora_linears.kernel("cuda", group_applies)
def lora_linears(x: Array, *layers: Any, scales: tuple[float, ...], needs: tuple[bool, ...]):
    """The A of all layers as one matrix (R, in): x is read once for every u, once for every dA, and dx has one term."""
    shape_x, tokens, dtype = x.shape, rows(x), x.dtype
    weights, biases = layers[::4], layers[1::4]
    needs_bias, needs_A, needs_B = needs[2::4], needs[3::4], needs[4::4]
    As = [None if A is None else narrowed(A, dtype) for A in layers[2::4]]
    Bs = [None if B is None else narrowed(B, dtype) for B in layers[3::4]]
    ranks = [0 if A is None else len(A) for A in As]
    ends = np.cumsum(ranks).tolist()
    parts = [slice(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]  # of each layer in R
    total = ends[-1]
    stacked = None
    if total:
        present = [A for A in As if A is not None]
        stacked = present[0] if len(present) == 1 else cupy.concatenate(present)  # (R, in)
        u = gemm(tokens, stacked.T)  # (N, R)
    ys = []
    for weight, bias, B, part, scale in zip(weights, biases, Bs, parts, scales, strict=True):
        y = gemm(tokens, weight.T)
        if B is not None:
            gemm(u[:, part], B.T, y, alpha=scale, beta=1.0)
        add_bias(y, bias)
        ys.append(y.reshape(*shape_x[:-1], len(weight)))
    kept: Any = keep(x) if any(needs_A) else None
    kept_u: Any = u if any(needs_B) else None
    del tokens

    def vjp(*dys):
        gs = [rows(dy) for dy in dys]
        v = cupy.empty((len(gs[0]), total), dtype) if total and (needs[0] or any(needs_A)) else None
        if v is not None:
            for g, B, part, scale in zip(gs, Bs, parts, scales, strict=True):
                if B is not None:
                    gemm(g, B, v[:, part], alpha=scale)
        dx = None
        if needs[0]:
            for g, weight in zip(gs, weights, strict=True):
                dx = gemm(g, weight, dx, beta=0.0 if dx is None else 1.0)
            if v is not None:
                gemm(v, stacked, dx, beta=1.0)
            dx = dx.reshape(shape_x)
        d_stacked = gemm(v.T, rows(kept()), dtype=np.float32) if any(needs_A) else None  # (R, in)
        gradients = []
        for index, (g, part) in enumerate(zip(gs, parts, strict=True)):
            d_bias = g.sum(axis=0, dtype=np.float32) if needs_bias[index] else None
            d_lora_A = own_rows(d_stacked, part) if needs_A[index] else None
            d_lora_B = None
            if needs_B[index]:
                d_lora_B = gemm(g.T, kept_u[:, part], alpha=scales[index], dtype=np.float32)
            gradients += [None, d_bias, d_lora_A, d_lora_B]
        return dx, *gradients

    return tuple(ys), vjp


def own_rows(array: Array, part: slice) -> Array:
    """array[part] as an array of its own rather than a view: nobody else writes to these rows, so no copy is needed."""
    start = array.data + part.start * array.strides[0]
    return cupy.ndarray((part.stop - part.start, array.shape[1]), array.dtype, start)
