"""DoRA's magnitudes in row blocks that stay in a core's cache. Axes: N tokens, out the layer's width."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ... import ops
from ...backend import Array, cast
from . import elementwise
from .elementwise import computes, flat, has_rows, over_rows
from .linear import sum_of_parts
from .memory import empty_like
from .threads import row_blocks, run_all, scratch


def applies(z: Array, magnitude: Array, bias: Array | None, *, norm: Array) -> bool:
    return has_rows(z) and computes(z, magnitude, norm) and (bias is None or isinstance(bias, np.ndarray))


@ops.with_magnitude.kernel("cpu", applies)
def with_magnitude(z: Array, magnitude: Array, bias: Array | None, *, norm: Array, needs: tuple[bool, bool, bool]):
    shape_z = z.shape
    (tokens,) = flat(z)
    width = tokens.shape[1]
    factor = magnitude / norm
    y = empty_like(tokens)
    bias = None if bias is None else cast(bias, z.dtype)

    def forward(a: int, b: int) -> None:
        np.multiply(tokens[a:b], factor, out=y[a:b])
        if bias is not None:
            y[a:b] += bias

    over_rows(forward, tokens)
    kept: Any = tokens if needs[1] else None

    def vjp(dy):
        (g,) = flat(dy)
        most = max(1, elementwise.BLOCK_ENTRIES // width)
        blocks = row_blocks(len(g), most, max(1, elementwise.LEAST_ENTRIES // width))
        dz = empty_like(g) if needs[0] else None
        trained = [name for name, need in zip("mb", needs[1:], strict=True) if need]
        sums = {name: np.empty((len(blocks), width), g.dtype) for name in trained}

        def backward(number: int, a: int, b: int) -> None:
            if dz is not None:
                np.multiply(g[a:b], factor, out=dz[a:b])
            if "m" in sums:
                product = np.multiply(g[a:b], kept[a:b], out=scratch("magnitude", (b - a, width), g.dtype))
                np.sum(product, axis=0, out=sums["m"][number])
            if "b" in sums:
                np.sum(g[a:b], axis=0, out=sums["b"][number])

        run_all([partial(backward, number, a, b) for number, (a, b) in enumerate(blocks)])
        d_magnitude = sum_of_parts(sums["m"]) / norm if "m" in sums else None
        d_bias = sum_of_parts(sums["b"]) if "b" in sums else None
        return (None if dz is None else dz.reshape(shape_z)), d_magnitude, d_bias

    return y.reshape(shape_z), vjp
