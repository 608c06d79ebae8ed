"""What an adapter's matrices say, without ever forming a ΔW: everything comes from its factors, in float64.

Axes: in and out the layer's widths, r rank. ΔW = s · B A with A (r, in) and B (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..backend import Array, array_module, matmul


def update_norm(lora_A: Array, lora_B: Array, scale: float) -> float:
    """‖ΔW‖_F = |s| · ‖B A‖_F of A (r, in) and B (out, r), in float64, from the two (r, r) Gram matrices.

    ‖B A‖_F² = trace(Aᵀ Bᵀ B A) = trace((Bᵀ B)(A Aᵀ)) = Σ_ij (Bᵀ B)_ij (A Aᵀ)_ij, since both are symmetric.
    """
    A, B = lora_A.astype(np.float64), lora_B.astype(np.float64)
    squared = float((matmul(B.T, B) * matmul(A, A.T)).sum())
    return abs(scale) * math.sqrt(max(0.0, squared))  # rounding may leave a zero slightly below it


class Spectrum(NamedTuple):
    """The singular value decomposition ΔW = U diag(σ) Vᵀ, as far as ΔW's rank can reach: k = min(r, out, in).

    left U (out, k), values σ (k,), largest first, right V (in, k): float64.
    """

    left: Array
    values: Array
    right: Array

    @property
    def rank(self) -> int:
        """How many singular values are above rounding: σ_i > σ_1 · max(out, in) · 2⁻⁵² (as np.linalg.matrix_rank)."""
        threshold = self.values[:1] * max(len(self.left), len(self.right)) * np.finfo(np.float64).eps
        return int((self.values > threshold).sum())


def spectrum(lora_A: Array, lora_B: Array, scale: float) -> Spectrum:
    """The SVD of ΔW from those of its factors' QR: no matrix larger than the factors is made.

    With B = Q_B R_B and Aᵀ = Q_A R_A, ΔW = Q_B (s R_B R_Aᵀ) Q_Aᵀ; the core (k, k) = P diag(σ) Rᵀ gives U = Q_B P and
    V = Q_A R.
    """
    xp = array_module(lora_A)
    Q_A, R_A = xp.linalg.qr(lora_A.astype(np.float64).T)
    Q_B, R_B = xp.linalg.qr(lora_B.astype(np.float64))
    P, values, R_transposed = xp.linalg.svd(matmul(R_B, R_A.T) * scale, full_matrices=False)
    return Spectrum(matmul(Q_B, P), values, matmul(Q_A, R_transposed.T))


def effective_rank(values: Array) -> float:
    """e^H with H = −Σ p ln p the entropy of p = σ / Σσ: k for k equal values, 1 for one, 0 for a zero matrix.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
    """
    xp = array_module(values)
    p = values[values > 0] / max(float(values.sum()), np.finfo(np.float64).tiny)
    return math.exp(-float((p * xp.log(p)).sum())) if len(p) else 0.0


def stable_rank(values: Array) -> float:
    """Σσ² / σ₁² = ‖ΔW‖_F² / ‖ΔW‖₂², between 1 and the rank; 0 for a zero matrix (Rudelson & Vershynin 2007)."""
    top = float(values.max(initial=0.0))
    return float(((values / top) ** 2).sum()) if top else 0.0


def frobenius_norm(weight: Array) -> float:
    """‖W‖_F in float64, some rows at a time."""
    return math.sqrt(sum(float((part**2).sum()) for _, part in _row_blocks(weight)))


def projected_norm(weight: Array, update: Spectrum) -> float:
    """‖Uᵀ W V‖_F: how much of W (out, in) lies in ΔW's own directions, those of its singular values above rounding.

    The amplification factor is ‖ΔW‖_F over it (Hu et al. 2021, section 7.3 and table 7).
    """
    U, V = update.left[:, : update.rank], update.right[:, : update.rank]
    projected = sum(matmul(U[rows].T, matmul(part, V)) for rows, part in _row_blocks(weight))
    return float(array_module(weight).linalg.norm(projected))


def _row_blocks(weight: Array, step: int = 1024) -> Iterator[tuple[slice, Array]]:
    """W in float64, `step` rows at a time: a whole copy would be several times a narrow W."""
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].astype(np.float64)


def subspace_similarity(first: Array, second: Array) -> Array:
    """φ(i, j) = ‖P_iᵀ Q_j‖_F² / min(i, j) for the first i columns of P (n, k) and the first j of Q (n, l): (k, l).

    Columns are orthonormal. 1: the smaller subspace lies within the larger; 0: they are orthogonal; random ones have
    max(i, j) / n on average (Hu et al. 2021, section 7.2, equation 4; φ(i, j) is entry i − 1, j − 1).
    """
    xp = array_module(first)
    squares = matmul(first.T, second) ** 2
    smaller = xp.minimum(xp.arange(1, first.shape[1] + 1)[:, None], xp.arange(1, second.shape[1] + 1))
    return squares.cumsum(axis=0).cumsum(axis=1) / smaller
