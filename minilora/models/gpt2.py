"""The GPT-2 family (Radford et al. 2019): LayerNorm, learned positions, one linear layer for q, k and v, tanh-GELU, a
tied head. Its checkpoints hold linear weights as (in, out), "Conv1D".

x = x + attention(norm(x));  x = x + mlp(norm(x))

Left out: the dropouts of its pretraining (resid_pdrop, embd_pdrop, attn_pdrop), here as in evaluation: an adapter has
its own; cross-attention; and the other scalings of attention that its config knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import ops
from ..backend import Array, array_module
from ..errors import MiniloraError
from ..nn import Embedding, LayerNorm, Linear, Module, Weights
from ..tensor import Tensor
from .causal_lm import CausalLM
from .config import ModelConfig
from .config_file import ConfigReader
from .parts import Context
from .together import only_added

PREFIX = "transformer."


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json with model_type "gpt2"."""
    read = ConfigReader(raw)
    read.refuse("activation_function", "gelu_new", "gelu_pytorch_tanh")  # two names of one function
    read.refuse("scale_attn_weights", True)
    for switch in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        read.refuse(switch, False)
    hidden, heads = read.size("n_embd", 768), read.size("n_head", 12)
    if hidden % heads:
        raise MiniloraError(f"config.json has n_embd {hidden}, which {heads} attention heads do not divide evenly")
    return ModelConfig(
        model_type=read.value("model_type", str),
        vocab_size=read.size("vocab_size", 50257),
        hidden_size=hidden,
        intermediate_size=read.size("n_inner", 4 * hidden),
        num_hidden_layers=read.size("n_layer", 12),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=read.size("n_positions", 1024),
        norm_eps=read.value("layer_norm_epsilon", float, 1e-5),
        tie_word_embeddings=read.value("tie_word_embeddings", bool, True),
        rope_theta=None,
        raw=raw,
    )


def conv1d(weights: Weights, out_features: int, in_features: int) -> Linear:
    """A linear layer with a bias whose weight the checkpoint holds as (in, out)."""
    return Linear.load(weights, out_features, in_features, bias=True, conv1d=True)


def layer_norm(weights: Weights, config: ModelConfig) -> LayerNorm:
    width = config.hidden_size
    return LayerNorm(weights.take("weight", width), weights.take("bias", width), config.norm_eps)


class GPT2Attention(Module):
    """Causal self-attention whose q, k and v are one product."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        hidden = config.hidden_size
        self.heads, self.width, self.layer = config.num_attention_heads, config.head_dim, layer
        self.c_attn = conv1d(weights.at("c_attn"), 3 * hidden, hidden)
        self.c_proj = conv1d(weights.at("c_proj"), hidden, hidden)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, time, hidden = x.shape
        qkv = self.c_attn(x).reshape(batch, time, 3, self.heads, self.width)  # (B, T, D) -> (B, T, 3, H, d)
        q, k, v = ops.unstack(qkv, axis=2)  # each (B, T, H, d)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        o = ops.attention(q, k, v, scale=self.width**-0.5, segments=context.segments)
        return self.c_proj(o.reshape(batch, time, hidden))  # (B, T, H, d) -> (B, T, D)


class GPT2MLP(Module):
    """c_proj(gelu(c_fc(x)))."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.c_fc = conv1d(weights.at("c_fc"), config.intermediate_size, config.hidden_size)
        self.c_proj = conv1d(weights.at("c_proj"), config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, value: bool = True) -> Tensor:
        return only_added(ops.gelu_tanh(self.c_fc(x)), self.c_proj, value)


class GPT2Block(Module):
    """One decoder block: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        self.ln_1 = layer_norm(weights.at("ln_1"), config)
        self.attn = GPT2Attention(config, weights.at("attn"), layer)
        self.ln_2 = layer_norm(weights.at("ln_2"), config)
        self.mlp = GPT2MLP(config, weights.at("mlp"))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x, normed = self.ln_1.residual(x)
        x, normed = self.ln_2.residual(x, self.attn(normed, context))
        return x + self.mlp(normed, context.value)


class GPT2Model(Module):
    """Token and position tables, blocks and final norm, under the names that the checkpoint gives them."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: np.dtype) -> None:
        width = config.hidden_size
        self.wte = Embedding(weights.at("wte").take("weight", config.vocab_size, width), dtype)
        self.wpe = Embedding(weights.at("wpe").take("weight", config.max_position_embeddings, width), dtype)
        self.h = [GPT2Block(config, weights.at(f"h.{layer}"), layer) for layer in range(config.num_hidden_layers)]
        self.ln_f = layer_norm(weights.at("ln_f"), config)


class GPT2ForCausalLM(CausalLM):
    """The network of a GPT-2 checkpoint."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: np.dtype) -> None:
        super().__init__(config, dtype)
        self.transformer = GPT2Model(config, weights.at("transformer"), dtype)
        if config.tie_word_embeddings:
            self.lm_head = Linear(self.transformer.wte.weight)
        else:
            self.lm_head = Linear.load(weights.at("lm_head"), config.vocab_size, config.hidden_size)

    @classmethod
    def by_own_names(cls, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """OpenAI's files name the tensors of the model without its head: "h.0.…" for "transformer.h.0.…"."""
        if any(name.startswith(PREFIX) for name in tensors):
            return dict(tensors)
        return {name if name == "lm_head.weight" else PREFIX + name: entry for name, entry in tensors.items()}

    @classmethod
    def ignores(cls, name: str, config: ModelConfig) -> bool:
        mask = re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name)  # the causal mask, not a parameter
        return super().ignores(name, config) or mask is not None

    def embed(self, tokens: Array, positions: Array) -> Tensor:
        if self.transformer.wpe.adapter is not None:
            positions = array_module(positions).broadcast_to(positions, tokens.shape)  # each row may have its own
        return self.transformer.wte(tokens) + self.transformer.wpe(positions)

    @property
    def blocks(self) -> list[GPT2Block]:
        return self.transformer.h

    @property
    def final_norm(self) -> LayerNorm:
        return self.transformer.ln_f
