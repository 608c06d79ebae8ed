"""Low-rank evidence of an adapter, layer by layer: ΔW's singular values, its size beside W, and how far two adapters
agree.

Everything comes from the factors (lora/statistics.py). Of the base one layer at a time is read, and no network is
built: an adapter of a large model is looked at in little memory.
Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", sections 7.2 and 7.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import MiniloraError
from ..formats import mlx, peft
from ..formats.checkpoint import find_model, open_checkpoint
from ..formats.updates import Update, updates_of
from ..lora.statistics import (
    Spectrum,
    effective_rank,
    frobenius_norm,
    projected_norm,
    spectrum,
    stable_rank,
    subspace_similarity,
)
from ..models import family_of
from ..nn import Embedding, Linear
from ..plan.shapes import shape_network


@dataclass(frozen=True)
class LayerSpectrum:
    """One adapted layer. ΔW is (out, in) as its W is; an embedding's is (vocabulary, width).

    values: ΔW's singular values, largest first, as many as its rank could be. rank: how many are above rounding.
    norm ‖ΔW‖_F; base_norm ‖W‖_F and projected_norm ‖Uᵀ W V‖_F: None without a base. dora: the layer is DoRA's, and all
    of this is of s · B A, before the norms of W + s · B A are set.
    left, right: φ(i, j) between ΔW's singular directions (out and in) and those of the other adapter's, (k, l); None
    without one.
    """

    module: str
    shape: tuple[int, int]
    scale: float
    dora: bool
    values: np.ndarray
    rank: int
    effective_rank: float
    stable_rank: float
    norm: float
    base_norm: float | None = None
    projected_norm: float | None = None
    left: np.ndarray | None = None
    right: np.ndarray | None = None

    @property
    def share(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F."""
        return None if not self.base_norm else self.norm / self.base_norm

    @property
    def amplification(self) -> float | None:
        """‖ΔW‖_F / ‖Uᵀ W V‖_F: how much ΔW strengthens directions that W has little of (section 7.3)."""
        return None if not self.projected_norm else self.norm / self.projected_norm

    @property
    def chance(self) -> tuple[float, float] | None:
        """What the last entries of left and right, φ(k, l), would be for random directions: max(k, l) / width."""
        if self.left is None or self.right is None:
            return None
        return max(self.left.shape) / self.shape[0], max(self.right.shape) / self.shape[1]


def spectra(
    adapter: str | Path,
    model: str | Path | None = None,
    against: str | Path | None = None,
    watch: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = lambda title, total: nullcontext(
        lambda count: None
    ),
) -> list[LayerSpectrum]:
    """The evidence of an adapter directory (PEFT's or mlx-lm's), a LayerSpectrum for each layer in the order of blocks.

    model: its base (a directory, a GGUF file, "smollm2", a hub id), for what compares ΔW with W. against: another
    adapter, for the similarity of subspaces. watch(title, layers) is a context, such as a progress bar, whose value is
    called with 1 after each layer.
    Raises MiniloraError for files that are damaged or do not fit each other.
    """
    updates = read_updates(adapter)
    base = None if model is None else _Base(model)
    others = {} if against is None else read_updates(against)
    if others and not set(others) & set(updates):
        raise MiniloraError(f"{against} adapts no layer that {adapter} adapts: are they of one model?")
    if base is not None:
        for module, update in updates.items():
            base.check(module, _shape(update))
    for module, other in others.items():
        if module in updates and _shape(other) != _shape(updates[module]):
            raise MiniloraError(
                f"{module} is {_by(_shape(updates[module]))} in {adapter} and {_by(_shape(other))} in {against}: "
                "are they of one model?"
            )
    found = []
    with watch("layers", len(updates)) as advance:
        for module in sorted(updates, key=_layer_order):
            found.append(_evidence(module, updates[module], base, others.get(module)))
            advance(1)
    return found


def read_updates(path: str | Path) -> dict[str, Update]:
    """The low-rank updates of an adapter directory by module; what else it trained (biases, whole modules) is left out.

    Raises MiniloraError for a missing or malformed file, and for factors that do not fit each other.
    """
    path = Path(path).expanduser()
    config, tensors = (mlx if mlx.is_mlx_adapter(path) else peft).read_adapter(path)
    factors = {key: value for key, value in tensors.items() if ".lora_" in key}
    for key, lora_A in factors.items():
        for mark in (".lora_A.", ".lora_embedding_A"):
            if mark in key:
                partner = factors.get(key.replace(mark, mark.replace("A", "B")))
                if partner is None or lora_A.ndim != 2 or partner.ndim != 2 or len(lora_A) != partner.shape[1]:
                    found = "nothing" if partner is None else f"shape {partner.shape}"
                    raise MiniloraError(f"{path}: beside {key} of shape {lora_A.shape} found {found}, expected its B")
    updates = updates_of(config, factors, "minilora")
    if not updates:
        raise MiniloraError(f"{path} holds no low-rank update: expected lora_A and lora_B of some layer")
    return updates


class _Base:
    """A model on the disk whose weights are read one at a time."""

    def __init__(self, name: str | Path) -> None:
        checkpoint = open_checkpoint(find_model(name))
        self.name, family = name, family_of(checkpoint.config)
        self.tensors = family.network.by_own_names(checkpoint.tensors)
        network = shape_network(checkpoint.config)
        self.modules = {
            path: module for path, module in network.named_modules() if isinstance(module, Linear | Embedding)
        }
        self.names = {id(tensor): name for name, tensor in network.named_parameters()}  # a tied head has its table's

    def check(self, module: str, shape: tuple[int, int]) -> None:
        """MiniloraError unless the model has this layer in this shape."""
        if module not in self.modules:
            raise MiniloraError(f"{self.name} has no layer {module}, which the adapter changes: is it another model's?")
        expected = self.modules[module].weight.shape
        if shape != expected:
            raise MiniloraError(
                f"the adapter's {module} is {_by(shape)}, {self.name} has {_by(expected)} there: is it another model's?"
            )

    def weight(self, module: str) -> np.ndarray:
        """W (out, in) of a layer, read from the file now."""
        layer = self.modules[module]
        name = self.names[id(layer.weight)]
        if name not in self.tensors:
            raise MiniloraError(f"{self.name} has no tensor {name}, which its configuration calls for")
        array = self.tensors[name].array()
        return array.T if isinstance(layer, Linear) and layer.conv1d else array


def _evidence(module: str, update: Update, base: _Base | None, other: Update | None) -> LayerSpectrum:
    own = _spectrum(update)
    theirs = None if other is None else _spectrum(other)
    weight = None if base is None else base.weight(module)
    return LayerSpectrum(
        module=module,
        shape=_shape(update),
        scale=update.scale,
        dora=update.magnitude is not None,
        values=own.values,
        rank=own.rank,
        effective_rank=effective_rank(own.values),
        stable_rank=stable_rank(own.values),
        norm=float(np.linalg.norm(own.values)),
        base_norm=None if weight is None else frobenius_norm(weight),
        projected_norm=None if weight is None or not own.rank else projected_norm(weight, own),
        left=None if theirs is None else _similarity(own.left[:, : own.rank], theirs.left[:, : theirs.rank]),
        right=None if theirs is None else _similarity(own.right[:, : own.rank], theirs.right[:, : theirs.rank]),
    )


def _similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray | None:
    """φ of the directions that there are; None where an update is zero and has none."""
    return subspace_similarity(first, second) if first.size and second.size else None


def _spectrum(update: Update) -> Spectrum:
    return spectrum(*_factors(update), update.scale)


def _factors(update: Update) -> tuple[np.ndarray, np.ndarray]:
    """A and B of ΔW = s · B A in the shape of the layer's W: an embedding's table is (V, D), its ΔW = s · (B A)ᵀ."""
    return (update.lora_B.T, update.lora_A.T) if update.embedding else (update.lora_A, update.lora_B)


def _shape(update: Update) -> tuple[int, int]:
    lora_A, lora_B = _factors(update)
    return lora_B.shape[0], lora_A.shape[1]


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _layer_order(name: str) -> list[tuple[int, str]]:
    """Sorts names by the numbers in them: layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split(".")]


def by_kind(layers: Iterable[LayerSpectrum]) -> dict[str, dict[int, LayerSpectrum]]:
    """The layers by what they are ("self_attn.q_proj") and by the block that they are in (0 for what is in none)."""
    found: dict[str, dict[int, LayerSpectrum]] = {}
    for layer in layers:
        parts = layer.module.split(".")
        blocks = [int(part) for part in parts if part.isdecimal()]
        kind = ".".join(part for part in parts[-2:] if not part.isdecimal())
        found.setdefault(kind, {})[blocks[0] if blocks else 0] = layer
    return found
