"""A GGUF file read as a Hugging Face checkpoint: its config, and its tensors by HF's names and in HF's layout.

The architectures are those of gguf_names.py: llama (Mistral too), qwen2, qwen3, gpt2. The tokenizer is built in
gguf_tokenizer.py, files are written by gguf_write.py.
Source: convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiniloraError
from .gguf_file import GGUFFile, GGUFTensor
from .gguf_names import ARCHITECTURES, Architecture, restore_rows

ROPE_FACTORS = "rope_freqs.weight"  # one divisor per rotary frequency; becomes the config's rope_scaling
_LLAMA3_ORIGINAL_CONTEXTS = (8192, 4096, 2048, 16384, 32768)


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor under its Hugging Face name and shape.

    heads: set where the file permutes rows within heads. transposed: Hugging Face has it the other way, (in, out).
    """

    tensor: GGUFTensor
    heads: int | None = None
    transposed: bool = False

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

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
        values = self.tensor.decode(self.stored())
        return values.T if self.transposed else values

    def stored(self) -> np.ndarray:
        """The file's own array, blocks as bytes (out, bytes of a row), rows in HF's order: a view where none moved."""
        stored = self.tensor.stored()
        if self.heads is not None:
            stored = restore_rows(stored, self.heads)  # blocks lie within a row, so rows can move undecoded
        return stored


def architecture_of(file: GGUFFile) -> Architecture:
    """The architecture that a file names; raises MiniloraError for one that is not supported."""
    name = _Fields(file).text("general.architecture")
    if name not in ARCHITECTURES:
        raise MiniloraError(
            f'{file.path}: architecture "{name}" is not supported in GGUF, expected one of {", ".join(ARCHITECTURES)}'
        )
    return ARCHITECTURES[name]


def hugging_face_config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` that this file's model would have; raises MiniloraError for what is not supported."""
    fields = _Fields(file)
    architecture = architecture_of(file)
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise MiniloraError(f'{file.path} is of type "{kind}", not a model: give its base as the model')
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise MiniloraError(f"{file.path}: tensor token_embd.weight is missing or no matrix; convert the model again")
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config |= _gpt2_config(fields) if architecture.name == "gpt2" else _decoder_config(file, fields, architecture.name)
    for key, gguf_key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if f"tokenizer.ggml.{gguf_key}_token_id" in file.metadata:
            config[key] = fields.integer(f"tokenizer.ggml.{gguf_key}_token_id")
    return config


def _gpt2_config(fields: _Fields) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new",
        "n_embd": fields.integer("gpt2.embedding_length"),
        "n_inner": fields.integer("gpt2.feed_forward_length"),
        "n_layer": fields.integer("gpt2.block_count"),
        "n_head": fields.integer("gpt2.attention.head_count"),
        "n_positions": fields.integer("gpt2.context_length"),
        "layer_norm_epsilon": fields.number("gpt2.attention.layer_norm_epsilon"),
    }


def _decoder_config(file: GGUFFile, fields: _Fields, name: str) -> dict[str, Any]:
    """The keys that the families of Llama's block share."""
    if experts := fields.integer(f"{name}.expert_count", 0):
        raise MiniloraError(f"{file.path}: a mixture of {experts} experts is not supported, expected a dense model")
    heads, width = fields.integer(f"{name}.attention.head_count"), fields.integer(f"{name}.embedding_length")
    kv_heads = fields.integer(f"{name}.attention.head_count_kv", heads)
    if heads < 1 or kv_heads < 1:
        raise MiniloraError(f"{file.path}: {heads} heads and {kv_heads} key/value heads, expected at least 1 of each")
    head_dim = fields.integer(f"{name}.attention.key_length", width // heads)
    if (value_dim := fields.integer(f"{name}.attention.value_length", head_dim)) != head_dim:
        raise MiniloraError(
            f"{file.path}: keys of {head_dim} and values of {value_dim} per head differ, which is not supported"
        )
    if (rotated := fields.integer(f"{name}.rope.dimension_count", head_dim)) != head_dim:
        raise MiniloraError(
            f"{file.path}: only {rotated} of {head_dim} values per head are rotated, which is not supported"
        )
    config: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": fields.integer(f"{name}.feed_forward_length"),
        "num_hidden_layers": fields.integer(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields.integer(f"{name}.context_length"),
        "rms_norm_eps": fields.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number(f"{name}.rope.freq_base", 10000.0),
    }
    if name == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if name != "qwen2":  # whose q, k and v always have biases, and its o none
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if scaling := _rope_scaling(file, fields, name, config):
        config["rope_scaling"] = scaling
    return config


def hugging_face_tensors(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, GGUFEntry]:
    """The file's tensors under Hugging Face's names; raises MiniloraError for one that such a model does not have."""
    architecture = architecture_of(file)
    entries = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS:
            continue
        hugging_face_name = architecture.module(name)
        if hugging_face_name is None:
            raise MiniloraError(
                f"{file.path}: tensor {name} belongs to no {architecture.name} model; this variant is not supported"
            )
        heads = None
        if architecture.permutes:
            heads = architecture.permuted_heads(name, config["num_attention_heads"], config["num_key_value_heads"])
        if heads is not None and tensor.shape[0] % (2 * heads):
            raise MiniloraError(
                f"{file.path}: {tensor.shape[0]} rows of {name} do not divide into {heads} heads of even size"
            )
        entries[hugging_face_name] = GGUFEntry(tensor, heads, architecture.transposes(hugging_face_name))
    return entries


def _rope_scaling(file: GGUFFile, fields: _Fields, name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    old = f"{name}.rope.scale_linear"  # the key of files from 2023
    kind = fields.text(f"{name}.rope.scaling.type", "linear" if old in file.metadata else "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise MiniloraError(
            f'{file.path}: rotary scaling "{kind}" is not supported in GGUF, expected "linear" or Llama 3\'s'
        )
    factor = fields.number(f"{name}.rope.scaling.factor", fields.number(old, 1.0))
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaling whose divisors are exactly those that the file stores.

    GGUF keeps only the divisors, so the parameters that Llama 3.1 to 3.3 were released with are tried.
    """
    tensor = file.tensors[ROPE_FACTORS]
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
        f"{file.path}: the rotary divisors in {ROPE_FACTORS} are not those of Llama 3.1, which is not supported"
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
