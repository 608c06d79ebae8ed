"""One adapter's matrices at one layer, and the slot of a Linear that holds many of them and applies the selected ones.

Axes: B batch, T time, in and out the layer's widths, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .. import ops
from ..backend import Array, matmul, to_device
from ..nn import AdapterState, Linear
from ..tensor import Tensor
from .config import LoraConfig


@dataclass(frozen=True)
class Selection:
    """Which adapters apply: a weighted sum of some (most often one with weight 1), or one per row of the batch.

    weights: (name, weight) pairs; empty: the bare base. rows: an adapter's name or None for each row, instead of
    weights.
    dropout_pass: the number that this pass's dropout masks are drawn from; None: no dropout (evaluation).
    part: sets the masks of one part of the pass apart from another's, where a layer is called on its rows in parts.
    """

    weights: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None
    dropout_pass: int | None = None
    part: int = 0

    def at_rows(self, index: np.ndarray, part: int) -> Selection:
        """The selection for a part of the pass that is made of these rows of this batch, repeated as they come."""
        return replace(self, rows=self.rows and tuple(self.rows[row] for row in index), part=part)


class LoraLayer:
    """ΔW = scale · B A for one layer: A (r, in), B (out, r)."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float = 0.0, seed: int = 0) -> None:
        self.lora_A, self.lora_B, self.scale, self.dropout = lora_A, lora_B, scale, dropout
        self.seed = seed  # sets this adapter's dropout masks apart from other adapters' and other runs'

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def parameters(self) -> dict[str, Tensor]:
        """The Tensors by the name that PEFT's files give them after the module's path."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def delta(self, dtype: np.dtype) -> Array:
        """ΔW (out, in) in `dtype`: for merging only, training never forms it."""
        return matmul(self.lora_B.data.astype(dtype) * dtype.type(self.scale), self.lora_A.data.astype(dtype))


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
        lora_A = np.zeros((rank, in_features))
    return lora_A.astype(dtype), np.zeros((out_features, rank), dtype)


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
            return self._per_row(linear, x, selection)
        active = [(self.layers[name], weight) for name, weight in selection.weights if name in self.layers]
        if len(active) == 1 and not linear.weight.requires_grad:
            layer, weight = active[0]
            if not (layer.dropout and selection.dropout_pass is not None):
                return ops.lora_linear(
                    x, linear.weight, linear.bias, layer.lora_A, layer.lora_B, scale=layer.scale * weight
                )
        y = ops.linear(x, linear.weight, linear.bias)
        for layer, weight in active:
            y = y + self._update(layer, x, weight, selection)
        return y

    def _update(self, layer: LoraLayer, x: Tensor, weight: float, selection: Selection) -> Tensor:
        """weight · ΔW x, (..., in) -> (..., out), with the adapter's dropout on x while training."""
        if layer.dropout and selection.dropout_pass is not None:
            seed = (layer.seed, self.number, selection.dropout_pass, selection.part)
            x = ops.dropout(x, probability=layer.dropout, seed=seed)
        return ops.low_rank(x, layer.lora_A, layer.lora_B, scale=layer.scale * weight)

    def _per_row(self, linear: Linear, x: Tensor, selection: Selection) -> Tensor:
        """Each row of the batch under its own adapter: one pass over W for all, then each adapter's rows together."""
        assert selection.rows is not None
        if len(selection.rows) != x.shape[0]:
            raise ValueError(f"set_adapter(rows=...) names {len(selection.rows)} rows, and the batch has {x.shape[0]}")
        y = ops.linear(x, linear.weight, linear.bias)  # (B, T, out)
        for name in dict.fromkeys(selection.rows):
            if name in self.layers:
                mine = np.array([row for row, owner in enumerate(selection.rows) if owner == name])
                index = to_device(mine, x.device)
                update = self._update(self.layers[name], ops.select_rows(x, index=index), 1.0, selection)
                y = ops.add_rows(y, update, index=index)
        return y
