"""The transformer stack: a file per family over shared parts. `FAMILIES` says which model_type is which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import MiniloraError
from . import gpt2, llama, mistral, qwen2, qwen3
from .cache import KVCache
from .causal_lm import CausalLM
from .config import ModelConfig
from .config_file import ConfigReader


class Family(NamedTuple):
    """How to read a family's config.json, and the network that it describes."""

    read_config: Callable[[dict[str, Any]], ModelConfig]
    network: Any  # a subclass of CausalLM, built as network(config, weights, dtype)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(gpt2.read_config, gpt2.GPT2ForCausalLM),
    "llama": Family(llama.read_config, llama.LlamaForCausalLM),
    "mistral": Family(mistral.read_config, llama.LlamaForCausalLM),
    "qwen2": Family(qwen2.read_config, qwen2.Qwen2ForCausalLM),
    "qwen3": Family(qwen3.read_config, qwen3.Qwen3ForCausalLM),
}


def family_of(raw: dict[str, Any]) -> Family:
    """The Family of a config.json; MiniloraError names one that is not supported, or weights stored quantised."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MiniloraError(f"config.json has model_type {model_type!r}; supported are {', '.join(sorted(FAMILIES))}")
    ConfigReader(raw).refuse("quantization_config")
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "CausalLM", "Family", "KVCache", "ModelConfig", "family_of"]
