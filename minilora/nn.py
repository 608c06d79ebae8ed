"""Layers: a Module knows its parameters by name; Linear and Embedding also have the slot that adapters are put into.

Names are those of the checkpoint (Hugging Face), because they are the attribute names:
`model.layers.0.self_attn.q_proj`. An adapter changes no name and wraps nothing: it sits in the `adapter` slot of the
layer that it adapts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, Self

import numpy as np

from . import ops
from .backend import Array
from .tensor import Tensor


class Module:
    """Something with parameters (Tensor attributes) and parts (Module attributes, or lists of Modules)."""

    adapter: Any = None  # lora.layer.AdapterSlot, of a Linear or an Embedding: called with the layer and its input
    own: Any = None  # lora.own.OwnParameters: what adapters have in the place of this Module's parameters

    def forward(self, *args: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any) -> Any:
        return self.current().forward(*args)

    def current(self) -> Self:
        """This Module, or its twin that has the selected adapter's own parameters in the place of the base's."""
        own = None if self.own is None else self.own.selected()
        if not own:
            return self
        twin = copy(self)
        vars(twin).update(own)
        return twin

    def parts(self) -> Iterator[tuple[str, Module]]:
        """The Modules right below this one, by attribute name ("layers.3" for an entry of a list)."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{index}", item) for index, item in enumerate(value) if isinstance(item, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This Module (as "") and all below it, each with its dotted name."""
        yield prefix, self
        for name, part in self.parts():
            yield from part.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The base's parameters by their checkpoint names; a tied one comes once, under its first name."""
        seen: set[int] = set()
        for module_name, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{module_name}.{name}" if module_name else name, value

    def trained(self) -> list[Tensor]:
        """Every Tensor below that is trained: unfrozen base parameters and those of the selected adapters."""
        found = [parameter for _, parameter in self.named_parameters()]
        for _, module in self.named_modules():
            for held in (module.adapter, module.own):
                found += [] if held is None else held.parameters()
        return [parameter for parameter in found if parameter.requires_grad]


class AdapterState:
    """Which adapters a network's slots apply now: one object that all slots share, so that switching touches no layer.

    `selection` is replaced whole, never changed, so a checkpointed block can be run again under the one it was run
    with.
    """

    def __init__(self) -> None:
        self.selection: Any = None  # lora.layer.Selection

    @contextmanager
    def using(self, selection: Any) -> Iterator[None]:
        """Inside, another selection holds."""
        before, self.selection = self.selection, selection
        try:
            yield
        finally:
            self.selection = before


class Weights:
    """Where a network's parameters come from while it is built: `take(name, *shape)` gives the named one as a frozen
    Tensor.

    source(full name, shape) returns the array, or raises MiniloraError. `at(part)` is the same with a longer prefix.
    """

    def __init__(self, source: Callable[[str, tuple[int, ...]], Array], prefix: str = "") -> None:
        self.source, self.prefix = source, prefix

    def at(self, part: str) -> Weights:
        return Weights(self.source, f"{self.prefix}{part}.")

    def take(self, name: str, *shape: int) -> Tensor:
        return Tensor(self.source(self.prefix + name, shape))


class Linear(Module):
    """y = x Wᵀ + b with W (out, in), plus what the adapters in the slot add.

    conv1d: the checkpoint holds W transposed, (in, out), as GPT-2's does; here W is a view of it, so (out, in) all the
    same.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, conv1d: bool = False) -> None:
        self.weight, self.bias, self.conv1d = weight, bias, conv1d

    @classmethod
    def load(
        cls, weights: Weights, out_features: int, in_features: int, bias: bool = False, conv1d: bool = False
    ) -> Linear:
        """The layer whose parameters `weights` holds as "weight" and, with bias, "bias"."""
        if conv1d:
            weight = Tensor(weights.take("weight", in_features, out_features).data.T)
        else:
            weight = weights.take("weight", out_features, in_features)
        return cls(weight, weights.take("bias", out_features) if bias else None, conv1d)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.adapter is None else self.adapter(self, x)

    def base(self, x: Tensor) -> Tensor:
        """The layer without the adapters in its slot."""
        return ops.linear(x, self.weight, self.bias)


class Embedding(Module):
    """Rows of a (V, D) table by token, in `dtype`, plus what the adapters in the slot add."""

    def __init__(self, weight: Tensor, dtype: np.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, tokens: Array) -> Tensor:
        x = Tensor(tokens)
        return self.base(x) if self.adapter is None else self.adapter(self, x)

    def base(self, tokens: Tensor) -> Tensor:
        """The layer without the adapters in its slot."""
        return ops.embedding(self.weight, tokens=tokens.data, dtype=self.dtype)


class RMSNorm(Module):
    """`ops.rms_norm` with its weight (D,)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)

    def residual(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """s = x + delta (x for None) and norm(s): in one call where there is a kernel for it."""
        weight = self.current().weight
        if ops.add_rms_norm.has_kernel_for(x, delta, weight, eps=self.eps):
            return ops.add_rms_norm(x, delta, weight, eps=self.eps)
        s = x if delta is None else x + delta
        return s, self(s)


class LayerNorm(Module):
    """`ops.layer_norm` with its weight and bias (D,)."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)

    def residual(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As RMSNorm's."""
        weight, bias = self.current().weight, self.current().bias
        if ops.add_layer_norm.has_kernel_for(x, delta, weight, bias, eps=self.eps):
            return ops.add_layer_norm(x, delta, weight, bias, eps=self.eps)
        s = x if delta is None else x + delta
        return s, self(s)
