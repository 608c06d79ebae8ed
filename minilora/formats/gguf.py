"""A GGUF file of the "llama" architecture read as a Hugging Face checkpoint: its config, and its tensors by HF's names.

llama.cpp stores the rows of q and k permuted within each head (it rotates neighbouring pairs of a head's values,
Hugging Face rotates the two halves); the permutation is undone here. The tokenizer is built in gguf_tokenizer.py.
Source: convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp (LlamaModel)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiniloraError
from .gguf_file import GGUFFile, GGUFTensor

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # one divisor per rotary frequency; becomes the config's rope_scaling
_LLAMA3_ORIGINAL_CONTEXTS = (8192, 4096, 2048, 16384, 32768)


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor under its Hugging Face name and shape; `heads` is set where rows were permuted within heads."""

    tensor: GGUFTensor
    heads: int | None = None

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        """The stored type: "float32", "float16", "bfloat16", or a block type such as "Q4_1"."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.nbytes

    def array(self) -> np.ndarray:
        """Plain floats as stored (a read-only view where no row moved), blocks as new float32; rows in HF's order."""
        stored = self.tensor.stored()
        if self.heads is not None:
            # (heads, half, 2, ...) -> (heads, 2, half, ...). Blocks lie within a row, so rows can move undecoded.
            by_head = stored.reshape(self.heads, -1, 2, *stored.shape[1:])
            stored = by_head.swapaxes(1, 2).reshape(stored.shape)
        return self.tensor.decode(stored)


def hugging_face_config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` that this file's model would have; raises MiniloraError for what is not a plain Llama."""
    fields = _Fields(file)
    architecture = fields.text("general.architecture")
    if architecture != "llama":
        raise MiniloraError(f'{file.path}: architecture "{architecture}" is not supported in GGUF, expected "llama"')
    if experts := fields.integer("llama.expert_count", 0):
        raise MiniloraError(f"{file.path}: a mixture of {experts} experts is not supported, expected a dense Llama")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise MiniloraError(f"{file.path}: tensor token_embd.weight is missing or no matrix; convert the model again")
    heads, width = fields.integer("llama.attention.head_count"), fields.integer("llama.embedding_length")
    kv_heads = fields.integer("llama.attention.head_count_kv", heads)
    if heads < 1 or kv_heads < 1:
        raise MiniloraError(f"{file.path}: {heads} heads and {kv_heads} key/value heads, expected at least 1 of each")
    head_dim = fields.integer("llama.attention.key_length", width // heads)
    if (value_dim := fields.integer("llama.attention.value_length", head_dim)) != head_dim:
        raise MiniloraError(
            f"{file.path}: keys of {head_dim} and values of {value_dim} per head differ, which is not supported"
        )
    if (rotated := fields.integer("llama.rope.dimension_count", head_dim)) != head_dim:
        raise MiniloraError(
            f"{file.path}: only {rotated} of {head_dim} values per head are rotated, which is not supported"
        )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": fields.integer("llama.feed_forward_length"),
        "num_hidden_layers": fields.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields.integer("llama.context_length"),
        "rms_norm_eps": fields.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    if scaling := _rope_scaling(file, fields, config):
        config["rope_scaling"] = scaling
    for key, gguf_key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if f"tokenizer.ggml.{gguf_key}_token_id" in file.metadata:
            config[key] = fields.integer(f"tokenizer.ggml.{gguf_key}_token_id")
    return config


def hugging_face_tensors(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, GGUFEntry]:
    """The file's tensors under Hugging Face's names; raises MiniloraError for one that a Llama does not have."""
    entries = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        hugging_face_name = _hugging_face_name(name)
        if hugging_face_name is None:
            raise MiniloraError(f"{file.path}: tensor {name} belongs to no Llama; this variant is not supported")
        heads = None
        if re.search(r"\.attn_[qk]\.", name):
            heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
            if tensor.shape[0] % (2 * heads):
                raise MiniloraError(
                    f"{file.path}: {tensor.shape[0]} rows of {name} do not divide into {heads} heads of even size"
                )
        entries[hugging_face_name] = GGUFEntry(tensor, heads)
    return entries


def _hugging_face_name(name: str) -> str | None:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block is None or block[2] not in _BLOCK_NAMES:
        return None
    return f"model.layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.{block[3]}"


def _rope_scaling(file: GGUFFile, fields: _Fields, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    kind = fields.text("llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in file.metadata else "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise MiniloraError(
            f'{file.path}: rotary scaling "{kind}" is not supported in GGUF, expected "linear" or Llama 3\'s'
        )
    old_key = fields.number("llama.rope.scale_linear", 1.0)  # the key of files from 2023
    return {"rope_type": "linear", "factor": fields.number("llama.rope.scaling.factor", old_key)}


def _llama3_scaling(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaling whose divisors are exactly those that the file stores.

    GGUF keeps only the divisors, so the parameters that Llama 3.1 to 3.3 were released with are tried.
    """
    tensor = file.tensors[_ROPE_FACTORS]
    stored = tensor.array().astype(np.float64)
    half, factor = config["head_dim"] // 2, float(stored.max(initial=0.0))
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)  # of each frequency, in tokens
    for original_context in _LLAMA3_ORIGINAL_CONTEXTS:
        low, high = 1.0, 4.0
        smooth = np.clip((original_context / wavelength - low) / (high - low), 0.0, 1.0)
        divisors = 1.0 / ((1.0 - smooth) / max(factor, 1.0) + smooth)
        if stored.shape == divisors.shape and np.allclose(stored, divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original_context,
            }
    raise MiniloraError(
        f"{file.path}: the rotary divisors in {_ROPE_FACTORS} are not those of Llama 3.1, which is not supported"
    )


class _Fields:
    """The metadata, with each value's type checked as it is asked for; a key without a default must be there."""

    def __init__(self, file: GGUFFile):
        self.file = file

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise MiniloraError(f"{self.file.path}: metadata {key} is {value!r}, expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < np.finfo(np.float32).max:
            raise MiniloraError(f"{self.file.path}: metadata {key} is {value!r}, expected a positive number")
        return float(str(np.float32(value)))  # 9.999999747378752e-06, the float32 in the file, was written as 1e-05

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise MiniloraError(f"{self.file.path}: metadata {key} is {value!r}, expected a text")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(key, default)
        if value is None:
            raise MiniloraError(f"{self.file.path}: metadata {key} is missing; convert the model again")
        return value
