"""The Qwen3 family (Yang et al. 2025), dense: Llama's block with an RMSNorm on each head of q and k before rotation."""

from __future__ import annotations

from typing import Any

from ..nn import Weights
from .config import ModelConfig
from .config_file import ConfigReader, decoder_config
from .llama import LlamaBlock, LlamaForCausalLM
from .parts import SelfAttention
from .qwen2 import DEFAULTS, windows


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json with model_type "qwen3"."""
    window, full_layers = windows(raw)
    bias = ConfigReader(raw).value("attention_bias", bool, False)
    known = {"head_dim": 128} | DEFAULTS | raw
    return decoder_config(known, window=window, full_layers=full_layers, attention_bias=bias)


class Qwen3Block(LlamaBlock):
    """Llama's block with q_norm and k_norm."""

    def make_attention(self, config: ModelConfig, weights: Weights, layer: int) -> SelfAttention:
        bias = config.attention_bias
        return SelfAttention(config, weights, layer, qkv_bias=bias, out_bias=bias, qk_norm=True)


class Qwen3ForCausalLM(LlamaForCausalLM):
    """The network of a Qwen3 checkpoint."""

    block = Qwen3Block
