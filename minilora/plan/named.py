"""Published shapes by name, as config.json's contents: what `minilora plan` knows without a file.

Only what decides shapes is here. Sources: the config.json of each model's own page on the Hugging Face hub; Touvron et
al. 2023, table 2, for the first Llamas.
"""

from __future__ import annotations

import difflib
from typing import Any

from ..errors import MiniloraError


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, context: int, **more: Any
) -> dict[str, Any]:
    """The sizes that Llama and the families of its block have in common."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
    } | more


_TIED = {"tie_word_embeddings": True}
_MISTRAL = {"model_type": "mistral", "sliding_window": None}
_QWEN2 = {"model_type": "qwen2"}
_QWEN3 = {"model_type": "qwen3", "head_dim": 128}


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, **_TIED),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, 8192, **_TIED),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, 8192, **_TIED),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000, 2048),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, 2048),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000, 2048),
    "llama-65b": _llama(8192, 22016, 80, 64, 64, 32000, 2048),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-70b": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, 8192),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, **_TIED),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, **_TIED),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, 32768, **_MISTRAL),
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, 32768, **_QWEN2, **_TIED),
    "qwen2.5-1.5b": _llama(1536, 8960, 28, 12, 2, 151936, 32768, **_QWEN2, **_TIED),
    "qwen2.5-3b": _llama(2048, 11008, 36, 16, 2, 151936, 32768, **_QWEN2, **_TIED),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, 32768, **_QWEN2),
    "qwen2.5-14b": _llama(5120, 13824, 48, 40, 8, 152064, 32768, **_QWEN2),
    "qwen2.5-32b": _llama(5120, 27648, 64, 40, 8, 152064, 32768, **_QWEN2),
    "qwen2.5-72b": _llama(8192, 29568, 80, 64, 8, 152064, 32768, **_QWEN2),
    "qwen3-0.6b": _llama(1024, 3072, 28, 16, 8, 151936, 40960, **_QWEN3, **_TIED),
    "qwen3-1.7b": _llama(2048, 6144, 28, 16, 8, 151936, 40960, **_QWEN3, **_TIED),
    "qwen3-4b": _llama(2560, 9728, 36, 32, 8, 151936, 40960, **_QWEN3, **_TIED),
    "qwen3-8b": _llama(4096, 12288, 36, 32, 8, 151936, 40960, **_QWEN3),
    "qwen3-14b": _llama(5120, 17408, 40, 40, 8, 151936, 40960, **_QWEN3),
    "qwen3-32b": _llama(5120, 25600, 64, 64, 8, 151936, 40960, **_QWEN3),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}


def named_config(name: str) -> dict[str, Any] | None:
    """The contents of config.json of a published shape, or None; capitals do not matter."""
    return CONFIGS.get(name.lower())


def unknown(name: str) -> MiniloraError:
    """What to say of a name that is neither a path nor one of these."""
    close = difflib.get_close_matches(name.lower(), CONFIGS, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]!r}?" if close else f"names are {', '.join(CONFIGS)}"
    return MiniloraError(
        f'{name} was not found: expected a model directory, a .gguf file, "smollm2", a matrix such as 4096x4096, or a '
        f"name; {hint}"
    )
