"""llama.cpp, in this process (the package xllamacpp): load a GGUF model, with adapters, and ask for probabilities.

Importing this skips the test module where xllamacpp is not installed. It computes on one thread, with a float32 KV
cache and without flash attention, so that what differs from here is the arithmetic of its matrices alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilora as ml

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install 'minilora[parity]')")

FORCED = (
    1000.0  # added to a logit when it is sampled: that token is the one chosen; what is reported is the logit itself
)


def parameters(model: Path, adapters: Sequence[Path] = (), context: int = 512) -> Any:
    """llama-server's settings: those of `llama-server -m MODEL --lora ADAPTER -c CONTEXT`, and what is said above."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.lora_adapters = [_adapter(path) for path in adapters]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context, 1, 0
    settings.warmup = settings.fit_params = False
    settings.verbosity = 1  # errors only
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return settings


def _adapter(path: Path) -> Any:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(path), 1.0
    return adapter


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, model: Path, adapters: Sequence[Path] = (), context: int = 512) -> None:
        self.server = xllamacpp.Server(parameters(model, adapters, context))

    def complete(self, prompt: str | Sequence[int], count: int, **options: Any) -> dict[str, Any]:
        """Its answer to a completion request (greedy), in OpenAI's format: the first choice."""
        tokens = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
        request = {"prompt": tokens, "n_predict": count, "temperature": 0.0} | options
        choice: dict[str, Any] = self.server.handle_completions(request)["choices"][0]
        return choice

    def log_probabilities(self, tokens: Sequence[int], printable: int) -> np.ndarray:
        """ln p of every token of the vocabulary behind `tokens`, (V,).

        printable: a token whose text is whole characters: it is the one sampled, for where the text of a token is not
        whole, no probabilities come with it.
        """
        choice = self.complete(tokens, 1, n_probs=10**6, logit_bias=[[printable, FORCED]])
        found = {entry["id"]: entry["logprob"] for entry in choice["logprobs"]["content"][0]["top_logprobs"]}
        return np.array([found[number] for number in range(len(found))])

    def token_log_probabilities(self, tokens: Sequence[int]) -> np.ndarray:
        """ln p of each token but the first, given those before it: (T,) -> (T − 1,)."""
        values = []
        for position in range(1, len(tokens)):
            bias = [[int(tokens[position]), FORCED]]
            choice = self.complete(tokens[:position], 1, n_probs=1, logit_bias=bias, cache_prompt=True)
            entry = choice["logprobs"]["content"][0]
            assert entry["id"] == tokens[position]
            values.append(entry["logprob"])
        return np.array(values)

    def text(self, prompt: str | Sequence[int], count: int) -> str:
        """The greedy continuation."""
        text: str = self.complete(prompt, count)["text"]
        return text


def log_probabilities(model: ml.Model, tokens: Sequence[int]) -> np.ndarray:
    """The same here, at every position: (T,) -> (T, V)."""
    logits = ml.to_numpy(model.logits(np.array([tokens])))[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def token_log_probabilities(model: ml.Model, tokens: Sequence[int]) -> np.ndarray:
    """ln p of each token but the first, given those before it: (T,) -> (T − 1,)."""
    return log_probabilities(model, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
