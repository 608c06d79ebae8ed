"""What an adapter's matrices say, without ever forming a ΔW. Axes: in and out the layer's widths, r rank."""

from __future__ import annotations

import math

import numpy as np

from ..backend import Array, matmul


def update_norm(lora_A: Array, lora_B: Array, scale: float) -> float:
    """‖ΔW‖_F = |s| · ‖B A‖_F of A (r, in) and B (out, r), in float64, from the two (r, r) Gram matrices.

    ‖B A‖_F² = trace(Aᵀ Bᵀ B A) = trace((Bᵀ B)(A Aᵀ)) = Σ_ij (Bᵀ B)_ij (A Aᵀ)_ij, since both are symmetric.
    """
    A, B = lora_A.astype(np.float64), lora_B.astype(np.float64)
    squared = float((matmul(B.T, B) * matmul(A, A.T)).sum())
    return abs(scale) * math.sqrt(max(0.0, squared))  # rounding may leave a zero slightly below it
