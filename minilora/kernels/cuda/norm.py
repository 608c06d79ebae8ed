"""Norms with the residual addition before them in one launch, and in backward the residual gradient added in another.

What they compute: ops/norm.py, ops/fused.py. The kernels and their roofline: norm.cu.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ... import ops
from ...backend import Array
from .memory import remember
from .source import THREADS, fits, function, pointer, ready, wide

MOST_PACKS = 4  # of 16 bytes that a thread holds


def launch(name: str, x: Array, *arguments: Any) -> None:
    """Run a kernel of norm.cu over the rows of x (..., D): a warp for each narrow row, a block for each wide one."""
    packs = x.shape[-1] // wide(x)
    lanes = 32
    while lanes * MOST_PACKS < packs:
        lanes *= 2
    block = max(lanes, THREADS // 2)
    rows = x.size // x.shape[-1]
    kernel = function("norm", name, x.dtype.name, LANES=lanes, PACKS=-(-packs // lanes))
    kernel((-(-rows // (block // lanes)) if lanes == 32 else rows,), (block if lanes == 32 else lanes,), arguments)


def sizes(x: Array) -> tuple[np.int64, np.int32]:
    """The row count and the width, as the kernels take them."""
    return np.int64(x.size // x.shape[-1]), np.int32(x.shape[-1])


def applies(x: Array, delta: Array | None, *parameters: Array, eps: float) -> bool:
    """parameters: the norm's weight, and its bias where it has one."""
    given = [x] if delta is None else [x, delta]
    return fits(*given, *parameters) and x.shape[-1] <= 1024 * MOST_PACKS * wide(x)


def norm_with_residual(
    x: Array, delta: Array | None, parameters: tuple[Array, ...], eps: float, needs: tuple[bool, ...], kind: str
):
    """The common part of both norms: `kind` is "rms" or "layer", the beginning of their kernels' names."""
    rows, width = sizes(x)
    s = x if delta is None else cupy.empty_like(x)
    y = cupy.empty_like(x)
    numbers = cupy.empty(int(rows) * (2 if kind == "layer" else 1), np.float32)  # 1/ρ, or μ and 1/σ, of each row
    launch(f"add_{kind}_norm", x, x, pointer(delta), *parameters, s, y, numbers, rows, width, np.float32(eps))

    def again() -> Array:
        result = cupy.empty_like(s)
        launch(f"{kind}_norm_again", s, s, *parameters, numbers, result, rows, width)
        return result

    remember(y, again)

    def vjp(dres: Array | None, dy: Array):
        dres = None if dres is None else ready(dres)
        ds = cupy.empty_like(s)
        launch(f"{kind}_norm_backward", s, s, parameters[0], numbers, ready(dy), pointer(dres), ds, rows, width)
        dweight = dbias = None
        if any(needs[2:]):  # full training; a frozen base comes without
            n, g = numbers.reshape(int(rows), -1), dy.reshape(int(rows), -1).astype(np.float32)
            flat = s.reshape(int(rows), -1).astype(np.float32)
            normed = flat * n if kind == "rms" else (flat - n[:, :1]) * n[:, 1:]
            dweight = (g * normed).sum(axis=0) if needs[2] else None
            dbias = g.sum(axis=0) if needs[-1] and kind == "layer" else None
        return (ds if needs[0] else None), (ds if needs[1] else None), *(dweight, dbias)[: len(parameters)]

    return (s, y), vjp


@ops.add_rms_norm.kernel("cuda", lambda x, delta, weight, *, eps: applies(x, delta, weight, eps=eps))
def add_rms_norm(x: Array, delta: Array | None, weight: Array, *, eps: float, needs: tuple[bool, ...]):
    return norm_with_residual(x, delta, (weight,), eps, needs, "rms")


@ops.add_layer_norm.kernel("cuda", lambda x, delta, weight, bias, *, eps: applies(x, delta, weight, bias, eps=eps))
def add_layer_norm(x: Array, delta: Array | None, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]):
    return norm_with_residual(x, delta, (weight, bias), eps, needs, "layer")


def alone(x: Array, parameters: tuple[Array, ...], eps: float, needs: tuple[bool, ...], kind: str):
    """The norm without a residual stream."""
    (_, y), vjp = norm_with_residual(x, None, parameters, eps, (needs[0], False, *needs[1:]), kind)

    def norm_vjp(dy):
        dx, _, *by_parameter = vjp(None, dy)
        return (dx if needs[0] else None), *by_parameter

    return y, norm_vjp


@ops.rms_norm.kernel("cuda", lambda x, weight, *, eps: applies(x, None, weight, eps=eps))
def rms_norm(x: Array, weight: Array, *, eps: float, needs: tuple[bool, ...]):
    return alone(x, (weight,), eps, needs, "rms")


@ops.layer_norm.kernel("cuda", lambda x, weight, bias, *, eps: applies(x, None, weight, bias, eps=eps))
def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, ...]):
    return alone(x, (weight, bias), eps, needs, "layer")
