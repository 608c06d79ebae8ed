"""The architectures of GGUF files that are read and written, and how their tensors are called and laid out there.

Of each family: Hugging Face's module for each of llama.cpp's tensors, which rows llama.cpp permutes, which weights it
transposes. Source: gguf-py's tensor_mapping.py and convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_LLAMA_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_BLOCK = {
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
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures, `name`, and the Hugging Face model_type and class that it is read as.

    top: {llama.cpp's tensor: module}; block: the same within block N, blk.N.… and `prefix`N.….
    permutes: llama.cpp rotates neighbouring pairs of a head's values where Hugging Face rotates the two halves, and so
    stores the rows of q and k in another order. transposed: modules whose weight Hugging Face stores as (in, out).
    """

    name: str
    model_type: str
    class_name: str
    top: Mapping[str, str]
    block: Mapping[str, str]
    prefix: str = "model.layers."
    permutes: bool = False
    transposed: frozenset[str] = frozenset()

    def module(self, name: str) -> str | None:
        """Hugging Face's name of the tensor "blk.0.attn_q.weight"; None for one that the architecture has not."""
        stem, _, part = name.rpartition(".")
        found = self.top.get(stem)
        if (inner := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and inner[2] in self.block:
            found = f"{self.prefix}{inner[1]}.{self.block[inner[2]]}"
        return f"{found}.{part}" if found and part in ("weight", "bias") else None

    def tensor(self, name: str) -> str | None:
        """GGUF's name of the tensor "model.layers.0.self_attn.q_proj.weight"; None where it has none."""
        stem, _, part = name.rpartition(".")
        number, _, inner = stem.removeprefix(self.prefix).partition(".")
        if stem.startswith(self.prefix) and number.isdecimal():
            found = next((theirs for theirs, ours in self.block.items() if ours == inner), None)
            return found and f"blk.{number}.{found}.{part}"
        found = next((theirs for theirs, ours in self.top.items() if ours == stem), None)
        return found and f"{found}.{part}"

    def permuted_heads(self, name: str, heads: int, key_heads: int) -> int | None:
        """The number of heads within each of which GGUF permutes the rows of its tensor `name`; None for no change."""
        if not self.permutes or not (found := re.search(r"\.attn_([qk])\.", name)):
            return None
        return heads if found[1] == "q" else key_heads

    def transposes(self, name: str) -> bool:
        """Whether Hugging Face stores its tensor `name` as (in, out)."""
        return name.endswith(".weight") and any(name.endswith(f".{module}.weight") for module in self.transposed)


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "llama", "LlamaForCausalLM", _LLAMA_TOP, _LLAMA_BLOCK, permutes=True),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", _LLAMA_TOP, _LLAMA_BLOCK),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", _LLAMA_TOP, _LLAMA_BLOCK | _QK_NORMS),
        Architecture(
            "gpt2",
            "gpt2",
            "GPT2LMHeadModel",
            {
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
                "output": "lm_head",
            },
            {
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            },
            prefix="transformer.h.",
            transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ),
    )
}
# The architecture that llama.cpp runs a family's models with: a Mistral is a Llama to it.
ARCHITECTURE_OF = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}


def permute_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's order of rows to GGUF's, within each head: (heads, 2, half, …) -> (heads, half, 2, …)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def restore_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """The other way round: (heads, half, 2, …) -> (heads, 2, half, …)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
