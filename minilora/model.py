"""The facade that users hold: `Model`, whose methods call the network, lora, formats and generate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import Array, activation_dtype, cast, compute_dtype, to_device, to_numpy, use_device
from .errors import MiniloraError
from .inputs import IGNORED, Batch, Checked, checked, loss_weights, owned_labels
from .lora import Adapters, Combination, LoraConfig, Merge, Rounding, combine
from .lora.targets import selected, shortest_patterns
from .models import CausalLM, ModelConfig
from .models.together import lay_out
from .nn import Linear
from .ops import CompressedWeight
from .tensor import Tensor, is_recording, no_grad

if TYPE_CHECKING:
    from .formats.tokenizer import Tokenizer


class Model:
    """A network with its tokenizer and its adapters.

    network: the layers (models/). tokenizer: None where the checkpoint has none. source: what it was loaded from, as it
    was named.
    checkpoint: set it to True to recompute each block in backward instead of keeping its activations.
    """

    def __init__(
        self,
        network: CausalLM,
        tokenizer: Tokenizer | None,
        generation_config: dict[str, Any] | None = None,
        source: str = "",
    ) -> None:
        self.network, self.tokenizer, self.source = network, tokenizer, source
        self.generation_config = generation_config or {}
        if network.device != "cpu":
            lay_out(network)
        self._adapters = Adapters(network)
        self._merge = Merge()
        self.changes = 0  # how often tensors were added, replaced or moved
        self._training_passes: Counter[str] = Counter()  # passes with gradients so far, by adapter

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:N"."""
        return self.network.device

    @property
    def dtype(self) -> np.dtype:
        """The dtype of activations: float32, float64 for a float64 model, bfloat16 for a bfloat16 one on a GPU."""
        return self.network.dtype

    @property
    def checkpoint(self) -> bool:
        return self.network.checkpoint

    @checkpoint.setter
    def checkpoint(self, value: bool) -> None:
        self.network.checkpoint = value

    @property
    def training_pass(self) -> int:
        """How many passes with gradients the selected adapters have had: what dropout masks are drawn from.

        Setting it (as a resumed run does) sets it for all of them.
        """
        return max((self._training_passes[name] for name in self.active_adapters), default=0)

    @training_pass.setter
    def training_pass(self, number: int) -> None:
        for name in self.active_adapters:
            self._training_passes[name] = number

    def to(self, device: str) -> Model:
        """Move all weights and adapters to the device, in place; returns the model."""
        use_device(device)
        if any(isinstance(tensor.data, CompressedWeight) for tensor in self._all_tensors()):
            raise MiniloraError(
                "a model with compressed weights stays on the device that it was loaded to: load it there"
            )
        self.changes += 1
        for tensor in self._all_tensors():
            tensor.data = to_device(tensor.data, device)
            tensor.grad = None
        self.network.compute_in(activation_dtype(self.network.lm_head.weight.dtype, device))
        if self.device != "cpu":
            lay_out(self.network)
        return self

    def _all_tensors(self) -> Iterator[Tensor]:
        yield from (parameter for _, parameter in self.network.named_parameters())
        yield from self._merge.kept.values()
        for name in self._adapters.configs:
            yield from self._adapters.parameters(name).values()

    # --- what the model computes ------------------------------------------------------------------------------------

    def logits(self, tokens: Any, segments: Any = None) -> Array:
        """Next-token logits under the selected adapters: (B, T) tokens -> (B, T, V) array on the model's device."""
        tokens, _, segments = self._checked(tokens, None, segments)
        self._set_dropout(False)
        with no_grad():
            return self.network.logits(tokens, segments).data

    def loss(
        self,
        tokens: Any,
        labels: Any = None,
        segments: Any = None,
        normaliser: float | Mapping[str, float] | None = None,
    ) -> Tensor:
        """Σ cross-entropy of the label tokens / normaliser, a scalar Tensor; dropout is on where gradients are
        recorded.

        tokens, labels (B, T): labels default to the tokens, -100 is ignored, and they are shifted inside (position t
        predicts label t + 1), as Hugging Face does. segments (B, T): 0 is padding; tokens attend within their segment
        only, positions restart at its start, and its first token is predicted by nobody. normaliser: this batch's count
        of label tokens if left out; accumulation passes the count over all micro-batches.
        With set_adapter(rows=...) each adapter's sum is divided by its own count (normaliser: a dict by adapter name)
        and rows of the bare base are left out. Raises MiniloraError for a batch without a label.
        """
        first, *others = self.losses(tokens, labels, segments, normaliser).values()
        return reduce(add, others, first)

    def losses(
        self,
        tokens: Any,
        labels: Any = None,
        segments: Any = None,
        normaliser: float | Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """The terms of `loss`: with set_adapter(rows=...) each adapter's own by its name, else one under "".

        An adapter without a label in this batch has none. Backward goes through their sum, once.
        """
        return self.losses_of(self.loss_batch(tokens, labels, segments, normaliser).on(self.device))

    def loss_batch(
        self,
        tokens: Any,
        labels: Any = None,
        segments: Any = None,
        normaliser: float | Mapping[str, float] | None = None,
        bucket: int = 1,
    ) -> Batch:
        """What `losses` reads, checked and on the host. bucket: see `CausalLM.loss_batch`."""
        tokens, targets, segments = self._checked(tokens, labels, segments)
        owned = owned_labels(targets, self._adapters.selection.rows)
        weights = loss_weights(owned, targets.shape, normaliser)
        own_targets = {name: np.where(mine, targets, IGNORED) for name, mine in owned.items()}
        return self.network.loss_batch(tokens, own_targets, weights, segments, bucket)

    def losses_of(self, batch: Batch) -> dict[str, Tensor]:
        """`losses` of a batch on the model's device. Nothing here waits for a GPU."""
        self._set_dropout(is_recording(), batch.labelled)
        return self.network.loss_sums(batch)

    def label_count(self, tokens: Any, labels: Any = None, segments: Any = None) -> int | Counter[str]:
        """How many positions of this batch carry a loss; with set_adapter(rows=...), how many by adapter."""
        rows = self._adapters.selection.rows
        owned = owned_labels(self._checked(tokens, labels, segments).targets, rows)
        counts = {name: int(mine.sum()) for name, mine in owned.items()}
        return counts.get("", 0) if rows is None else Counter(counts)

    def _checked(self, tokens: Any, labels: Any, segments: Any) -> Checked:
        """What was given for a pass, checked against this model's sizes and the selected adapters."""
        rows, config = self._adapters.selection.rows, self.config
        sizes = {"context": config.max_position_embeddings, "vocabulary": config.vocab_size}
        return checked(tokens, labels, segments, rows=rows, **sizes)

    def _set_dropout(self, training: bool, labelled: Iterable[str] = ()) -> None:
        """Let the next pass draw dropout masks, or none. labelled: with rows, the adapters with a label in the batch.

        Only their counts move on, so that each draws the masks that it would draw in a run of its own.
        """
        selection = self._adapters.selection
        if training and selection.rows is not None:
            self._training_passes.update(list(labelled))
        elif training:
            self.training_pass += 1
        self._adapters.state.selection = replace(
            selection,
            dropout_pass=self.training_pass if training else None,
            row_passes=None if selection.rows is None else self._training_passes.copy(),
        )

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> Any:
        """Continue a prompt: text or chat messages give text, ids give a list of new ids. See `minilora.generate`."""
        from .generate import generate

        return generate(self, prompt, max_new_tokens, **options)

    # --- adapters ---------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, LoraConfig]:
        """The adapters on this base by name, with their configurations."""
        return dict(self._adapters.configs)

    @property
    def active_adapters(self) -> dict[str, float]:
        """The selected adapters and their weights ({} for the bare base; with rows, weight 1 for each in use)."""
        selection = self._adapters.selection
        if selection.rows is not None:
            return {name: 1.0 for name in dict.fromkeys(selection.rows) if name is not None}
        return dict(selection.weights)

    def add_adapter(self, name: str, config: LoraConfig | None = None, seed: int = 0) -> None:
        """Add a new adapter and select it. With B = 0 at the start the outputs stay exactly those of the base."""
        self._must_not_be_merged("add an adapter")
        self.changes += 1
        self._adapters.add(name, config or LoraConfig(), seed)
        self._adapters.select(name)

    def load_adapter(self, name: str, path: str | Path, trainable: bool = True) -> None:
        """Load a PEFT or an mlx-lm directory, or a GGUF adapter, as adapter `name` and select it.

        Its keys and shapes must fit this model one to one.
        """
        from .formats.adapter import read_adapter

        self._must_not_be_merged("load an adapter")
        config, values = read_adapter(path, self.config, self.network.head_is_tied)
        self.changes += 1
        self._adapters.add(name, config, values=values, trainable=trainable)
        self._adapters.select(name)

    def save_adapter(self, name: str, path: str | Path) -> None:
        """Write adapter `name` as a PEFT directory: adapter_config.json and adapter_model.safetensors."""
        from .formats.peft import write_adapter

        layers = self._adapters.layers(name)
        config, values = self.saved_adapter(name)
        write_adapter(
            Path(path),
            config,
            values,
            base_model=self.source,
            module_names=shortest_patterns(
                list(layers), list(self._adapters.adaptable), by_layer=config.layers_to_transform is not None
            ),
            fan_in_fan_out=any(getattr(self._adapters.adaptable[layer], "conv1d", False) for layer in layers),
        )

    def saved_adapter(self, name: str) -> tuple[LoraConfig, dict[str, np.ndarray]]:
        """What `save_adapter` writes: the configuration that PEFT is told, and the arrays by PEFT key, on the host.

        It is another one than `adapters[name]` where PEFT does not know the variant: PiSSA is plain LoRA of twice the
        rank.
        """
        return self._adapters.saved(name)

    def set_adapter(
        self, which: str | Mapping[str, float] | None = None, rows: Sequence[str | None] | None = None
    ) -> None:
        """Select one adapter by name, an exact weighted sum (name -> weight), none (None), or one per row."""
        if which is not None or rows is not None:
            self._must_not_be_merged("select an adapter")
        self._adapters.select(which, rows)

    def delete_adapter(self, name: str) -> None:
        """Remove adapter `name`; if it was selected, the bare base is."""
        self.changes += 1
        self._adapters.remove(name)
        self._training_passes.pop(name, None)

    def adapter_parameters(self, name: str) -> dict[str, Tensor]:
        """Adapter `name`'s Tensors by PEFT key."""
        return self._adapters.parameters(name)

    def combine_adapters(
        self, name: str, weights: Mapping[str, float], combination: str = "cat", rank: int | None = None
    ) -> Combination:
        """Add the adapter `name` that is the weighted sum of others' ΔW, and select it; what it lost.

        combination: "cat" is exact, its rank the sum of the others'; "svd" is the nearest of `rank` (by default the
        largest of theirs). Weights may be negative. As PEFT's `add_weighted_adapter`.
        """
        self._must_not_be_merged("add an adapter")
        report = combine(self._adapters, name, weights, combination, rank)
        self._adapters.select(name)
        return report

    def merge_adapter(self, which: str | Mapping[str, float], quantised: str | None = None) -> dict[str, Rounding]:
        """Put the adapter's ΔW (or a weighted sum of several) into the base's weights; then no adapter is selected.

        quantised: what merging makes of weights that are held quantised, "dequantise" (float32, exact) or "requantise"
        (quantised again); the result says what the latter lost, by parameter: relative error, and size of the update.
        Raises MiniloraError, with nothing changed, where a weight is quantised and no choice was made, and where a
        value would not be finite.
        """
        self.changes += 1
        roundings = self._merge.merge(self._adapters, self._adapters.weighted(which), quantised)
        self._adapters.select(None)
        return roundings

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, bit for bit."""
        self.changes += 1
        self._merge.unmerge(self._adapters)

    def _must_not_be_merged(self, action: str) -> None:
        if self._merge.active:
            raise MiniloraError(f"cannot {action} while the base holds a merged adapter: unmerge_adapter() first")

    # --- the base's own parameters ----------------------------------------------------------------------------------

    def unfreeze(self, pattern: str | Sequence[str]) -> list[str]:
        """Train the base parameters that `pattern` matches (a list by suffix, a string by full regular expression);
        their names.

        They become writable copies in float32 (float64 in a float64 model). A pattern without a match is a
        MiniloraError.
        """
        names = dict(self.network.named_parameters())
        chosen = selected(list(names), pattern, "unfreeze", "parameter")
        for name in chosen:
            if isinstance(names[name].data, CompressedWeight):
                raise MiniloraError(
                    f"{name} is stored compressed and cannot be trained: load the model with dtype='float32'"
                )
        self.changes += 1
        for name in chosen:
            parameter = names[name]
            parameter.data = cast(parameter.data, compute_dtype(self.dtype)).copy()
            parameter.requires_grad = True
        return chosen

    def parameters(self) -> dict[str, Tensor]:
        """Everything that training would change now: unfrozen base parameters by name, the selected adapters' by PEFT
        key.

        With several adapters selected their keys carry the adapter's name, as in PEFT's memory.
        """
        found = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        active = list(self.active_adapters)
        for adapter in active:
            for key, tensor in self._adapters.parameters(adapter).items():
                if tensor.requires_grad:
                    found[key if len(active) == 1 else _key_in_memory(key, adapter)] = tensor
        return found

    def save(self, path: str | Path) -> None:
        """Write the base, merged or not, as a Hugging Face directory with its tokenizer (adapters: save_adapter)."""
        from .formats.checkpoint import save_checkpoint

        config = dict(self.config.raw) | {"tie_word_embeddings": self.network.head_is_tied}
        save_checkpoint(Path(path), config, self._checkpoint_tensors(), self.tokenizer, self.generation_config)

    def save_gguf(self, path: str | Path, dtype: str = "f16") -> float:
        """Write the base, merged or not, with its tokenizer as one GGUF file for llama.cpp; matrices "f32", "f16",
        "bf16" or "q8_0".

        Returns how far rounding moved a matrix at most, ‖W − W'‖ / ‖W‖.
        """
        from .formats.gguf_write import write_gguf_model

        tensors, name = self._checkpoint_tensors(), Path(self.source).name
        return write_gguf_model(path, self.config, tensors, self.tokenizer, dtype, name)

    def _checkpoint_tensors(self) -> dict[str, np.ndarray]:
        """The base's parameters by Hugging Face's names and in its layout, on the host; a tied head is left out."""
        tensors: dict[str, np.ndarray] = {}
        modules = dict(self.network.named_modules())
        for name, parameter in self.network.named_parameters():
            data = parameter.data.dense() if isinstance(parameter.data, CompressedWeight) else parameter.data
            owner = modules[name.rpartition(".")[0]]
            transposed = isinstance(owner, Linear) and owner.conv1d and name.endswith(".weight")
            tensors[name] = to_numpy(data.T if transposed else data)
        return tensors


def _key_in_memory(key: str, adapter: str) -> str:
    """A key of PEFT's files as its models call it: `lora_A.NAME.weight`, but `lora_embedding_A.NAME`."""
    stem, _, last = key.rpartition(".")
    return f"{key}.{adapter}" if last.startswith("lora_") else f"{stem}.{adapter}.{last}"
