"""config.json as it is read: both generations of its names, defaults, an error for each thing that cannot be had."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minilora.errors import MiniloraError
from minilora.models import family_of
from minilora.models.rope import RotaryTable, inverse_frequencies
from tests import tiny


def read(**changes):
    """The ModelConfig of a tiny Llama's config with `changes`; None leaves a key out."""
    raw = {key: value for key, value in tiny.llama(**changes).items() if value is not None}
    return family_of(raw).read_config(raw)


def test_sizes_are_read_and_the_file_is_kept_to_be_written_again():
    config = read()
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim, config.norm_eps) == (24, 2, 8, 1e-5)
    assert config.raw["bos_token_id"] == 1


def test_what_may_be_left_out_has_the_defaults_of_transformers():
    config = read(
        head_dim=None, num_key_value_heads=None, rms_norm_eps=None, tie_word_embeddings=None, rope_parameters=None,
        max_position_embeddings=None,
    )  # fmt: skip
    assert (config.head_dim, config.num_key_value_heads, config.norm_eps) == (24 // 4, 4, 1e-6)
    assert (config.tie_word_embeddings, config.rope_theta, config.rope_scaling) == (False, 10000.0, None)
    assert (config.max_position_embeddings, config.attention_bias, config.mlp_bias) == (2048, False, False)


def test_rope_settings_have_an_old_and_a_new_place():
    new = read(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500})
    old = read(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=500)
    for config in (new, old):
        assert config.rope_theta == 500.0
        assert inverse_frequencies(8, config.rope_theta, config.rope_scaling)[0] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'; supported are .*llama"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "24"}, "hidden_size = '24', expected a whole number"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = {'bits': 4}, not supported"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]; supported are"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0, expected at least 1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu', not supported .*'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"num_key_value_heads": 3}, "4 attention heads and 3 key-value heads"),
        ({"head_dim": None, "hidden_size": 25}, "hidden_size 25, which 4 attention heads do not divide"),
        ({"head_dim": 7}, "head_dim = 7, expected an even number"),
        ({"rope_parameters": [1]}, r"rope parameters \[1\], expected an object"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta = 'big'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta = 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ],
)
def test_what_cannot_be_had_is_named(changes, message):
    with pytest.raises(MiniloraError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (tiny.llama(sliding_window=3), [None, None]),
        (tiny.mistral(), [5, 5]),
        (tiny.mistral(sliding_window=None), [None, None]),
        (tiny.without(tiny.mistral(), "sliding_window"), [4096, 4096]),
        (tiny.qwen2(sliding_window=5, max_window_layers=0), [None, None]),
        (tiny.qwen2(use_sliding_window=True, sliding_window=5), [None, None]),  # max_window_layers is 28
        (tiny.qwen2(use_sliding_window=True, max_window_layers=1), [None, 4096]),
        (tiny.qwen3(use_sliding_window=True, sliding_window=5, max_window_layers=0), [5, 5]),
        (tiny.qwen3(use_sliding_window=True, sliding_window=5, layer_types=tiny.SLIDING_FIRST), [5, None]),
    ],
)
def test_every_layer_has_the_window_that_the_config_gives_it(config, windows):
    read_config = family_of(config).read_config(config)
    assert [read_config.window_of(layer) for layer in range(2)] == windows


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny.mistral(sliding_window=0), "sliding_window = 0, expected at least 1"),
        (tiny.mistral(sliding_window="all"), "sliding_window = 'all', expected a whole number"),
        (tiny.mistral(layer_types=tiny.SLIDING_FIRST), "layer_types, which a mistral model does not follow"),
        (tiny.mistral(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (tiny.without(tiny.mistral(num_attention_heads=6), "num_key_value_heads"), "6 attention heads and 8 key-value"),
        (tiny.qwen2(use_sliding_window="yes"), "use_sliding_window = 'yes'"),
        (tiny.qwen2(use_sliding_window=True, max_window_layers="x"), "max_window_layers = 'x'"),
        (tiny.qwen2(layer_types=["full_attention"]), "layer_types = .*expected 2 entries"),
        (tiny.qwen2(layer_types="full_attention"), "layer_types = 'full_attention'"),
        (tiny.qwen3(layer_types=["full_attention", "chunked_attention"]), "layer_types = .*each 'full_attention' or"),
        (tiny.qwen3(sliding_window=5, layer_types=tiny.SLIDING_FIRST), "no window: set use_sliding_window"),
        (tiny.gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True, not supported"),
        (tiny.gpt2(reorder_and_upcast_attn=True), "reorder_and_upcast_attn = True, not supported"),
        (tiny.gpt2(add_cross_attention=True), "add_cross_attention = True, not supported"),
        (tiny.gpt2(scale_attn_weights=False), "scale_attn_weights = False, not supported"),
        (tiny.gpt2(activation_function="gelu"), "activation_function = 'gelu', not supported .*'gelu_new'"),
        (tiny.gpt2(n_head=5), "n_embd 24, which 5 attention heads do not divide"),
        (tiny.gpt2(n_layer="12"), "n_layer = '12'"),
        (tiny.qwen3(attention_bias=1), "attention_bias = 1, expected true or false"),
    ],
)
def test_what_a_family_cannot_have_is_named(config, message):
    with pytest.raises(MiniloraError, match=message):
        family_of(config).read_config(config)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn'; supported are default, linear and llama3"),
        ({"rope_type": "linear"}, "'linear' with factor = None"),
        ({"rope_type": "linear", "factor": 0}, "factor = 0, expected a number above zero"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}, "original_max_position"),
        ({"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}, "low_freq_factor = 4.0, expected less"),
    ],
)
def test_a_rope_scaling_that_cannot_be_had_is_named(scaling, message):
    with pytest.raises(MiniloraError, match=message):
        inverse_frequencies(8, 10000.0, scaling)


def test_frequencies_fall_from_one_by_a_constant_factor():
    np.testing.assert_allclose(inverse_frequencies(8, 16.0, None), [1, 1 / 2, 1 / 4, 1 / 8], rtol=1e-15)


def test_llama3_scaling_keeps_short_waves_divides_long_ones_and_blends_between():
    """A context of 8π: the pairs make 4, 2, 1 and ½ turns in it; from 4 on they are kept, up to 1 they are divided."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8 * math.pi,
    }  # fmt: skip
    frequencies = inverse_frequencies(8, 16.0, scaling)
    third = (2 - 1) / (4 - 1)
    np.testing.assert_allclose(frequencies, [1, 0.5 * (third + (1 - third) / 8), 1 / 32, 1 / 64], rtol=1e-14)


def test_a_rotary_table_grows_and_keeps_what_it_had():
    frequencies = inverse_frequencies(8, 100.0, None)
    table = RotaryTable(frequencies, np.dtype("float64"))
    table.reach(5)
    early, _ = table.at(np.arange(5)[None])
    table.reach(701)
    positions = np.array([[0, 3, 700], [4, 2, 1]])
    cos, sin = table.at(positions)
    assert cos.shape == sin.shape == (2, 3, 1, 4)
    np.testing.assert_allclose(cos[:, :, 0], np.cos(positions[..., None] * frequencies), atol=1e-12)
    np.testing.assert_allclose(sin[:, :, 0], np.sin(positions[..., None] * frequencies), atol=1e-12)
    assert np.array_equal(early[0, 3], cos[0, 1])
