"""Writing a model as one GGUF file that llama.cpp runs: F32, F16, BF16 or Q8_0 matrices, all metadata, the tokenizer.

Tensors are encoded by the `gguf` package one at a time while the file is written. Vectors, GPT-2's position table and
the rotary divisors stay F32; a matrix whose rows are no multiple of Q8_0's 32 values becomes F16, as llama.cpp does it.
Source: convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize

from ..backend import cast
from ..errors import MiniloraError
from ..files import atomic_write
from ..models.config import ModelConfig
from ..models.rope import inverse_frequencies
from .gguf import ROPE_FACTORS
from .gguf_names import ARCHITECTURE_OF, ARCHITECTURES, Architecture, permute_rows
from .gguf_vocabulary import tokenizer_metadata
from .tokenizer import Tokenizer

_F32 = GGMLQuantizationType.F32
DTYPES = {  # --dtype: how matrices are stored, and what general.file_type says then
    "f32": (_F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
POSITIONS = "position_embd.weight"  # GPT-2's table


def write_gguf_model(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None,
    dtype: str = "f16",
    name: str = "",
) -> float:
    """Write one GGUF file, atomically; returns the largest ‖W − W'‖ / ‖W‖ of a matrix that `dtype` has rounded to W'.

    tensors: by Hugging Face's names and in its layout, without the head where it is tied. dtype: one of DTYPES. name:
    what llama.cpp shows.
    Raises MiniloraError for a model that llama.cpp computes otherwise, a tokenizer that is missing or that it does not
    know, a value that `dtype` cannot hold, and where the disk refuses; what stood at `path` is then untouched.
    """
    if dtype not in DTYPES:
        raise MiniloraError(f"GGUF dtype {dtype!r} is not written here, expected one of {', '.join(DTYPES)}")
    if tokenizer is None:
        raise MiniloraError("the model has no tokenizer, which a GGUF carries: llama.cpp runs no model without one")
    matrices, file_type = DTYPES[dtype]
    architecture = ARCHITECTURES[ARCHITECTURE_OF[config.model_type]]
    metadata = _metadata(architecture, config) | {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
    errors = [0.0]

    def encoded(ours: str, theirs: str, type_: GGMLQuantizationType) -> np.ndarray:
        array = tensors[ours].T if architecture.transposes(ours) else tensors[ours]
        values = np.ascontiguousarray(cast(array, np.dtype(np.float32)))
        heads = architecture.permuted_heads(theirs, config.num_attention_heads, config.num_key_value_heads)
        values = values if heads is None else permute_rows(values, heads)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
            data = quantize(values, type_)
            stored = dequantize(data, type_)
        if not np.isfinite(stored).all():
            raise MiniloraError(f"{ours} has a value that {type_.name} cannot hold: choose another dtype")
        if size := float(np.linalg.norm(values)):
            errors.append(float(np.linalg.norm(values - stored)) / size)
        return data

    sources: dict[str, Source] = {}
    for ours, array in tensors.items():
        if (theirs := architecture.tensor(ours)) is None:
            raise MiniloraError(f"{ours} has no place in a {architecture.name} GGUF: llama.cpp knows no such tensor")
        shape = array.shape[::-1] if architecture.transposes(ours) else array.shape
        type_ = _type(theirs, shape, matrices)
        sources[theirs] = Source(shape, partial(encoded, ours, theirs, type_), type_)
    if (divisors := _rope_divisors(config)) is not None:
        sources[ROPE_FACTORS] = Source.of(divisors)
    write_gguf(path, architecture.name, metadata, sources)
    return max(errors)


@dataclass(frozen=True)
class Source:
    """A tensor to be written: its shape, and a function that gives its data, encoded as `type`, when it is its turn."""

    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]
    type: GGMLQuantizationType = _F32

    @classmethod
    def of(cls, array: np.ndarray) -> Source:
        """A float32 array as it is."""
        return cls(array.shape, lambda: array)


def write_gguf(path: str | Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Source]) -> None:
    """Write a GGUF file of these keys and tensors, atomically."""

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            for name, source in tensors.items():
                values, size = GGML_QUANT_SIZES[source.type]
                nbytes = math.prod(source.shape) // values * size
                writer.add_tensor_info(name, source.shape, np.dtype(np.float32), nbytes, raw_dtype=source.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for source in tensors.values():
                writer.write_tensor_data(source.data())
        finally:
            writer.close()

    atomic_write(path, write)


def window_note(config: ModelConfig) -> str | None:
    """What a user must know of a sliding window, which llama.cpp has not for these families; None without one."""
    if config.window is None or config.window >= config.max_position_embeddings:
        return None
    return (
        f"this model's queries see the last {config.window} positions only, which llama.cpp does not follow for "
        f"{config.model_type}: beyond {config.window} tokens it computes something else"
    )


# --- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """The keys that llama.cpp needs to build the network; floats are written as float32, whole numbers as uint32."""
    if architecture.name == "qwen2" and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise MiniloraError(
            f"llama.cpp's qwen2 has heads of hidden_size / heads values, here they have {config.head_dim}: it cannot "
            "be written"
        )
    if architecture.name == "qwen3" and config.attention_bias:
        raise MiniloraError("llama.cpp's qwen3 has no biases on the attention, this model has: it cannot be written")
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    if architecture.name == "gpt2":
        keys["attention.layer_norm_epsilon"] = config.norm_eps
    else:
        keys |= {
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": config.rope_theta,
        } | _rope_metadata(architecture, config)
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def _rope_kind(config: ModelConfig) -> str:
    scaling = config.rope_scaling or {}
    kind: str = scaling.get("rope_type", scaling.get("type", "default"))
    return kind


def _rope_metadata(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    kind = _rope_kind(config)
    if kind == "llama3" and architecture.name != "llama":
        raise MiniloraError(
            f'rope type "llama3" cannot be written for {architecture.name}, whose rotary divisors llama.cpp does not '
            "read: expected a default or linear one"
        )
    if kind != "linear" or config.rope_scaling is None:
        return {}
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling["factor"])}


def _rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """What llama.cpp divides each rotary frequency by, (d/2,) float32, for Llama 3's scaling; None for others."""
    if config.rope_theta is None or _rope_kind(config) != "llama3":
        return None
    plain = inverse_frequencies(config.head_dim, config.rope_theta, None)
    return (plain / inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)).astype(np.float32)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _type(name: str, shape: tuple[int, ...], matrices: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2 or name == POSITIONS:
        return _F32
    return matrices if shape[-1] % GGML_QUANT_SIZES[matrices][0] == 0 else GGMLQuantizationType.F16
