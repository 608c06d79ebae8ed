"""Rotary tables: the angle of each pair of a head's values at each position, with the scalings that configs ask for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..backend import Array, device_of, resident
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
    """cos and sin for positions 0, 1, 2 …, grown as longer sequences come; a copy on each device that asks for it."""

    def __init__(self, frequencies: np.ndarray, dtype: np.dtype) -> None:
        self.frequencies, self.dtype = frequencies, dtype
        self.tables: dict[str, tuple[Array, Array]] = {}
        self.length = 0

    def reach(self, length: int) -> None:
        """Make the tables at least so long."""
        if length > self.length:
            self.length = max(length, 2 * self.length)
            angles = np.arange(self.length)[:, None] * self.frequencies
            self.tables = {"cpu": (np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype))}

    def at(self, positions: Array) -> tuple[Array, Array]:
        """cos and sin (·, T, 1, d/2) on the device of the positions (·, T), which `reach` must have been told of."""
        device = device_of(positions)
        if device not in self.tables:
            cos, sin = self.tables["cpu"]
            self.tables[device] = resident(cos, device), resident(sin, device)
        cos, sin = self.tables[device]
        return cos[positions][:, :, None], sin[positions][:, :, None]
