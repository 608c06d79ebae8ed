"""One adapter's matrices at one layer, and the slot of a Linear that holds many of them and applies the selected ones.

Axes: B batch, T time, in and out the layer's widths, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from ..backend import Array, matmul, to_device
from ..nn import AdapterState, Linear
from ..tensor import Tensor
from .config import LoraConfig
from .rows import by_row
from .targets import pattern_value


@dataclass(frozen=True)
class Selection:
    """Which adapters apply: a weighted sum of some (most often one with weight 1), or one per row of the batch.

    weights: (name, weight) pairs; empty: the bare base. rows: an adapter's name or None for each row, instead of
    weights.
    dropout_pass: the number that this pass's dropout masks are drawn from; None: no dropout (evaluation). row_passes:
    with rows, each adapter's own number, so that its masks are those of a run of its own.
    part: sets the masks of one part of the pass apart from another's, where a layer is called on its rows in parts.
    """

    weights: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None
    dropout_pass: int | None = None
    row_passes: Mapping[str, int] | None = None
    part: int = 0

    def of(self, name: str) -> Selection:
        """The selection for those rows of the batch that are adapter `name`'s."""
        number = self.dropout_pass if self.dropout_pass is None or self.row_passes is None else self.row_passes[name]
        return Selection(((name, 1.0),), dropout_pass=number, part=self.part)


class LoraLayer:
    """ΔW = scale · B A for one layer: A (r, in), B (out, r). Plain LoRA, and the base class of every variant.

    module: the layer that is adapted, called `path` in the model. dtype: of A and B. random: draws their start.
    seed: sets this adapter's dropout masks apart from other adapters' and other runs'.
    """

    def __init__(
        self, module: Linear, config: LoraConfig, path: str, dtype: np.dtype, random: np.random.Generator, seed: int
    ) -> None:
        rank = pattern_value(path, config.rank_pattern, config.r)
        self.scale = config.scale(rank, pattern_value(path, config.alpha_pattern, config.alpha))
        self.dropout, self.seed = config.dropout, seed
        matrices = initial_matrices(config, rank, module.out_features, module.in_features, random, dtype)
        device = module.weight.device
        self.lora_A, self.lora_B = (Tensor(to_device(matrix, device), requires_grad=True) for matrix in matrices)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def parameters(self) -> dict[str, Tensor]:
        """The Tensors by the name that PEFT's files give them after the module's path."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k) with ΔW = scale · B A. MiniloraError of a variant whose ΔW is of full rank."""
        return self.lora_A, self.lora_B

    def forward(self, linear: Linear, x: Tensor, weight: float) -> Tensor:
        """x (W + weight · ΔW)ᵀ + b, (..., in) -> (..., out), where W is frozen and nothing is dropped from x."""
        lora_A, lora_B = self.factors()
        return ops.lora_linear(x, linear.weight, linear.bias, lora_A, lora_B, scale=self.scale * weight)

    def update(self, linear: Linear, x: Tensor, dropped: Tensor, weight: float) -> Tensor:
        """weight · x ΔWᵀ alone, (..., in) -> (..., out); dropped: x after the adapter's dropout, or x itself."""
        lora_A, lora_B = self.factors()
        return ops.low_rank(dropped, lora_A, lora_B, scale=self.scale * weight)

    def delta(self, base: Array) -> Array:
        """ΔW (out, in) for a base weight W (out, in), in its dtype: for merging only, training never forms it."""
        lora_A, lora_B = (factor.data.astype(base.dtype) for factor in self.factors())
        return matmul(lora_B * base.dtype.type(self.scale), lora_A)

    def constants_held(self, linear: Linear) -> AbstractContextManager[None]:
        """Inside, what backward takes for a constant is one in forward too, as finite differences need it."""
        return nullcontext()

    @staticmethod
    def saved_config(config: LoraConfig) -> LoraConfig:
        """The configuration that PEFT loads what `saved` gives with."""
        return config

    def saved(self) -> dict[str, Array]:
        """The arrays to save, by the name that PEFT's files give them after the module's path."""
        return {part: tensor.data for part, tensor in self.parameters().items()}


def initial_matrices(
    config: LoraConfig, rank: int, out_features: int, in_features: int, random: np.random.Generator, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """A (r, in) and B (out, r) before training, on the host: B is zero, so that the model starts as exactly the base.

    "kaiming": A uniform in ±1/√in, PEFT's default (kaiming_uniform, a = √5; He et al. 2015); "gaussian": A normal with
    standard deviation 1/r (Hu et al. 2021, section 4.1, with PEFT's scale).
    """
    if config.init == "kaiming":
        bound = 1 / math.sqrt(in_features)
        lora_A = random.uniform(-bound, bound, (rank, in_features))
    elif config.init == "gaussian":
        lora_A = random.normal(0.0, 1 / rank, (rank, in_features))
    else:
        lora_A = np.zeros((rank, in_features), dtype)  # not copied: until it is written to, it takes no memory
    return lora_A.astype(dtype, copy=False), np.zeros((out_features, rank), dtype)


class AdapterSlot:
    """The adapters of one Linear by name; called in the Linear's place, it applies those that the state selects."""

    def __init__(self, state: AdapterState, number: int) -> None:
        self.state, self.number = state, number  # the number sets this layer's dropout masks apart from the others'
        self.layers: dict[str, LoraLayer] = {}

    def parameters(self) -> Iterator[Tensor]:
        """The Tensors of the adapters that are selected now: the ones that a pass can give gradients to."""
        selection: Selection = self.state.selection
        names = [name for name, _ in selection.weights] if selection.rows is None else dict.fromkeys(selection.rows)
        for name in names:
            if name in self.layers:
                yield from self.layers[name].parameters().values()

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        selection: Selection = self.state.selection
        if selection.rows is not None:
            return by_row(self, linear, x, selection)
        active = [(self.layers[name], weight) for name, weight in selection.weights if name in self.layers]
        if len(active) == 1 and not linear.weight.requires_grad and not self._drops(active[0][0], selection):
            return active[0][0].forward(linear, x, active[0][1])
        y = linear.base(x)
        for layer, weight in active:
            y = y + layer.update(linear, x, self.dropped(layer, x, selection), weight)
        return y

    def plain(self) -> tuple[Tensor | None, Tensor | None, float] | None:
        """A, B and the factor on B A of all that is selected here, (None, None, 0.0) for nothing; None where it takes
        more.
        """
        selection: Selection = self.state.selection
        if selection.rows is not None:
            return None
        active = [(self.layers[name], weight) for name, weight in selection.weights if name in self.layers]
        if not active:
            return None, None, 0.0
        layer, weight = active[0]
        if len(active) > 1 or self._drops(layer, selection) or type(layer).forward is not LoraLayer.forward:
            return None
        return *layer.factors(), layer.scale * weight

    def low_rank_parts(self) -> list[tuple[Tensor, Tensor, Any]] | None:
        """A, B and the factor on B A of all that is selected here, a number or one for each row of the batch (B,); None
        where some of it is no plain product.
        """
        selection: Selection = self.state.selection
        factors: dict[str | None, Any] = dict(selection.weights)
        if selection.rows is not None:
            names = dict.fromkeys(selection.rows)
            factors = {name: np.array([own == name for own in selection.rows]) for name in names}
        parts = []
        for name, factor in factors.items():
            layer = self.layers.get(name) if name is not None else None
            if layer is None:
                continue
            kind = type(layer)
            if self._drops(layer, selection) or (kind.forward, kind.update) != (LoraLayer.forward, LoraLayer.update):
                return None
            parts.append((*layer.factors(), layer.scale * factor))
        return parts

    def _drops(self, layer: LoraLayer, selection: Selection) -> bool:
        return bool(layer.dropout) and selection.dropout_pass is not None

    def dropped(self, layer: LoraLayer, x: Tensor, selection: Selection) -> Tensor:
        """What the adapter reads of x: all of it, or while training what its dropout leaves."""
        if not self._drops(layer, selection):
            return x
        seed = (layer.seed, self.number, selection.dropout_pass, selection.part)
        return ops.dropout(x, probability=layer.dropout, seed=seed)
