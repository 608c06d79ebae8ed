"""Merging: W' = W + Σ weight · s · B A in float32 (float64 for a float64 base), rounded once; and back to W itself.

Parameters that an adapter has of its own (own.py) take the place of the base's, rounded once to its dtype. A compressed
weight becomes a float32 one, or is compressed again, which loses something: the caller says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..backend import Array, array_module, cast, compute_dtype
from ..errors import MiniloraError
from ..execution import in_parts
from ..ops import CompressedWeight
from ..tensor import Tensor
from .adapters import Adapters
from .layer import LoraLayer
from .requantise import Rounding, check_choice, compressed_again


class Merge:
    """The merged state of a base: which weights were replaced, and the kept originals.

    Unmerging puts the kept Tensors back; it never subtracts, since W + ΔW − ΔW is not W in floating point.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}  # by the parameter's name

    @property
    def active(self) -> bool:
        return bool(self.kept)

    def merge(
        self, adapters: Adapters, weights: Mapping[str, float], quantised: str | None = None
    ) -> dict[str, Rounding]:
        """Replace what the adapters change of the base. Everything is computed and checked before anything is replaced.

        A tied matrix is replaced in the one layer that is adapted, so the head and the embedding then differ.
        quantised: "dequantise" or "requantise", for compressed weights. The result is what the latter lost, by name.
        """
        if self.active:
            raise MiniloraError("an adapter is merged already: unmerge_adapter() first")
        if not weights:
            raise MiniloraError("found no adapter to merge, expected a name, or {name: weight}")
        modules = dict(adapters.network.named_modules())
        changes = _changes(adapters, weights)
        bases = {name: getattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in changes}
        check_choice(quantised, bases)
        if trained := [name for name, base in bases.items() if base.requires_grad]:
            raise MiniloraError(
                f"{trained[0]} is trained itself, and merging would replace it: merge into a model that is frozen"
            )
        names = list(changes)
        merged: dict[str, Tensor] = {}
        roundings: dict[str, Rounding] = {}

        def compute(start: int, stop: int) -> None:
            for name in names[start:stop]:
                merged[name], lost = _replaced(bases[name], changes[name], name, quantised == "requantise")
                if lost is not None:
                    roundings[name] = lost

        in_parts(compute, len(names), 1, array_module(*(base.data for base in bases.values())))
        self.kept = bases  # before the first is replaced: whatever interrupts the next lines, unmerging restores all
        for name in names:
            path, _, attribute = name.rpartition(".")
            setattr(modules[path], attribute, merged[name])
        return {name: roundings[name] for name in names if name in roundings}

    def unmerge(self, adapters: Adapters) -> None:
        """Put the original weights back, bit for bit."""
        if not self.active:
            raise MiniloraError("no adapter is merged: merge_adapter(name) comes before unmerge_adapter()")
        modules = dict(adapters.network.named_modules())
        places = [(modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in self.kept]
        for name, (module, attribute) in zip(self.kept, places, strict=True):
            if getattr(module, attribute).requires_grad:
                raise MiniloraError(
                    f"{name} was unfrozen after the merge, and unmerging would lose its training: save the model, and "
                    "load the base anew"
                )
        for tensor, (module, attribute) in zip(self.kept.values(), places, strict=True):
            setattr(module, attribute, tensor)
        self.kept = {}


Change = Callable[[Array], Array]  # from W in its computing dtype to a new array, W'


def _changes(adapters: Adapters, weights: Mapping[str, float]) -> dict[str, Change]:
    """What becomes of each parameter that the adapters change, by the parameter's name."""
    found: dict[str, Change] = {}
    for path, module in adapters.adaptable.items():
        layers = [
            (module.adapter.layers[name], weight)
            for name, weight in weights.items()
            if module.adapter and name in module.adapter.layers
        ]
        if layers:
            found[f"{path}.weight"] = partial(_with_updates, layers)
    for own in (own for name in weights for own in adapters.own[name].values()):
        found[own.parameter] = partial(_copied, own.tensor)
    return found


def _with_updates(layers: list[tuple[LoraLayer, float]], base: Array) -> Array:
    """W + Σ weight · ΔW."""
    total: Any = None
    for layer, weight in layers:
        update = layer.delta(base)
        if weight != 1:
            update *= base.dtype.type(weight)
        total = update if total is None else total.__iadd__(update)
    total += base
    return array_module(total).ascontiguousarray(total)


def _copied(own: Tensor, base: Array) -> Array:
    return own.data.astype(base.dtype)


def _replaced(base: Tensor, change: Change, name: str, requantise: bool) -> tuple[Tensor, Rounding | None]:
    """The Tensor for W' in the base's dtype or form, and what its form lost; MiniloraError if not all is finite."""
    held = base.data
    stored = held.dense() if isinstance(held, CompressedWeight) else held
    wide = cast(stored, compute_dtype(stored.dtype))
    lost = None
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
        value = change(wide)
        result: Any = cast(value, stored.dtype)
        values = cast(result, wide.dtype)
        if isinstance(held, CompressedWeight) and requantise:
            result, values, lost = compressed_again(held, value, wide)
    if not bool(array_module(values).isfinite(values).all()):
        kind = stored.dtype if lost is None else held
        raise MiniloraError(f"merging would put a non-finite value into {name} ({kind}): nothing was merged")
    return Tensor(result), lost
