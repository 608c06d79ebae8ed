"""Merging: W' = W + Σ weight · s · B A in float32 (float64 for a float64 base), rounded once; and back to W itself.

Parameters that an adapter has of its own (own.py) take the place of the base's, rounded once to its dtype.
"""

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
        self.kept: dict[str, Tensor] = {}  # by the parameter's name

    @property
    def active(self) -> bool:
        return bool(self.kept)

    def merge(self, adapters: Adapters, weights: Mapping[str, float]) -> None:
        """Replace what the adapters change of the base. Everything is computed and checked before anything is replaced.

        A tied matrix is replaced in the one layer that is adapted, so the head and the embedding then differ.
        """
        if self.active:
            raise MiniloraError("an adapter is merged already: unmerge_adapter() first")
        if not weights:
            raise MiniloraError("found no adapter to merge, expected a name, or {name: weight}")
        merged: dict[str, Tensor] = {}
        for path, module in adapters.adaptable.items():
            layers = [
                (module.adapter.layers[name], weight)
                for name, weight in weights.items()
                if module.adapter and name in module.adapter.layers
            ]
            if not layers:
                continue
            base = _array(module.weight, f"{path}.weight")
            wide = compute_dtype(base.dtype)
            dense = total = cast(base, wide)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
                for layer, weight in layers:
                    total = total + layer.delta(dense) * wide.type(weight)
            merged[f"{path}.weight"] = _rounded(total, module.weight, f"{path}.weight")
        for own in (own for name in weights for own in adapters.own[name].values()):
            base_tensor = getattr(own.module, own.attribute)
            _array(base_tensor, own.parameter)
            merged[own.parameter] = _rounded(own.tensor.data, base_tensor, own.parameter)
        modules = dict(adapters.network.named_modules())
        for name, tensor in merged.items():
            path, _, attribute = name.rpartition(".")
            self.kept[name] = getattr(modules[path], attribute)
            setattr(modules[path], attribute, tensor)

    def unmerge(self, adapters: Adapters) -> None:
        """Put the original weights back, bit for bit."""
        if not self.active:
            raise MiniloraError("no adapter is merged: merge_adapter(name) comes before unmerge_adapter()")
        modules = dict(adapters.network.named_modules())
        for name, tensor in self.kept.items():
            path, _, attribute = name.rpartition(".")
            setattr(modules[path], attribute, tensor)
        self.kept = {}


def _array(base: Tensor, name: str) -> Array:
    """The parameter's array; MiniloraError for a compressed one."""
    if isinstance(base.data, CompressedWeight):
        raise MiniloraError(f"{name} is stored compressed: load the model with dtype='float32' to merge into it")
    return base.data


def _rounded(value: Array, base: Tensor, name: str) -> Tensor:
    """A new Tensor for the base's, in its dtype; MiniloraError for a value that is not finite there."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = cast(value, base.dtype)
    if not bool(array_module(result).isfinite(cast(result, compute_dtype(base.dtype))).all()):
        raise MiniloraError(f"merging would put a non-finite value into {name} ({base.dtype}): nothing was merged")
    return Tensor(result.copy() if result is value else result, requires_grad=base.requires_grad)
