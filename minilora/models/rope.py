"""Rotary tables: the angle of each pair of a head's values at each position, with the scalings that configs ask for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import MiniloraError


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> np.ndarray:
    """ω_i = theta^(−2i/d), i = 0 … d/2 − 1, in float64, after the config's scaling (Su et al. 2021, section 3.2).

    scaling: None or {"rope_type": "default"}; {"rope_type": "linear", "factor"} divides every ω (Chen et al. 2023);
    {"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"} divides
    those of long wavelength and blends in between (Llama 3.1). Another type is a MiniloraError.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    assert scaling is not None

    def value(name: str) -> float:
        found = scaling.get(name)
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < math.inf:
            raise MiniloraError(
                f"config.json asks for rope scaling {kind!r} with {name} = {found!r}, expected a number above zero"
            )
        return float(found)

    if kind == "linear":
        return frequencies / value("factor")
    if kind == "llama3":
        low, high = value("low_freq_factor"), value("high_freq_factor")
        if low >= high:
            raise MiniloraError(f"config.json has low_freq_factor = {low}, expected less than high_freq_factor, {high}")
        # Turns that a pair makes within the original context; few turns: a long wavelength, scaled in full.
        turns = value("original_max_position_embeddings") * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / value("factor"))
    raise MiniloraError(f"config.json asks for rope scaling {kind!r}; supported are default, linear and llama3")


class RotaryTable:
    """cos and sin for positions 0, 1, 2 …, grown as longer sequences come, in the network's dtype."""

    def __init__(self, frequencies: np.ndarray, dtype: np.dtype) -> None:
        self.frequencies, self.dtype = frequencies, dtype
        self.cos = self.sin = np.zeros((0, len(frequencies)), dtype)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin (·, T, 1, d/2) for positions (·, T), NumPy arrays."""
        needed = int(positions.max(initial=0)) + 1
        if needed > len(self.cos):
            angles = np.arange(max(needed, 2 * len(self.cos)))[:, None] * self.frequencies
            self.cos, self.sin = np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]
