"""Base parameters that an adapter has trained copies of: whole modules (modules_to_save), and biases (bias="all" or
"lora_only").

The copies belong to the adapter. They stand in for the base's Tensors while the adapter is the one selected, so the
base is never changed and several adapters with copies of the same parameter live side by side. (In PEFT biases are
trained in the base itself, for all adapters at once.) Switching copies nothing: a Module asks which Tensor is current.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..backend import Array, cast, to_device
from ..nn import AdapterState, Linear, Module
from ..ops import CompressedWeight
from ..tensor import Tensor
from .config import LoraConfig


class OwnParameters:
    """What adapters have in the place of one Module's parameters: by adapter, then by attribute."""

    def __init__(self, state: AdapterState) -> None:
        self.state = state
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def selected(self) -> Mapping[str, Tensor]:
        """Those of the adapter that is selected now, by attribute."""
        names = [name for name, _ in self.state.selection.weights if name in self.tensors]
        return self.tensors[names[0]] if names else {}  # one at most: several cannot be selected together

    def parameters(self) -> Iterator[Tensor]:
        yield from self.selected().values()


class Own(NamedTuple):
    """An adapter's copy of `module`'s parameter `attribute`; path: the module's name."""

    path: str
    module: Module
    attribute: str
    tensor: Tensor

    @property
    def parameter(self) -> str:
        """The base parameter's name."""
        return f"{self.path}.{self.attribute}"

    @property
    def is_turned(self) -> bool:
        """Whether files have it the other way round: GPT-2's linear weights are (in, out) there."""
        return isinstance(self.module, Linear) and self.module.conv1d and self.attribute == "weight"

    @property
    def shape_in_files(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.is_turned else self.tensor.shape

    def as_in_files(self, array: Array) -> Array:
        """The array the way that files have it, or one of theirs the way that it is here."""
        return array.T if self.is_turned else array


def copies(network: Module, config: LoraConfig, adapted: Collection[str], saved: Collection[str]) -> dict[str, Own]:
    """The parameters that an adapter needs copies of, by PEFT's key without its prefix; no array is copied yet.

    adapted: the modules with an A and a B, whose biases PEFT calls `base_layer.bias`. saved: the modules trained whole.
    """
    found: dict[str, Own] = {}
    for path, module in network.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, Tensor):
                continue
            if path in saved:
                found[f"{path}.{attribute}"] = Own(path, module, attribute, value)
            elif attribute == "bias" and (config.bias == "all" or (config.bias == "lora_only" and path in adapted)):
                key = f"{path}.base_layer.bias" if path in adapted else f"{path}.bias"
                found[key] = Own(path, module, attribute, value)
    return found


def copy_of(own: Own, value: np.ndarray | None, dtype: np.dtype, trainable: bool) -> Own:
    """The same with a Tensor of its own in `dtype`: of `value`, as files have it, or else of what the base has now."""
    base = own.tensor.data
    if value is not None:
        data = to_device(np.ascontiguousarray(own.as_in_files(value)), own.tensor.device)
    elif isinstance(base, CompressedWeight):
        data = cast(base.dense(), dtype)
    else:
        data = base.astype(dtype)  # always a copy: training writes into it
    return own._replace(tensor=Tensor(data, requires_grad=trainable))
