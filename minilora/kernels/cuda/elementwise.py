"""Activations, sums and rotary positions, a launch each. What they compute: ops/activation.py, ops/arithmetic.py and
ops/rotary.py. The kernels and their roofline: elementwise.cu.
"""

from __future__ import annotations

from itertools import pairwise

import cupy
import numpy as np

from ... import ops
from ...backend import Array
from .attention import in_columns
from .memory import remember
from .source import C_NAMES, THREADS, columns, fits, function, over_packs, ready, wide


def of_one_shape(*arrays: Array) -> bool:
    return fits(*arrays) and all(array.shape == arrays[0].shape for array in arrays)


def in_rows(gate: Array, up: Array) -> bool:
    """Whether both are matrices of the same rows, 16 bytes at a time, equally far apart."""
    return (
        isinstance(gate, cupy.ndarray)
        and isinstance(up, cupy.ndarray)
        and gate.dtype == up.dtype
        and gate.dtype.name in C_NAMES
        and gate.ndim > 0
        and gate.size > 0
        and gate.shape == up.shape
        and gate.shape[-1] % wide(gate) == 0
        and gate.strides == up.strides
        and one_stride(gate) > 0
        and one_stride(gate) % wide(gate) == 0
        and gate.data.ptr % 16 == up.data.ptr % 16 == 0
    )


def one_stride(x: Array) -> int:
    """The distance in values from row to row of x (..., width), or 0 where there is no single one."""
    item, width = x.itemsize, x.shape[-1]
    if x.strides[-1] != item:
        return 0
    steps = [(size, stride // item) for size, stride in zip(x.shape[:-1], x.strides[:-1], strict=True) if size > 1]
    for (_, outer), (size, inner) in pairwise(steps):
        if outer != size * inner:
            return 0
    return steps[-1][1] if steps else width


@ops.silu_mul.kernel("cuda", in_rows)
def silu_mul(gate: Array, up: Array):
    width, stride = gate.shape[-1], one_stride(gate)
    rows = gate.size // width
    packs = width // wide(gate)
    threads = min(THREADS, -(-packs // 32) * 32)
    grid = (rows, -(-packs // threads))

    def forward() -> Array:
        h = cupy.empty(gate.shape, gate.dtype)
        kernel = function("elementwise", "silu_mul", gate.dtype.name)
        kernel(grid, (threads,), (gate, up, h, np.int64(stride), np.int32(width)))
        return h

    h = forward()
    remember(h, forward)

    def vjp(dh):
        both = cupy.empty((rows, 2 * width), gate.dtype)  # side by side, as the layers' backward pass takes them
        dgate, dup = columns(both, 0, gate.shape), columns(both, width, gate.shape)
        kernel = function("elementwise", "silu_mul_backward", gate.dtype.name)
        strides = (np.int64(stride), np.int64(2 * width))
        kernel(grid, (threads,), (gate, up, ready(dh), dgate, dup, *strides, np.int32(width)))
        return dgate, dup

    return h, vjp


@ops.gelu_tanh.kernel("cuda", fits)
def gelu_tanh(x: Array):
    size = np.int64(x.size)

    def forward() -> Array:
        y = cupy.empty_like(x)
        over_packs("elementwise", "gelu_tanh", x.size, x, x, y, size)
        return y

    y = forward()
    remember(y, forward)

    def vjp(dy):
        dx = cupy.empty_like(x)
        over_packs("elementwise", "gelu_tanh_backward", x.size, x, x, ready(dy), dx, size)
        return dx

    return y, vjp


@ops.add.kernel("cuda", of_one_shape)
def add(a: Array, b: Array, *, needs: tuple[bool, bool]):
    total = cupy.empty_like(a)
    over_packs("elementwise", "add", a.size, a, a, b, total, np.int64(a.size))
    return total, lambda dy: ((dy if needs[0] else None), (dy if needs[1] else None))


@ops.unstack.kernel("cuda", lambda x, *, axis: x.ndim == 5 and axis == 2 and x.shape[2] == 3 and fits(x))
def unstack(x: Array, *, axis: int):
    """q, k and v of (B, T, 3, H, d)."""
    parts = tuple(x[:, :, part] for part in range(3))
    width = x.shape[3] * x.shape[4]

    def vjp(*dys):
        if in_columns(*dys):  # as attention's backward pass leaves them
            return cupy.ndarray(x.shape, x.dtype, dys[0].data)
        dx = cupy.empty(x.shape, x.dtype)
        widths = (np.int32(width),) * 3
        over_packs("elementwise", "side_by_side", x.size, x, *map(ready, dys), dx, np.int64(x.size), *widths)
        return dx

    return parts, vjp


def turn(x: Array, cos: Array, sin: Array, direction: float) -> Array:
    batch, time, heads, width = x.shape
    y = cupy.empty(x.shape, x.dtype)
    strides = [np.int64(stride // x.dtype.itemsize) for stride in x.strides[:3]]
    threads = batch * time * heads * (width // 2 // wide(x))
    kernel = function("elementwise", "rotary", x.dtype.name)
    kernel(
        (-(-threads // THREADS),),
        (THREADS,),
        (
            x, y, cos, sin, *strides, np.int64(batch * time * heads), np.int32(time), np.int32(heads),
            np.int32(width // 2), np.int32(len(cos) > 1), np.float32(direction),
        ),
    )  # fmt: skip
    return y


def rotary_applies(x: Array, *, cos: Array, sin: Array) -> bool:
    return (
        isinstance(x, cupy.ndarray)
        and x.dtype.name in C_NAMES
        and x.ndim == 4
        and x.size > 0
        and x.shape[3] % (2 * wide(x)) == 0
        and x.strides[3] == x.dtype.itemsize
        and all(stride % 16 == 0 for stride in x.strides[:3])
        and x.data.ptr % 16 == 0
        and cos.dtype == np.float32
        and cos.flags.c_contiguous
        and sin.flags.c_contiguous
    )


@ops.rotary.kernel("cuda", rotary_applies)
def rotary(x: Array, *, cos: Array, sin: Array):
    return turn(x, cos, sin, 1.0), lambda dy: turn(ready(dy), cos, sin, -1.0)
