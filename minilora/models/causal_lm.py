"""The causal language model that every family is: embed, blocks, final norm, head; its loss and its logits.

A family file gives the embedding, the blocks and the names; this file has what is the same for all of them.
Axes: B batch, T time, D width, V vocabulary, M labelled positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from .. import ops
from ..backend import Array, array_module, compute_dtype
from ..execution import one_pass
from ..inputs import Batch, Labelled, labelled_positions, segment_positions
from ..nn import AdapterState, Embedding, Linear, Module
from ..tensor import Tensor, checkpoint
from .cache import KVCache
from .config import ModelConfig
from .parts import Context
from .rope import RotaryTable, inverse_frequencies


class CausalLM(Module):
    """A decoder with a language-model head. Subclasses set the parts below and give `embed`, `blocks`, `final_norm`."""

    lm_head: Linear

    def __init__(self, config: ModelConfig, dtype: np.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.adapter_state = AdapterState()
        self.checkpoint = False  # recompute each block in backward instead of keeping its activations
        self.rotary: RotaryTable | None = None
        if config.rope_theta is not None:
            frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
            self.rotary = RotaryTable(frequencies, compute_dtype(dtype))

    @abstractmethod
    def embed(self, tokens: Array, positions: Array) -> Tensor:
        """(B, T) tokens and their positions (B or 1, T) -> (B, T, D)."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Module]:
        """The decoder blocks in order, each called as block(x, context)."""

    @property
    @abstractmethod
    def final_norm(self) -> Module:
        """The norm between the last block and the head."""

    @classmethod
    def by_own_names(cls, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's tensors by the names that this network has for them, for families whose files differ."""
        return dict(tensors)

    @classmethod
    def ignores(cls, name: str, config: ModelConfig) -> bool:
        """Whether a checkpoint's tensor of this name needs no place here: a tied head, a buffer of constants."""
        return name == "lm_head.weight" and config.tie_word_embeddings

    def compute_in(self, dtype: np.dtype) -> None:
        """Let activations be of `dtype` from here on."""
        self.dtype = dtype
        for _, module in self.named_modules():
            if isinstance(module, Embedding):
                module.dtype = dtype

    @property
    def head_is_tied(self) -> bool:
        """Whether the head's matrix is the embedding's (merging an adapter of the head unties them)."""
        return "lm_head.weight" not in dict(self.named_parameters())

    @property
    def device(self) -> str:
        return self.lm_head.weight.device

    def hidden(self, tokens: np.ndarray, segments: np.ndarray | None = None, cache: KVCache | None = None) -> Tensor:
        """The last block's output, before the final norm: (B, T) NumPy tokens -> (B, T, D).

        segments (B, T): tokens attend within their own number only, and positions restart at its start. With a cache
        the tokens continue the positions that it holds, and segments has those as well: (B, held + T).
        """
        batch = self.batch(tokens, segments, begin=0 if cache is None else cache.length)
        return self.hidden_of(batch.on(self.device), cache)

    def batch(self, tokens: np.ndarray, segments: np.ndarray | None = None, begin: int = 0) -> Batch:
        """What a pass over these tokens reads, as NumPy arrays; begin: the first one's position without segments."""
        if segments is not None:
            positions = segment_positions(segments)[:, -tokens.shape[1] :]
        else:
            positions = np.arange(begin, begin + tokens.shape[1])[None]
        if self.rotary is not None:
            # As far as the shape allows, whatever the segments: a recorded step reads the same table for other values.
            self.rotary.reach(begin + tokens.shape[1] if segments is None else segments.shape[1])
        return Batch(tokens, positions, segments)

    def hidden_of(self, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """As `hidden`, of a batch on the network's device. Nothing here waits for a GPU."""
        cos, sin = (None, None) if self.rotary is None else self.rotary.at(batch.positions)
        context = Context(cos=cos, sin=sin, segments=batch.segments, cache=cache)
        with one_pass(self):
            x = self.embed(batch.tokens, batch.positions)
            for block in self.blocks:
                if self.checkpoint and cache is None:
                    run = partial(self._run_block, block, self.adapter_state.selection)
                    again = partial(run, replace(context, value=False))
                    x = checkpoint(partial(run, context), x, parameters=block.trained(), again=again)
                else:
                    x = block(x, context)
        if cache is not None:
            cache.advance(batch.tokens.shape[1])
        return x

    def _run_block(self, block: Module, selection: Any, context: Context, x: Tensor) -> Tensor:
        """A block under the adapters that were selected in the forward pass, also when backward runs it again later."""
        with self.adapter_state.using(selection):
            return block(x, context)

    def logits(
        self, tokens: np.ndarray, segments: np.ndarray | None = None, cache: KVCache | None = None, last: bool = False
    ) -> Tensor:
        """(B, T) tokens -> (B, T, V), or (B, 1, V) for the last position only."""
        x = self.hidden(tokens, segments, cache)
        return self.lm_head(self.final_norm(x[:, -1:] if last else x))

    def loss_batch(
        self,
        tokens: np.ndarray,
        targets: Mapping[str, np.ndarray],
        weights: np.ndarray,
        segments: np.ndarray | None = None,
        bucket: int = 1,
    ) -> Batch:
        """A batch with a loss on the positions whose target is not IGNORED, Σ weight · cross-entropy; weights (B, T).

        targets: those of each adapter's rows by its name where they are selected by row, else all under ""; (B, T)
        each. bucket: their number is made a multiple of it by positions of weight 0, for steps that are captured.
        """
        dtype = compute_dtype(self.dtype)
        labelled = {name: labelled_positions(own, weights, dtype, bucket) for name, own in targets.items()}
        return replace(self.batch(tokens, segments), labelled=labelled)

    def loss_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Each adapter's sum of a `loss_batch` on the network's device, by its name.

        The final norm and the head run on the labelled positions only, the head in chunks: no (M, V) array is held.
        """
        x = self.hidden_of(batch)
        x = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (B T, D)
        selection = self.adapter_state.selection
        return {
            name: self._loss_sum(x, labelled, selection.of(name) if name else selection)
            for name, labelled in batch.labelled.items()
        }

    def _loss_sum(self, x: Tensor, labelled: Labelled, selection: Any) -> Tensor:
        """The sum under one selection of adapters: x (B T, D)."""
        if labelled.places is not None:
            x = ops.select_rows(x, index=labelled.places)  # -> (M, D)
        with self.adapter_state.using(selection):
            x = self.final_norm(x)
            head = self.lm_head.current()
            if head.adapter is None and head.bias is None:
                return ops.linear_cross_entropy(x, head.weight, labels=labelled.labels, weights=labelled.weights)
            return self._loss_through_head(x, labelled.labels, labelled.weights, selection)

    def _loss_through_head(self, x: Tensor, labels: Array, weights: Array, selection: Any) -> Tensor:
        """The same sum for a head with an adapter or a bias: chunks of its logits, made again in backward."""
        chunk = max(1, ops.loss.CHUNK_ENTRIES // self.lm_head.out_features)
        total: Tensor | float = 0.0
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            piece = partial(self._loss_of_chunk, replace(selection, part=start), labels[part], weights[part])
            total = checkpoint(piece, x[part], parameters=self.lm_head.trained()) + total
        return total if isinstance(total, Tensor) else Tensor(array_module(x.data).zeros((), compute_dtype(self.dtype)))

    def _loss_of_chunk(self, selection: Any, labels: Array, weights: Array, x: Tensor) -> Tensor:
        with self.adapter_state.using(selection):
            return ops.cross_entropy(self.lm_head(x), labels=labels, weights=weights)
