"""Adapters of mlx-lm: what is written reads back with the same logits, what cannot be said there is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.formats import mlx
from minilora.formats.safetensors import open_safetensors, save_tensors
from tests import tiny

CONFIGS = {
    "all-linear": ml.LoraConfig(r=3, alpha=6),
    "patterns": ml.LoraConfig(
        r=3,
        alpha=6,
        use_rslora=True,
        rank_pattern={"down_proj": 5, "c_fc": 5},
        alpha_pattern={"q_proj": 1.7, "c_attn": 1},
    ),
    "one block": ml.LoraConfig(r=2, alpha=3, layers_to_transform=[0]),
    "dora": ml.LoraConfig(r=2, alpha=4, use_dora=True),
}


def of_family(family: str, config: ml.LoraConfig) -> ml.LoraConfig:
    """The config without the patterns that name another family's layers."""
    foreign = {"down_proj", "q_proj"} if family == "gpt2" else {"c_fc", "c_attn"}
    ranks, alphas = (
        {key: value for key, value in patterns.items() if key not in foreign}
        for patterns in (config.rank_pattern, config.alpha_pattern)
    )
    return config.with_changes(rank_pattern=ranks, alpha_pattern=alphas)


def adapted(family: str, config: ml.LoraConfig, **changes) -> ml.Model:
    """A tiny model with a random adapter "a"."""
    model = ml.new_model(tiny.FAMILIES[family] | changes, std=0.3)
    tiny.add_random_adapter(model, "a", of_family(family, config))
    return model


def write(model: ml.Model, path) -> None:
    tensors = {key: ml.to_numpy(tensor.data) for key, tensor in model.adapter_parameters("a").items()}
    mlx.write_adapter(path, model.adapters["a"], tensors, model.config, model.network.head_is_tied, "org/base")


def config_of(path) -> dict:
    return json.loads((path / mlx.CONFIG_FILE).read_text())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_adapter_comes_back_with_the_same_logits(tmp_path, family, config):
    model = adapted(family, config)
    write(model, tmp_path)
    model.load_adapter("b", tmp_path)
    tokens = tiny.tokens()
    found = model.logits(tokens)
    model.set_adapter("a")
    assert tiny.relative_error(found, model.logits(tokens)) < 1e-6
    model.set_adapter(None)
    assert tiny.relative_error(found, model.logits(tokens)) > 0.01


def test_the_matrices_are_transposed_and_the_scale_is_alpha_over_r(tmp_path):
    model = adapted("llama", ml.LoraConfig(r=3, alpha=6, dropout=0.1, target_modules=["k_proj"]))
    write(model, tmp_path)
    assert config_of(tmp_path) == {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 3, "scale": 2.0, "dropout": 0.1, "keys": ["self_attn.k_proj"]},
        "model": "org/base",
        "num_layers": 2,
    }
    tensors = open_safetensors(tmp_path / mlx.TENSOR_FILE)
    name = "model.layers.1.self_attn.k_proj"
    mine = model.adapter_parameters("a")
    np.testing.assert_array_equal(
        tensors[f"{name}.lora_a"].array().T, mine[f"base_model.model.{name}.lora_A.weight"].data
    )
    np.testing.assert_array_equal(
        tensors[f"{name}.lora_b"].array().T, mine[f"base_model.model.{name}.lora_B.weight"].data
    )
    assert tensors[f"{name}.lora_a"].shape == (24, 3)


@pytest.mark.parametrize(
    ("config", "layers", "keys"),
    [
        (ml.LoraConfig(target_modules=["q_proj", "up_proj"]), 2, ["mlp.up_proj", "self_attn.q_proj"]),
        (ml.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]), 1, ["self_attn.q_proj"]),
        (ml.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]), 2, ["model.layers.0.self_attn.q_proj"]),
        (
            ml.LoraConfig(target_modules=["0.self_attn.q_proj", "1.self_attn.v_proj"]),
            2,
            ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
        ),
        (ml.LoraConfig(target_modules=["q_proj", "lm_head"]), 2, ["self_attn.q_proj", "lm_head"]),
        (ml.LoraConfig(target_modules=["lm_head"]), 2, ["lm_head"]),
    ],
)
def test_the_keys_name_just_the_adapted_layers(tmp_path, config, layers, keys):
    write(adapted("llama", config), tmp_path)
    written = config_of(tmp_path)
    assert (written["num_layers"], written["lora_parameters"]["keys"]) == (layers, keys)


def test_what_most_layers_have_is_not_touched(tmp_path):
    """The common scale is written as it is: only the layer that differs has its factor in lora_b."""
    model = adapted("llama", ml.LoraConfig(r=3, alpha=6, alpha_pattern={"1.mlp.up_proj": 5}))
    write(model, tmp_path)
    tensors = open_safetensors(tmp_path / mlx.TENSOR_FILE)
    for key, tensor in model.adapter_parameters("a").items():
        if key.endswith("lora_B.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_B.weight", "lora_b")
            same = np.array_equal(tensors[name].array().T, tensor.data)
            assert same == ("1.mlp.up_proj" not in name), name


def test_an_embedding_s_adapter_goes_beside_a_head_of_its_own(tmp_path):
    model = adapted("llama", ml.LoraConfig(r=2, alpha=4, target_modules=["embed_tokens", "lm_head", "q_proj"]))
    write(model, tmp_path)
    model.load_adapter("b", tmp_path)
    found = model.logits(tiny.tokens())
    model.set_adapter("a")
    assert tiny.relative_error(found, model.logits(tiny.tokens())) < 1e-6


def test_an_embedding_s_adapter_of_a_tied_base_needs_the_same_for_the_head(tmp_path):
    tied = ml.LoraConfig(r=2, alpha=4, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(MiniloraError, match="not its head, expected both"):
        write(adapted("llama", tied, tie_word_embeddings=True), tmp_path)
    for targets in (["embed_tokens", "lm_head"], ["lm_head"]):
        with pytest.raises(MiniloraError, match="another update than its embedding"):
            write(adapted("llama", ml.LoraConfig(target_modules=targets), tie_word_embeddings=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tied_embedding_s_adapter_is_read_for_both_and_written_again(tmp_path):
    """mlx-lm's tied head is embedding.as_linear, which applies the adapter too."""
    model = adapted("llama", ml.LoraConfig(target_modules=["q_proj"]), tie_word_embeddings=True)
    write(model, tmp_path)
    random = np.random.default_rng(0)
    tensors = {name: np.array(entry.array()) for name, entry in open_safetensors(tmp_path / mlx.TENSOR_FILE).items()}
    tensors["model.embed_tokens.lora_a"] = random.normal(0, 0.3, (61, 8)).astype(np.float32)
    tensors["model.embed_tokens.lora_b"] = random.normal(0, 0.3, (8, 24)).astype(np.float32)
    save_tensors(tmp_path / mlx.TENSOR_FILE, tensors)
    model.delete_adapter("a")
    model.load_adapter("a", tmp_path)
    before = model.logits(tiny.tokens())
    write(model, tmp_path / "again")
    assert open_safetensors(tmp_path / "again" / mlx.TENSOR_FILE).keys() == tensors.keys()
    model.load_adapter("b", tmp_path / "again")
    np.testing.assert_array_equal(model.logits(tiny.tokens()), before)


def test_gpt2_s_position_table_is_an_embedding_that_no_head_shares(tmp_path):
    model = adapted("gpt2", ml.LoraConfig(r=2, alpha=4, target_modules=["wpe", "c_attn"]))
    write(model, tmp_path)
    assert "model.wpe.lora_a" in open_safetensors(tmp_path / mlx.TENSOR_FILE)
    model.load_adapter("b", tmp_path)
    found = model.logits(tiny.tokens())
    model.set_adapter("a")
    assert tiny.relative_error(found, model.logits(tiny.tokens())) < 1e-6


def test_a_gpt2_with_a_head_of_its_own_is_refused(tmp_path):
    with pytest.raises(MiniloraError, match="GPT-2 has a tied head"):
        write(adapted("gpt2", ml.LoraConfig(), tie_word_embeddings=False), tmp_path)


def test_a_peft_directory_is_not_taken_for_an_mlx_one_nor_the_other_way_round(tmp_path):
    model = adapted("llama", ml.LoraConfig(r=2))
    write(model, tmp_path / "mlx")
    model.save_adapter("a", tmp_path / "peft")
    assert mlx.is_mlx_adapter(tmp_path / "mlx")
    assert not mlx.is_mlx_adapter(tmp_path / "peft")
    assert not mlx.is_mlx_adapter(tmp_path)


# ---------------------------------------------------------------- bad files


@pytest.fixture
def written(tmp_path):
    write(adapted("llama", ml.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "full"}, 'fine_tune_type is "full", expected "lora" or "dora"'),
        ({"lora_parameters": 3}, "lora_parameters is 3, expected rank, scale and dropout"),
        ({"lora_parameters": {"rank": 2}}, "lora_parameters.scale is None, expected a number"),
        ({"lora_parameters": {"scale": 10**400, "dropout": 0.0}}, "lora_parameters.scale is 1000.*expected a number"),
        ({"lora_parameters": {"scale": 1.0, "dropout": "no"}}, "lora_parameters.dropout is 'no'"),
        ({"fine_tune_type": "dora"}, "q_proj has lora_a .*, lora_b .*; expected lora_a, lora_b, m"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(written, changes, message):
    (written / mlx.CONFIG_FILE).write_text(json.dumps(config_of(written) | changes))
    with pytest.raises(MiniloraError, match=message) as caught:
        mlx.read_adapter(written)
    assert "\n" not in str(caught.value)


A, B = np.zeros((24, 2), np.float32), np.zeros((2, 24), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q.lora_a": A}, "q has lora_a .24, 2.; expected lora_a, lora_b"),
        ({"q.lora_a": A, "q.lora_b": B[:1]}, "q has lora_a .24, 2., lora_b .1, 24."),
        ({"q.lora_a": A[None], "q.lora_b": B}, "q.lora_a of shape .1, 24, 2., expected matrices"),
        ({"q.weight": A}, "found q.weight of shape"),
        ({"q.lora_a": A, "q.lora_b": B, "k.lora_a": A[:, :1], "k.lora_b": B[:1]}, "of rank 1, 2, expected one"),
        ({}, "of rank none, expected one"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(written, tensors, message):
    save_tensors(written / mlx.TENSOR_FILE, tensors)
    with pytest.raises(MiniloraError, match=message):
        mlx.read_adapter(written)


def test_a_missing_or_early_tensor_file_is_named(written):
    (written / mlx.TENSOR_FILE).unlink()
    with pytest.raises(MiniloraError, match=r"adapters\.safetensors"):
        mlx.read_adapter(written)
    (written / "adapters.npz").write_bytes(b"")
    with pytest.raises(MiniloraError, match=r"adapters\.npz of an early mlx-lm"):
        mlx.read_adapter(written)


def test_an_adapter_of_another_model_is_refused(written):
    model = ml.new_model(tiny.llama(hidden_size=32))
    with pytest.raises(MiniloraError, match="another model's"):
        model.load_adapter("a", written)
    assert not model.adapters
