"""All adapters on one base: adding, loading values, selecting, removing. No base weight is changed here, and none is
copied but into adapters that train it (own.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from ..backend import compute_dtype, to_device, to_numpy
from ..errors import MiniloraError
from ..models import CausalLM
from ..nn import Embedding, Linear
from ..tensor import Tensor
from .config import LoraConfig
from .layer import AdapterSlot, LoraLayer, Selection
from .own import Own, OwnParameters, copies, copy_of
from .targets import check_patterns, saved_names, target_names
from .values import PEFT_PREFIX, check_nothing_is_left, fitting
from .variants import layer_class
from .variants.embedding import LoraEmbedding


class Adapters:
    """The adapters of a network by name, and which of them are selected."""

    def __init__(self, network: CausalLM) -> None:
        self.network = network
        self.state = network.adapter_state
        self.state.selection = Selection()
        self.configs: dict[str, LoraConfig] = {}
        self.own: dict[str, dict[str, Own]] = {}  # by adapter, then by PEFT's key without its prefix
        self.linears = {name: module for name, module in network.named_modules() if isinstance(module, Linear)}
        self.adaptable = {  # what can have an A and a B: embeddings too
            name: module for name, module in network.named_modules() if isinstance(module, Linear | Embedding)
        }

    @property
    def selection(self) -> Selection:
        return self.state.selection

    def slots(self, name: str) -> dict[str, AdapterSlot]:
        """The slots that hold adapter `name`, by module name."""
        self.check(name)
        return {
            path: module.adapter
            for path, module in self.adaptable.items()
            if module.adapter and name in module.adapter.layers
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
        """Put a new adapter into the slots of the layers that `config` targets, with copies of what it trains whole.

        values: PEFT key -> array to use instead of a random start; they must fit one to one. Nothing changes on an
        error.
        """
        if not isinstance(name, str) or not name or "." in name:
            raise MiniloraError(f"an adapter's name is {name!r}, expected a text without dots")
        if name in self.configs:
            raise MiniloraError(f"there is an adapter {name!r} already: delete it first, or choose another name")
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise MiniloraError(f"seed is {seed!r}, expected a whole number of at least 0")
        modules = {path: module for path, module in self.network.named_modules() if path}
        saved = saved_names(list(modules), config.modules_to_save or ())
        embeddings = self.adaptable.keys() - self.linears.keys()
        paths = target_names(list(self.adaptable), config, embeddings, saved)
        check_patterns(paths, config.rank_pattern, "rank_pattern")
        check_patterns(paths, config.alpha_pattern, "alpha_pattern")
        dtype = compute_dtype(self.network.dtype)
        random = np.random.default_rng(seed)
        mask_seed = zlib.crc32(f"{name} {seed}".encode())
        layer_type = layer_class(config)
        layers: dict[str, LoraLayer] = {}
        for path in paths:
            module = self.adaptable[path]
            kind: type[LoraLayer] = LoraEmbedding if isinstance(module, Embedding) else layer_type
            layers[path] = layer = kind(module, config, path, dtype, random, mask_seed)  # type: ignore[arg-type]
            for part, tensor in layer.parameters().items():
                if values is not None:
                    value = fitting(values, f"{PEFT_PREFIX}{path}.{part}", tensor.shape, dtype)
                    tensor.data = to_device(value, tensor.device)
                tensor.requires_grad = tensor.requires_grad and trainable
        own = copies(self.network, config, paths, saved)
        for key, copy in own.items():
            found = None if values is None else fitting(values, PEFT_PREFIX + key, copy.shape_in_files, dtype)
            own[key] = copy_of(copy, found, dtype, trainable)
        if values is not None:
            low_rank = {f"{path}.{part}" for path, layer in layers.items() for part in layer.parameters()}
            check_nothing_is_left(values, low_rank | own.keys(), self.network)
        numbers = {path: number for number, path in enumerate(self.linears)}
        for path, layer in layers.items():
            module = self.adaptable[path]
            module.adapter = module.adapter or AdapterSlot(self.state, numbers.get(path, 0))
            module.adapter.layers[name] = layer
        for copy in own.values():
            copy.module.own = copy.module.own or OwnParameters(self.state)
            copy.module.own.tensors.setdefault(name, {})[copy.attribute] = copy.tensor
        self.configs[name], self.own[name] = config, own

    def remove(self, name: str) -> None:
        """Take adapter `name` out of all slots; a selection that names it becomes the bare base."""
        for path in self.slots(name):
            module = self.adaptable[path]
            del module.adapter.layers[name]
            if not module.adapter.layers:
                module.adapter = None
        for owner in {id(own.module): own.module for own in self.own.pop(name).values()}.values():
            del owner.own.tensors[name]
            if not owner.own.tensors:
                owner.own = None
        del self.configs[name]
        used = [used for used, _ in self.selection.weights] if self.selection.rows is None else self.selection.rows
        if name in used:
            self.state.selection = Selection()

    def select(self, which: str | Mapping[str, float] | None = None, rows: Sequence[str | None] | None = None) -> None:
        """Apply one adapter by name, a weighted sum of several (name -> weight), none, or one per row of the batch."""
        if rows is not None:
            if which is not None:
                raise MiniloraError("set_adapter takes either an adapter (or weights) or rows=[...], found both")
            if isinstance(rows, str) or not all(name is None or isinstance(name, str) for name in rows):
                raise MiniloraError(
                    f"rows is {rows!r:.80}, expected a list with an adapter's name or None for each row"
                )
            for name in rows:
                if name is not None:
                    self.check(name)
                    self._check_has_no_own(name, "selected by row")
            self.state.selection = Selection(rows=tuple(rows))
            return
        weights = self.weighted({} if which is None else which)
        self.state.selection = Selection(weights=tuple(weights.items()))

    def weighted(self, which: str | Mapping[str, float]) -> dict[str, float]:
        """{name: weight} of one adapter or a weighted sum; MiniloraError for a name or a weight that cannot be."""
        if not isinstance(which, str | Mapping):
            raise MiniloraError(f"found {which!r} for an adapter, expected its name, or {{name: weight}} for several")
        weights = {which: 1.0} if isinstance(which, str) else dict(which)
        for name, weight in weights.items():
            self.check(name)
            if not isinstance(weight, int | float | np.number) or not np.isfinite(weight):
                raise MiniloraError(f"the weight of adapter {name!r} is {weight!r}, expected a finite number")
            if len(weights) > 1 or weight != 1:
                self._check_has_no_own(name, "weighted")
        return {name: float(weight) for name, weight in weights.items()}

    def _check_has_no_own(self, name: str, how: str) -> None:
        """MiniloraError where the adapter has parameters of its own, which stand in for the base's whole or not."""
        if self.own[name]:
            raise MiniloraError(
                f"adapter {name!r} has parameters of its own ({next(iter(self.own[name]))}), which cannot be {how}: "
                "select or merge it alone, with weight 1"
            )

    def parameters(self, name: str) -> dict[str, Tensor]:
        """Adapter `name`'s Tensors by PEFT key: A and B in the order of the layers, then its copies of the base's."""
        low_rank = {
            f"{path}.{part}": tensor
            for path, layer in self.layers(name).items()
            for part, tensor in layer.parameters().items()
        }
        copied = {key: own.tensor for key, own in self.own[name].items()}
        return {PEFT_PREFIX + key: tensor for key, tensor in (low_rank | copied).items()}

    def saved(self, name: str) -> tuple[LoraConfig, dict[str, np.ndarray]]:
        """Adapter `name` as PEFT knows it: its configuration, and its arrays by PEFT key, on the host."""
        layers = self.layers(name)
        config = layer_class(self.configs[name]).saved_config(self.configs[name])
        low_rank = {f"{path}.{part}": array for path, layer in layers.items() for part, array in layer.saved().items()}
        copied = {key: own.as_in_files(own.tensor.data) for key, own in self.own[name].items()}
        return config, {PEFT_PREFIX + key: to_numpy(array) for key, array in (low_rank | copied).items()}
