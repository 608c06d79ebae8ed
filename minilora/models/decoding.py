"""Which networks, under which adapters, the CPU's kernel for decoding is for; and the kernel, given their arrays.

The kernel (kernels/cpu/decode.py) takes one token through the blocks without a tape and without a primitive. It is for
the blocks of llama.py and its relatives with plain arrays and plain LoRA; for everything else there is the network.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..inputs import segment_positions
from ..kernels.cpu.decode import Block, Decoder, Norm, Projection, low_rank_update, together
from ..nn import Linear, RMSNorm
from ..tensor import kernels_enabled
from .cache import KVCache
from .causal_lm import CausalLM
from .llama import LlamaBlock, LlamaForCausalLM
from .parts import GatedMLP, SelfAttention

MOST_SEQUENCES = 16  # for more, a product's rows are worth more than what is saved between products


class UnsuitableError(Exception):
    """Something of the network is not what the kernel computes."""


def decoder_for(network: CausalLM, sequences: int) -> Decoder | None:
    """The kernel for so many sequences under the adapters that are selected now; None where it is not for them."""
    if not isinstance(network, LlamaForCausalLM) or network.rotary is None or sequences > MOST_SEQUENCES:
        return None
    if not kernels_enabled() or network.device != "cpu" or network.dtype not in (np.float32, np.float64):
        return None
    try:
        blocks = [_block(block, network.dtype) for block in network.blocks]
        head = _projection(network.lm_head, network.dtype)
        return Decoder(blocks, _norm(network.final_norm, network.dtype), head, sequences)
    except UnsuitableError:
        return None


def decode(
    network: CausalLM, decoder: Decoder, tokens: np.ndarray, segments: np.ndarray | None, cache: KVCache
) -> np.ndarray:
    """The logits (B, V) after one more token (B, 1) of each sequence; segments as in `CausalLM.hidden`."""
    positions = np.array([[cache.length]]) if segments is None else segment_positions(segments)[:, -1:]
    assert network.rotary is not None
    network.rotary.reach(int(positions.max()) + 1)
    cos, sin = network.rotary.at(positions)
    x = network.embed(tokens, positions).data[:, 0].copy()
    hidden = None
    if segments is not None:
        hidden = np.where(segments == segments[:, -1:], 0, -np.inf).astype(x.dtype)
    logits = decoder.step(x, cos[:, 0, 0], sin[:, 0, 0], *cache.arrays(), cache.length, hidden)
    cache.advance(1)
    return logits


def _block(block: Any, dtype: np.dtype) -> Block:
    if type(block).forward is not LlamaBlock.forward:
        raise UnsuitableError
    attention, mlp = block.self_attn.current(), block.mlp.current()
    if type(attention) is not SelfAttention or type(mlp) is not GatedMLP:
        raise UnsuitableError
    q_norm, k_norm = (None if norm is None else _norm(norm, dtype) for norm in (attention.q_norm, attention.k_norm))
    q, k, v, o, gate, up, down = (
        _projection(layer, dtype)
        for layer in (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
    )
    return Block(
        *(_norm(block.input_layernorm, dtype), together([q, k, v]), q_norm, k_norm, o),
        *(_norm(block.post_attention_layernorm, dtype), together([gate, up]), down),
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        width=attention.width,
        scale=attention.scale,
        window=attention.window,
    )


def _norm(norm: Any, dtype: np.dtype) -> Norm:
    norm = norm.current()
    if type(norm) is not RMSNorm:
        raise UnsuitableError
    return Norm(_array(norm.weight.data, dtype), norm.eps)


def _projection(layer: Linear, dtype: np.dtype) -> Projection:
    layer = layer.current()
    if type(layer) is not Linear:
        raise UnsuitableError
    weight = _array(layer.weight.data, dtype)
    bias = None if layer.bias is None else _array(layer.bias.data, dtype)
    parts = [] if layer.adapter is None else layer.adapter.low_rank_parts()
    if parts is None:
        raise UnsuitableError
    terms = [(_array(A.data, dtype), _array(B.data, dtype), _factor(factor, dtype)) for A, B, factor in parts]
    return Projection((weight,), bias, low_rank_update(terms) if terms else None)


def _factor(factor: Any, dtype: np.dtype) -> Any:
    """A number as it is, a number for each sequence (B,) as (B, 1)."""
    return factor if isinstance(factor, float) else factor.astype(dtype)[:, None]


def _array(array: Any, dtype: np.dtype) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise UnsuitableError
    return array
