"""What the families' blocks are made of: self-attention with rotary positions, and the gated MLP.

Axes: B batch, T time, D model width, H query heads, K key-value heads, d head width, F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import ops
from ..backend import Array
from ..nn import Linear, Module, RMSNorm, Weights
from ..tensor import Tensor
from .cache import KVCache
from .config import ModelConfig
from .together import only_added, together


@dataclass(frozen=True)
class Context:
    """What the blocks of one forward pass share: segments (B, T), the KV cache, and rotary tables (·, T, 1, d/2) where
    the family has them. value: False where nobody reads a block's result, only the gradients through it.
    """

    cos: Array | None = None
    sin: Array | None = None
    segments: Array | None = None
    cache: KVCache | None = None
    value: bool = True


class SelfAttention(Module):
    """Causal self-attention with grouped queries; q_norm and k_norm (Qwen3) normalise each head before rotation."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layer: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        hidden, width = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, width
        self.layer, self.window, self.scale = layer, config.window_of(layer), width**-0.5
        self.q_proj = Linear.load(weights.at("q_proj"), self.heads * width, hidden, qkv_bias)
        self.k_proj = Linear.load(weights.at("k_proj"), self.kv_heads * width, hidden, qkv_bias)
        self.v_proj = Linear.load(weights.at("v_proj"), self.kv_heads * width, hidden, qkv_bias)
        self.o_proj = Linear.load(weights.at("o_proj"), hidden, self.heads * width, out_bias)
        self.q_norm = RMSNorm(weights.at("q_norm").take("weight", width), config.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(weights.at("k_norm").take("weight", width), config.norm_eps) if qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.reshape(batch, time, self.heads, self.width)  # (B, T, H d) -> (B, T, H, d)
        k = k.reshape(batch, time, self.kv_heads, self.width)  # (B, T, K d) -> (B, T, K, d)
        v = v.reshape(batch, time, self.kv_heads, self.width)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = ops.rotary(q, cos=context.cos, sin=context.sin)
        k = ops.rotary(k, cos=context.cos, sin=context.sin)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        o = ops.attention(q, k, v, scale=self.scale, segments=context.segments, window=self.window)
        return self.o_proj(o.reshape(batch, time, self.heads * self.width))  # (B, T, H d) -> (B, T, D)


class GatedMLP(Module):
    """down(silu(gate(x)) · up(x)): SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, weights: Weights, *, bias: bool = False) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear.load(weights.at("gate_proj"), inner, hidden, bias)
        self.up_proj = Linear.load(weights.at("up_proj"), inner, hidden, bias)
        self.down_proj = Linear.load(weights.at("down_proj"), hidden, inner, bias)

    def forward(self, x: Tensor, value: bool = True) -> Tensor:
        """(B, T, D) -> (B, T, D). value: False in a block that only adds it to its result, which nobody reads."""
        return only_added(ops.silu_mul(*together(x, self.gate_proj, self.up_proj)), self.down_proj, value)
