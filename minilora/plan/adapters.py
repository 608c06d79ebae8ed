"""An adapter on a network of shapes: the engine's own targeting, layers and copies, with shapes for their values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import MiniloraError
from ..lora import Adapters, LoraConfig
from ..lora.layer import LoraLayer
from ..lora.variants.dora import DoraLayer
from ..lora.variants.embedding import LoraEmbedding, check_plain
from ..models import CausalLM
from ..nn import Linear
from ..tensor import Tensor
from .shapes import Ledger, ShapeArray

NAME = "planned"
WIDE = np.dtype(np.float64).itemsize


def attach(network: CausalLM, lora: LoraConfig, ledger: Ledger) -> dict[str, Tensor]:
    """Put the adapter onto the network, and select it; what it holds, trained or not, by PEFT's keys, as shapes.

    Raises MiniloraError for targets that cannot be, and for PiSSA, which starts from the base's values.
    """
    if lora.init.startswith("pissa"):
        raise MiniloraError(f"a plan does not cover init = {lora.init!r}, expected kaiming or gaussian: leave it out")
    adapters = Adapters(network)
    adapters.add(NAME, lora.with_changes(init="zeros", use_dora=False))
    adapters.select(NAME)
    network.adapter_state.selection = replace(adapters.selection, dropout_pass=1)  # as in training
    if lora.use_dora:
        for path, slot in adapters.slots(NAME).items():
            layer = slot.layers[NAME]
            if isinstance(layer, LoraEmbedding):
                check_plain(lora, path)
            slot.layers[NAME] = ShapeDora(layer, ledger)
    parameters = adapters.parameters(NAME)
    for parameter in parameters.values():
        parameter.data = ShapeArray(parameter.shape, parameter.dtype)
    return parameters


class ShapeDora(DoraLayer):
    """DoRA around a plain layer's A and B, with norms that have no values."""

    def __init__(self, layer: LoraLayer, ledger: Ledger) -> None:
        vars(self).update(vars(layer))
        self.ledger, out = ledger, layer.lora_B.shape[0]
        self.magnitude = Tensor(ShapeArray((out,), layer.lora_A.dtype), requires_grad=True)

    def norm(self, linear: Linear) -> Any:
        """n (out,), and on the way to it (`DoraLayer`): A and B in float64, W Aᵀ, two more products of B's size, and W
        in A's dtype where it is held in another.
        """
        (rank, inside), outside = self.lora_A.shape, self.lora_B.shape[0]
        weight, dtype = linear.weight, self.lora_A.dtype
        widened = 0 if weight.dtype == dtype else weight.size * dtype.itemsize
        self.ledger.passing(WIDE * rank * (inside + 3 * outside) + dtype.itemsize * rank * outside + widened)
        return ShapeArray.taken(self.ledger, (outside,), dtype)
