"""Logits against transformers, on tiny random checkpoints that it wrote: every switch of a config, every dtype."""

from __future__ import annotations

import json

import numpy as np
import pytest

import minilora as ml
from tests import tiny
from tests.parity.reference import reference_logits, reference_model

pytestmark = pytest.mark.parity

# At head width 8, theta 100 and a context of 32 the pairs make 5, 1.6, 0.5 and 0.16 turns: unscaled, between, scaled.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": tiny.llama(),
    "multi-head": tiny.llama(num_key_value_heads=4),
    "multi-query": tiny.llama(num_key_value_heads=1),
    "tied head": tiny.llama(tie_word_embeddings=True),
    "head_dim from the width": {key: value for key, value in tiny.llama().items() if key != "head_dim"},
    "wide heads": tiny.llama(head_dim=10),
    "rope_theta": tiny.llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "linear rope": tiny.llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama3 rope": tiny.llama(rope_parameters=LLAMA3),
    "attention_bias": tiny.llama(attention_bias=True),
    "mlp_bias": tiny.llama(mlp_bias=True),
    "eps": tiny.llama(rms_norm_eps=0.1),
    "mistral": tiny.mistral(),
    "mistral, no window": tiny.mistral(sliding_window=None),
    "mistral, defaults": tiny.without(tiny.mistral(num_attention_heads=8), "num_key_value_heads", "sliding_window"),
    "qwen2": tiny.qwen2(),
    "qwen2, tied head": tiny.qwen2(tie_word_embeddings=True),
    "qwen2, a window that is not used": tiny.qwen2(sliding_window=5, max_window_layers=0),
    "qwen2, window from a layer on": tiny.qwen2(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2, no window that is used": tiny.qwen2(use_sliding_window=True, sliding_window=None, max_window_layers=0),
    "qwen2, layer_types": tiny.qwen2(use_sliding_window=True, sliding_window=5, layer_types=tiny.SLIDING_FIRST),
    "qwen3": tiny.qwen3(),
    "qwen3, attention_bias": tiny.qwen3(attention_bias=True),
    "qwen3, head_dim left out": tiny.without(tiny.qwen3(num_attention_heads=2, num_key_value_heads=1), "head_dim"),
    "qwen3, layer_types": tiny.qwen3(use_sliding_window=True, sliding_window=5, layer_types=tiny.SLIDING_FIRST),
    "gpt2": tiny.gpt2(),
    "gpt2, a head of its own": tiny.gpt2(tie_word_embeddings=False),
    "gpt2, n_inner left out": tiny.without(tiny.gpt2(), "n_inner"),
    "gpt2, the other name of its GELU": tiny.gpt2(activation_function="gelu_pytorch_tanh"),
    "gpt2, eps": tiny.gpt2(layer_norm_epsilon=0.1),
}
TOKENS = tiny.tokens(2, 13)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_are_those_of_transformers(name, checkpoint):
    path = checkpoint(CONFIGS[name], "float32")
    expected = reference_logits(reference_model(path, "float32"), TOKENS)
    model = ml.load_model(path)
    assert model.dtype == np.float32
    assert tiny.relative_error(model.logits(TOKENS), expected) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_logits_are_those_of_transformers_in_float64(name, checkpoint, float64_transformers):
    path = checkpoint(CONFIGS[name])
    expected = reference_logits(reference_model(path), TOKENS)
    model = ml.load_model(path)
    assert model.dtype == expected.dtype == np.float64
    assert tiny.relative_error(model.logits(TOKENS), expected) < 1e-10


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("gpt2")])  # it casts nothing
def test_transformers_as_it_is_computes_a_float64_model_in_part_in_float32(name, checkpoint):
    """So the fixture is needed: without it the same comparison fails, by orders of magnitude."""
    path = checkpoint(CONFIGS[name])
    expected = reference_logits(reference_model(path), TOKENS)
    assert 1e-9 < tiny.relative_error(ml.load_model(path).logits(TOKENS), expected) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*tiny.FAMILIES, "tied head", "attention_bias", "mlp_bias"])
def test_half_precision_weights_are_computed_with_in_float32(name, dtype, checkpoint):
    path = checkpoint(CONFIGS[name], dtype)
    model = ml.load_model(path)
    assert {tensor.dtype.name for _, tensor in model.network.named_parameters()} == {dtype}
    logits = model.logits(TOKENS)
    assert logits.dtype == np.float32
    expected = reference_logits(reference_model(path, "float32"), TOKENS)
    assert tiny.relative_error(logits, expected) < 1e-5
    assert np.array_equal(ml.load_model(path, dtype="float32").logits(TOKENS), logits)


@pytest.mark.parametrize("name", ["llama", "rope_theta", "linear rope", "llama3 rope"])
def test_a_config_of_before_transformers_5_means_the_same(name, checkpoint):
    path = checkpoint(CONFIGS[name], "float32")
    logits = ml.load_model(path).logits(TOKENS)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")  # its name in the oldest ones
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    (path / "config.json").write_text(json.dumps(config))
    assert np.array_equal(ml.load_model(path).logits(TOKENS), logits)
    assert tiny.relative_error(logits, reference_logits(reference_model(path, "float32"), TOKENS)) < 1e-5


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith(("mistral", "qwen", "gpt2"))])
def test_a_config_that_leaves_out_the_rest_means_what_transformers_takes_it_for(name, checkpoint):
    """What transformers writes has every key; here both read the few that are given, defaults and all."""
    path = checkpoint(CONFIGS[name], "float32")
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    expected = reference_logits(reference_model(path, "float32"), TOKENS)
    assert tiny.relative_error(ml.load_model(path).logits(TOKENS), expected) < 1e-5


def test_positions_far_into_the_context_agree(checkpoint, float64_transformers):
    path = checkpoint(tiny.llama(max_position_embeddings=1024))
    tokens = tiny.tokens(1, 600)
    expected = reference_logits(reference_model(path), tokens)
    assert tiny.relative_error(ml.load_model(path).logits(tokens), expected) < 1e-10
