"""All adapters on one base: adding, loading values, selecting, removing. No base weight is copied or changed here."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from ..backend import cast, compute_dtype, to_device, to_numpy
from ..errors import MiniloraError
from ..models import CausalLM
from ..nn import Linear
from ..ops import CompressedWeight
from ..tensor import Tensor
from .config import LoraConfig
from .layer import AdapterSlot, LoraLayer, Selection
from .targets import check_patterns, target_names
from .variants import layer_class

PEFT_PREFIX = "base_model.model."  # PEFT's keys are this, the module's path, a dot and the name within the layer


class Adapters:
    """The adapters of a network by name, and which of them are selected."""

    def __init__(self, network: CausalLM) -> None:
        self.network = network
        self.state = network.adapter_state
        self.state.selection = Selection()
        self.configs: dict[str, LoraConfig] = {}
        self.linears = {name: module for name, module in network.named_modules() if isinstance(module, Linear)}

    @property
    def selection(self) -> Selection:
        return self.state.selection

    def slots(self, name: str) -> dict[str, AdapterSlot]:
        """The slots that hold adapter `name`, by module name."""
        self.check(name)
        return {
            path: linear.adapter
            for path, linear in self.linears.items()
            if linear.adapter and name in linear.adapter.layers
        }

    def layers(self, name: str) -> dict[str, LoraLayer]:
        """Adapter `name`'s layers by module name."""
        return {path: slot.layers[name] for path, slot in self.slots(name).items()}

    def check(self, name: str) -> None:
        """MiniloraError if there is no adapter of this name."""
        if name not in self.configs:
            have = ", ".join(map(repr, self.configs)) or "none"
            raise MiniloraError(
                f"there is no adapter {name!r}; the model has {have}: add_adapter or load_adapter brings one"
            )

    def add(
        self,
        name: str,
        config: LoraConfig,
        seed: int = 0,
        values: Mapping[str, np.ndarray] | None = None,
        trainable: bool = True,
    ) -> None:
        """Put a new adapter into the slots of the layers that `config` targets.

        values: PEFT key -> array to use instead of a random start; they must fit one to one. Nothing changes on an
        error.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise MiniloraError(f"an adapter's name is {name!r}, expected a text without dots")
        if name in self.configs:
            raise MiniloraError(f"there is an adapter {name!r} already: delete it first, or choose another name")
        for field, plain in (("bias", "none"), ("modules_to_save", None)):
            if (asked := getattr(config, field)) and asked != plain:
                raise MiniloraError(f"LoraConfig.{field} is {asked!r}, which is not supported, expected {plain!r}")
        paths = target_names(list(self.linears), config)
        check_patterns(paths, config.rank_pattern, "rank_pattern")
        check_patterns(paths, config.alpha_pattern, "alpha_pattern")
        dtype = compute_dtype(self.network.dtype)
        random = np.random.default_rng(seed)
        mask_seed = zlib.crc32(f"{name} {seed}".encode())
        layer_type = layer_class(config)
        layers: dict[str, LoraLayer] = {}
        for path in paths:
            linear = self.linears[path]
            layers[path] = layer = layer_type(linear, config, path, dtype, random, mask_seed)
            for part, tensor in layer.parameters().items():
                if values is not None:
                    value = _fitting(values, f"{PEFT_PREFIX}{path}.{part}", tensor.shape, dtype)
                    tensor.data = to_device(value, tensor.device)
                tensor.requires_grad = tensor.requires_grad and trainable
        if values is not None:
            known = {f"{PEFT_PREFIX}{path}.{part}" for path, layer in layers.items() for part in layer.parameters()}
            extra = sorted(key for key in set(values) - known if not self._repeats_the_base(key, values[key]))
            if extra:
                raise MiniloraError(
                    f"the adapter has {len(extra)} tensors that fit no layer of this model, first {extra[0]}: "
                    "is it another model's?"
                )
        numbers = {path: number for number, path in enumerate(self.linears)}
        for path, layer in layers.items():
            linear = self.linears[path]
            linear.adapter = linear.adapter or AdapterSlot(self.state, numbers[path])
            linear.adapter.layers[name] = layer
        self.configs[name] = config

    def _repeats_the_base(self, key: str, value: np.ndarray) -> bool:
        """Whether a tensor of an adapter's file is this base's own weight, which PEFT saves beside an adapted head."""
        linear = self.linears.get(key.removeprefix(PEFT_PREFIX).removesuffix(".base_layer.weight"))
        if linear is None or isinstance(linear.weight.data, CompressedWeight) or value.shape != linear.weight.shape:
            return False
        return np.array_equal(cast(value, linear.weight.dtype), to_numpy(linear.weight))

    def remove(self, name: str) -> None:
        """Take adapter `name` out of all slots; a selection that names it becomes the bare base."""
        for path in self.slots(name):
            linear = self.linears[path]
            del linear.adapter.layers[name]
            if not linear.adapter.layers:
                linear.adapter = None
        del self.configs[name]
        used = [used for used, _ in self.selection.weights] if self.selection.rows is None else self.selection.rows
        if name in used:
            self.state.selection = Selection()

    def select(self, which: str | Mapping[str, float] | None = None, rows: Sequence[str | None] | None = None) -> None:
        """Apply one adapter by name, a weighted sum of several (name -> weight), none, or one per row of the batch."""
        if rows is not None:
            if which is not None:
                raise MiniloraError("set_adapter takes either an adapter (or weights) or rows=[...], found both")
            for name in rows:
                if name is not None:
                    self.check(name)
            self.state.selection = Selection(rows=tuple(rows))
            return
        weights = self.weighted({} if which is None else which)
        self.state.selection = Selection(weights=tuple(weights.items()))

    def weighted(self, which: str | Mapping[str, float]) -> dict[str, float]:
        """{name: weight} of one adapter or a weighted sum; MiniloraError for a name or a weight that cannot be."""
        weights = {which: 1.0} if isinstance(which, str) else dict(which)
        for name, weight in weights.items():
            self.check(name)
            if not isinstance(weight, int | float | np.number) or not np.isfinite(weight):
                raise MiniloraError(f"the weight of adapter {name!r} is {weight!r}, expected a finite number")
        return {name: float(weight) for name, weight in weights.items()}

    def parameters(self, name: str) -> dict[str, Tensor]:
        """Adapter `name`'s Tensors by PEFT key, in the order of the layers."""
        return {
            f"{PEFT_PREFIX}{path}.{part}": tensor
            for path, layer in self.layers(name).items()
            for part, tensor in layer.parameters().items()
        }

    def saved(self, name: str) -> tuple[LoraConfig, dict[str, np.ndarray]]:
        """Adapter `name` as PEFT knows it: its configuration, and its arrays by PEFT key, on the host."""
        layers = self.layers(name)
        config = layer_class(self.configs[name]).saved_config(self.configs[name])
        return config, {
            f"{PEFT_PREFIX}{path}.{part}": to_numpy(array)
            for path, layer in layers.items()
            for part, array in layer.saved().items()
        }


def _fitting(values: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if key not in values:
        raise MiniloraError(f"the adapter has no tensor {key}, which its configuration calls for")
    if values[key].shape != shape:
        raise MiniloraError(
            f"the adapter's {key} has shape {values[key].shape}, expected {shape}: is it another model's?"
        )
    return np.array(values[key], dtype)  # a copy: training writes into it
