"""Merging: W' = W + Σ weight · s · B A in float32 (float64 for a float64 base), rounded once; and back to W itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..backend import Array, array_module, cast, compute_dtype
from ..errors import MiniloraError
from ..ops import CompressedWeight
from ..tensor import Tensor
from .adapters import Adapters


class Merge:
    """The merged state of a base: which weights were replaced, and the kept originals.

    Unmerging puts the kept Tensors back; it never subtracts, since W + ΔW − ΔW is not W in floating point.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        return bool(self.kept)

    def merge(self, adapters: Adapters, weights: Mapping[str, float]) -> None:
        """Replace the weights of all adapted layers. Everything is computed and checked before anything is replaced."""
        if self.active:
            raise MiniloraError("an adapter is merged already: unmerge_adapter() first")
        if not weights:
            raise MiniloraError("found no adapter to merge, expected a name, or {name: weight}")
        merged: dict[str, Tensor] = {}
        for path, linear in adapters.linears.items():
            layers = [
                (linear.adapter.layers[name], weight)
                for name, weight in weights.items()
                if linear.adapter and name in linear.adapter.layers
            ]
            if not layers:
                continue
            if isinstance(linear.weight.data, CompressedWeight):
                raise MiniloraError(
                    f"{path}.weight is stored compressed: load the model with dtype='float32' to merge into it"
                )
            base: Array = linear.weight.data
            wide = compute_dtype(base.dtype)
            dense = total = cast(base, wide)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
                for layer, weight in layers:
                    total = total + layer.delta(dense) * wide.type(weight)
                result = cast(total, base.dtype)
            xp = array_module(result)
            if not bool(xp.isfinite(cast(result, wide)).all()):
                raise MiniloraError(
                    f"merging would put a non-finite value into {path}.weight ({base.dtype}): nothing was merged"
                )
            merged[path] = Tensor(result, requires_grad=linear.weight.requires_grad)
        for path, weight_tensor in merged.items():
            linear = adapters.linears[path]
            self.kept[path] = linear.weight
            linear.weight = weight_tensor

    def unmerge(self, adapters: Adapters) -> None:
        """Put the original weights back, bit for bit."""
        if not self.active:
            raise MiniloraError("no adapter is merged: merge_adapter(name) comes before unmerge_adapter()")
        for path, weight in self.kept.items():
            adapters.linears[path].weight = weight
        self.kept = {}
