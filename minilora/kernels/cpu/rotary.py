"""Rotary positions with long inner loops: y = x · [cos, cos] + swapped(x) · [−sin, sin], a few rows at a time."""

from __future__ import annotations

import numpy as np

from ... import ops
from ...backend import Array
from .elementwise import BLOCK_ENTRIES, LEAST_ENTRIES, computes
from .memory import empty
from .threads import parallel_rows, scratch


def applies(x: Array, *, cos: Array, sin: Array) -> bool:
    return computes(x, cos, sin) and x.size > 0


@ops.rotary.kernel("cpu", applies)
def rotary(x: Array, *, cos: Array, sin: Array):
    def vjp(dy):
        return rotated(dy, cos, -sin)

    return rotated(x, cos, sin), vjp


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x (B, T, H, d) with each pair (i, i + d/2) turned; cos and sin (B or 1, T, 1, d/2)."""
    batch, time, heads, width = x.shape
    half = width // 2
    cosines = np.concatenate([cos, cos], axis=-1)[:, :, 0]  # (B or 1, T, d)
    sines = np.concatenate([-sin, sin], axis=-1)[:, :, 0]
    y = empty(x.shape, x.dtype)

    def turn(row: int, a: int, b: int) -> None:
        part, out = x[row, a:b], y[row, a:b]
        table = row if len(cosines) > 1 else 0
        swapped = scratch("rotary", (b - a, heads, 2, half), part.dtype)
        halves = part.reshape(swapped.shape)[:, :, ::-1]
        np.multiply(halves, sines[table, a:b].reshape(b - a, 1, 2, half), out=swapped)
        np.multiply(part, cosines[table, a:b, None], out=out)
        out += swapped.reshape(part.shape)

    def run(a: int, b: int) -> None:  # rows of all sequences, one after the other
        while a < b:
            row, first = divmod(a, time)
            last = min(time, first + b - a)
            turn(row, first, last)
            a += last - first

    row_entries = heads * width
    parallel_rows(run, batch * time, max(1, BLOCK_ENTRIES // row_entries), max(1, LEAST_ENTRIES // row_entries))
    return y
