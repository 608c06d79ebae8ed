"""The Qwen2 family (Yang et al. 2024; Qwen1.5 to 2.5): Llama's block with biases on q, k and v, and a sliding window
in some layers where the config asks for it.
"""

from __future__ import annotations

from typing import Any

from ..errors import MiniloraError
from ..nn import Weights
from .config import ModelConfig
from .config_file import ConfigReader, decoder_config
from .llama import LlamaBlock, LlamaForCausalLM
from .parts import SelfAttention

DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}  # where config.json leaves them out
FULL, SLIDING = "full_attention", "sliding_attention"


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json with model_type "qwen2"."""
    window, full_layers = windows(raw)
    return decoder_config(DEFAULTS | raw, window=window, full_layers=full_layers)


def windows(raw: dict[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """(window, the layers without it): layer_types says which layers slide, or else all from max_window_layers on do.

    There is no window at all unless use_sliding_window is true.
    """
    read = ConfigReader(raw)
    count = read.size("num_hidden_layers")
    window = read.window(4096) if read.value("use_sliding_window", bool, False) else None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = read.value("max_window_layers", int, 28)
        kinds = [SLIDING if window is not None and layer >= first else FULL for layer in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise MiniloraError(
            f"config.json has layer_types = {kinds!r:.80}, expected {count} entries, each {FULL!r} or {SLIDING!r}"
        )
    if window is None and SLIDING in kinds:
        raise MiniloraError(
            f"config.json has a layer of type {SLIDING!r} and no window: set use_sliding_window and sliding_window"
        )
    return window, tuple(layer for layer, kind in enumerate(kinds) if window is not None and kind == FULL)


class Qwen2Block(LlamaBlock):
    """Llama's block with biases on q, k and v, none on o."""

    def make_attention(self, config: ModelConfig, weights: Weights, layer: int) -> SelfAttention:
        return SelfAttention(config, weights, layer, qkv_bias=True)


class Qwen2ForCausalLM(LlamaForCausalLM):
    """The network of a Qwen2 checkpoint."""

    block = Qwen2Block
