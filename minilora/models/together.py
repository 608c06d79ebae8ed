"""Layers that may run as one: those that read the same input, and those that a recomputed block can do without.

Nothing here changes a value: `together(x, *layers)` is each layer(x), `only_added(x, layer, value)` is layer(x)
where it is read, and `lay_out` moves weights in memory.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from ..backend import array_module
from ..memory import release_unused
from ..nn import Linear, Module
from ..tensor import Tensor

READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one Module, by their names


def together(x: Tensor, *layers: Linear, value: bool = True) -> tuple[Tensor, ...]:
    """Each layer's output for the same x (..., in), as layer(x): in one call where a kernel takes them together.

    value: False where nobody reads the outputs; they may be zero then, with the gradients of the real ones.
    """
    if ops.lora_linears.kernels:
        inputs: list[Any] = [x]
        scales: list[float] = []
        for layer in (layer.current() for layer in layers):
            plain = (None, None, 0.0) if layer.adapter is None else layer.adapter.plain()
            if plain is None or layer.weight.requires_grad:
                break
            inputs += [layer.weight, layer.bias, *plain[:2]]
            scales.append(plain[2])
        else:
            if ops.lora_linears.has_kernel_for(*inputs, scales=tuple(scales)):
                return ops.lora_linears(*inputs, scales=tuple(scales), value=value)
    return tuple(layer(x) for layer in layers)


def only_added(x: Tensor, layer: Linear, value: bool) -> Tensor:
    """layer(x), to be added to a block's result and nothing else. value: False where nobody reads that result, since
    the block runs again for its activations: then the product may be left out.
    """
    return layer(x) if value else together(x, layer, value=False)[0]


def lay_out(network: Module) -> None:
    """On a GPU, put the weights of layers that read the same input one under the other in memory.

    They stay arrays of their own, with the same values; a kernel can take them as one matrix.
    """
    for _, module in network.named_modules():
        for names in READ_THE_SAME:
            layers = [getattr(module, name, None) for name in names]
            weights = [layer.weight for layer in layers if isinstance(layer, Linear)]
            if len(weights) < len(names) or len({(weight.dtype, weight.shape[1]) for weight in weights}) > 1:
                continue
            if any(isinstance(weight.data, ops.CompressedWeight) or weight.trained for weight in weights):
                continue
            whole = array_module(weights[0].data).concatenate([weight.data for weight in weights])
            start = 0
            for weight in weights:
                weight.data, start = whole[start : start + len(weight)], start + len(weight)
            release_unused(weights[0].device)
