"""The KV cache of generation: each layer's keys and values so far, so that a new token costs one token's work."""

from __future__ import annotations

from ..backend import Array, array_module
from ..tensor import Tensor


class KVCache:
    """Keys and values of every layer, for inference: B sequences of at most `capacity` positions.

    length: positions held. A layer's arrays are made when it first extends them, on the device of what it adds.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.keys: list[Array | None] = [None] * layers
        self.values: list[Array | None] = [None] * layers

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v (B, T, K, d) of new positions to a layer; all of its keys and values (B, length + T, K, d)."""
        return self._extend(self.keys, layer, k), self._extend(self.values, layer, v)

    def _extend(self, store: list[Array | None], layer: int, new: Tensor) -> Tensor:
        batch, time, heads, width = new.shape
        if self.length + time > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} positions, and {self.length + time} are to be in it")
        held = store[layer]
        if held is None:
            held = store[layer] = array_module(new.data).empty((batch, self.capacity, heads, width), new.dtype)
        held[:, self.length : self.length + time] = new.data
        return Tensor(held[:, : self.length + time])

    def arrays(self) -> tuple[list[Array], list[Array]]:
        """Each layer's keys and values with all their places (B, capacity, K, d), once every layer has extended."""
        return self.keys, self.values

    def advance(self, count: int) -> None:
        """Count `count` new positions as held, after every layer has extended."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.length = min(self.length, length)

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences of the batch only."""
        self.keys = [None if keys is None else keys[rows] for keys in self.keys]
        self.values = [None if values is None else values[rows] for values in self.values]
