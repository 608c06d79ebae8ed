"""Activations, sums and rotary positions, a launch each. What they compute: ops/activation.py, ops/arithmetic.py and
ops/rotary.py. The kernels and their roofline: elementwise.cu.
"""

from __future__ import annotations

import cupy
import numpy as np

from ... import ops
from ...backend import Array
from .memory import remember
from .source import C_NAMES, THREADS, fits, function, over_packs, ready, wide


def of_one_shape(*arrays: Array) -> bool:
    return fits(*arrays) and all(array.shape == arrays[0].shape for array in arrays)


@ops.silu_mul.kernel("cuda", of_one_shape)
def silu_mul(gate: Array, up: Array):
    size = np.int64(gate.size)

    def forward() -> Array:
        h = cupy.empty_like(gate)
        over_packs("elementwise", "silu_mul", gate.size, gate, gate, up, h, size)
        return h

    h = forward()
    remember(h, forward)

    def vjp(dh):
        dgate, dup = cupy.empty_like(gate), cupy.empty_like(gate)
        over_packs("elementwise", "silu_mul_backward", gate.size, gate, gate, up, ready(dh), dgate, dup, size)
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
