"""Tiny networks and batches for tests on whole models: config.json's contents by name, and tokens with labels.

Widths are all different, and none is a product of a batch's rows and length: an array's shape says what it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import minilora as ml

VOCABULARY = 61
SLIDING_FIRST = ["sliding_attention", "full_attention"]  # of two layers, the first has a window

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: Any) -> dict[str, Any]:
    """The config of a two-layer Llama with 4 query heads on 2 key-value heads, and whatever `changes` say."""
    return LLAMA | changes


def mistral(**changes: Any) -> dict[str, Any]:
    """A Mistral of the same sizes, whose queries see 5 keys."""
    return llama(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=5) | changes


def qwen2(**changes: Any) -> dict[str, Any]:
    """A Qwen2 of the same sizes: biases on q, k and v."""
    return llama(architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False) | changes


def qwen3(**changes: Any) -> dict[str, Any]:
    """A Qwen3 of the same sizes: norms on the heads of q and k."""
    return llama(architectures=["Qwen3ForCausalLM"], model_type="qwen3", use_sliding_window=False) | changes


GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "vocab_size": VOCABULARY,
    "n_embd": 24,
    "n_inner": 40,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2(**changes: Any) -> dict[str, Any]:
    """The config of a two-layer GPT-2 with 3 heads, and whatever `changes` say."""
    return GPT2 | changes


# A config of each family; the windows are shorter than the sequences that tests have.
FAMILIES = {
    "llama": llama(),
    "mistral": mistral(),
    "qwen2": qwen2(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": qwen3(),
    "gpt2": gpt2(),
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The config with these keys left out."""
    return {key: value for key, value in config.items() if key not in keys}


def model(dtype: str = "float64", seed: int = 0, **changes: Any) -> ml.Model:
    """A tiny Llama whose random weights are large enough for every part to matter."""
    return ml.new_model(llama(**changes), seed=seed, dtype=dtype, std=0.3)


def adapted(config: ml.LoraConfig | None = None, seed: int = 0, name: str = "a", **changes: Any) -> ml.Model:
    """A tiny float64 Llama with one adapter, B random too: every gradient of the adapter is non-zero."""
    network = model(**changes)
    add_random_adapter(network, name, config, seed)
    return network


def add_random_adapter(network: ml.Model, name: str, config: ml.LoraConfig | None = None, seed: int = 0) -> None:
    """Add and select an adapter with A and B normal."""
    network.add_adapter(name, config or ml.LoraConfig(r=3, alpha=6))
    random = np.random.default_rng(seed + 1000)
    for tensor in network.adapter_parameters(name).values():
        tensor.data[...] = random.normal(0, 0.3, tensor.shape)


def tokens(rows: int = 2, time: int = 7, seed: int = 0) -> np.ndarray:
    """(rows, time) token ids."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, (rows, time))


def labelled(rows: int = 2, time: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and labels of which a different number is ignored in every row."""
    ids = tokens(rows, time, seed)
    labels = ids.copy()
    for row in range(rows):
        labels[row, : 2 + row] = -100
    return ids, labels


def gradients(network: ml.Model, *batch: Any, **options: Any) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a batch, and the gradient of everything that is trained by its name (zero where none arrived)."""
    parameters = network.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    loss = network.loss(*batch, **options)
    loss.backward()
    return float(loss), {
        name: np.zeros(parameter.shape, parameter.dtype)
        if parameter.grad is None
        else ml.to_numpy(parameter.grad).copy()
        for name, parameter in parameters.items()
    }


def relative_error(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖ in the Euclidean norm (the absolute error where expected is zero)."""
    found, expected = (np.asarray(ml.to_numpy(array), np.float64) for array in (found, expected))
    assert found.shape == expected.shape
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / (scale if scale else 1.0))
