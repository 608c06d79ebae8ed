"""The Llama family (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU. Llama 1 to 3,
SmolLM.

x = x + attention(norm(x));  x = x + mlp(norm(x))
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array
from ..nn import Embedding, Linear, Module, RMSNorm, Weights
from ..tensor import Tensor
from .causal_lm import CausalLM
from .config import ModelConfig
from .config_file import ConfigReader, decoder_config
from .parts import Context, GatedMLP, SelfAttention


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json with model_type "llama"."""
    read = ConfigReader(raw)
    read.refuse("pretraining_tp", 1)
    return decoder_config(
        raw, attention_bias=read.value("attention_bias", bool, False), mlp_bias=read.value("mlp_bias", bool, False)
    )


class LlamaBlock(Module):
    """One decoder block: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        self.self_attn = self.make_attention(config, weights.at("self_attn"), layer)
        self.mlp = GatedMLP(config, weights.at("mlp"), bias=config.mlp_bias)
        width, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = RMSNorm(weights.at("input_layernorm").take("weight", width), eps)
        self.post_attention_layernorm = RMSNorm(weights.at("post_attention_layernorm").take("weight", width), eps)

    def make_attention(self, config: ModelConfig, weights: Weights, layer: int) -> SelfAttention:
        """The block's attention; related families differ here."""
        return SelfAttention(config, weights, layer, qkv_bias=config.attention_bias, out_bias=config.attention_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x, normed = self.input_layernorm.residual(x)
        x, normed = self.post_attention_layernorm.residual(x, self.self_attn(normed, context))
        return x + self.mlp(normed, context.value)


class LlamaModel(Module):
    """Embedding, blocks and final norm, under the names that the checkpoint gives them."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: np.dtype, block: type[LlamaBlock]) -> None:
        self.embed_tokens = Embedding(
            weights.at("embed_tokens").take("weight", config.vocab_size, config.hidden_size), dtype
        )
        self.layers = [block(config, weights.at(f"layers.{layer}"), layer) for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm(weights.at("norm").take("weight", config.hidden_size), config.norm_eps)


class LlamaForCausalLM(CausalLM):
    """The network of a Llama checkpoint; `block` is what related families replace."""

    block: type[LlamaBlock] = LlamaBlock

    def __init__(self, config: ModelConfig, weights: Weights, dtype: np.dtype) -> None:
        super().__init__(config, dtype)
        self.model = LlamaModel(config, weights.at("model"), dtype, self.block)
        if config.tie_word_embeddings:
            self.lm_head = Linear(self.model.embed_tokens.weight)
        else:
            self.lm_head = Linear.load(weights.at("lm_head"), config.vocab_size, config.hidden_size)

    @classmethod
    def ignores(cls, name: str, config: ModelConfig) -> bool:
        return super().ignores(name, config) or name.endswith(
            "rotary_emb.inv_freq"
        )  # old checkpoints hold this constant

    def embed(self, tokens: Array, positions: Array) -> Tensor:
        return self.model.embed_tokens(tokens)

    @property
    def blocks(self) -> list[LlamaBlock]:
        return self.model.layers

    @property
    def final_norm(self) -> RMSNorm:
        return self.model.norm
