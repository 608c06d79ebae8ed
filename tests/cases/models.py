"""Strategies for tests on whole models: tiny float64 networks of every kind that is supported, and adapters on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

import minilora as ml
from tests import tiny

# A config.json of each family and of each switch that changes its gradients. A test holds that no family is missing.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": tiny.llama(),
    "llama, multi-head, tied head": tiny.llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama, one key-value head, biases": tiny.llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "mistral, window of 3": tiny.mistral(sliding_window=3),
    "qwen2, window in one layer": tiny.qwen2(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": tiny.qwen3(),
    "gpt2": tiny.gpt2(),
}

TARGETS: list[str] = [  # expressions, each with the names of every family
    "all-linear",
    r".*\.(q_proj|v_proj|c_attn)",
    r".*\.(k_proj|o_proj|down_proj|c_proj)",
    r".*\.(gate_proj|up_proj|c_fc)|lm_head",
    r".*\.(embed_tokens|v_proj|wte|wpe|c_attn)",
]

architectures = st.sampled_from(sorted(ARCHITECTURES))


@st.composite
def lora_configs(draw: st.DrawFn, targets: bool = True, **fixed: Any) -> ml.LoraConfig:
    """Ranks from 1 to more than every width, scales of either sign, with and without rsLoRA, on several targets."""
    options = {
        "r": draw(st.sampled_from((1, 2, 3, 50))),
        "alpha": draw(st.sampled_from((1.0, 6.0, 16.0, -4.0))),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(st.sampled_from(TARGETS)) if targets else "all-linear",
    }
    return ml.LoraConfig(**(options | fixed))


def build(architecture: str, adapters: dict[str, ml.LoraConfig], device: str, seed: int = 0) -> ml.Model:
    """The network on the device, with these adapters, A and B normal; the first one is selected."""
    network = ml.new_model(ARCHITECTURES[architecture], seed=seed, dtype="float64", std=0.3)
    random = np.random.default_rng(seed + 1)
    for _, parameter in network.network.named_parameters():
        if parameter.ndim == 1:  # norms' weights and biases: not all ones and zeros
            parameter.data = parameter.data + random.normal(0, 0.2, parameter.shape)
    for name, config in adapters.items():
        network.add_adapter(name, config)
        size = (
            0.3 / np.sqrt(min(config.r, 8)) / max(abs(config.alpha) / config.r, 0.5)
        )  # ΔW neither lost nor all there is
        for tensor in network.adapter_parameters(name).values():
            tensor.data[...] = random.normal(0, size, tensor.shape)
    if adapters:
        network.set_adapter(next(iter(adapters)))
    return network.to(device)


def adapter_gradients(network: ml.Model, name: str, *batch: Any, **options: Any) -> dict[str, np.ndarray]:
    """The gradient of each of an adapter's tensors, from one loss; zeros where none arrived."""
    parameters = network.adapter_parameters(name)
    for parameter in parameters.values():
        parameter.grad = None
    network.loss(*batch, **options).backward()
    return {key: gradient(parameter) for key, parameter in parameters.items()}


def gradient(parameter: ml.Tensor) -> np.ndarray:
    return np.zeros(parameter.shape) if parameter.grad is None else np.array(ml.to_numpy(parameter.grad))


def worst_difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest ‖found − expected‖ of a tensor, relative to the norm of all of them together."""
    assert found.keys() == expected.keys()
    total = np.sqrt(sum((array**2).sum() for array in expected.values()))
    assert total > 0
    return max(float(np.linalg.norm(found[key] - expected[key])) for key in expected) / total
