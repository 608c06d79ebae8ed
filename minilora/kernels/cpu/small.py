"""Matrix products in parts so small that OpenBLAS multiplies them without copying their operands together first.

Beside a large product that copying is little. Where one side is no wider than a head it is not: with it such products
reach 75 to 95 GFLOP/s a core here, without it 112. OpenBLAS leaves it out (on AVX-512) for up to SMALL multiplications,
unless the right operand is transposed in memory: who has it as (n, k) copies it to (k, n) first. Other libraries lose
nothing by the parts: NumPy loops over them in C.
"""

from __future__ import annotations

import numpy as np

SMALL = 10**6  # multiplications of a part


def product(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out = left right, some rows of the result at a time: (..., m, k), (..., k, n) -> (..., m, n)."""
    rows, inner, columns = left.shape[-2], *right.shape[-2:]
    parts = -(-rows * inner * columns // SMALL)
    if parts <= 1:
        return np.matmul(left, right, out=out)
    length = -(-rows // parts)
    whole = rows - rows % length
    np.matmul(cut(left[..., :whole, :], length), right[..., None, :, :], out=cut(out[..., :whole, :], length))
    if whole < rows:
        np.matmul(left[..., whole:, :], right, out=out[..., whole:, :])
    return out


def cut(x: np.ndarray, length: int) -> np.ndarray:
    """A view of x (..., n length, k) as (..., n, length, k)."""
    return x.reshape(*x.shape[:-2], -1, length, x.shape[-1])
