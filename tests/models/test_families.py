"""What holds for every family: the KV cache, saving, windows, adapters on all its linear layers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.formats.safetensors import open_model_tensors, save_checkpoint_tensors
from minilora.generate import generate_batch
from minilora.models import FAMILIES, KVCache
from minilora.tensor import no_grad
from tests import tiny

families = pytest.mark.parametrize("family", tiny.FAMILIES)
TOKENS = tiny.tokens(2, 13)


def network(family: str, dtype: str = "float64") -> ml.Model:
    return ml.new_model(tiny.FAMILIES[family], dtype=dtype, std=0.3)


def test_no_family_is_missing():
    assert set(tiny.FAMILIES) == set(FAMILIES)


@families
@pytest.mark.parametrize("pieces", [(1,) * 13, (4, 1, 7, 1)])
def test_logits_through_the_cache_are_those_of_one_pass(family, pieces):
    model = network(family)
    cache, found, start = KVCache(2, capacity=13), [], 0
    with no_grad():
        for piece in pieces:
            found.append(model.network.logits(TOKENS[:, start : start + piece], cache=cache).data)
            start += piece
    np.testing.assert_allclose(np.concatenate(found, axis=1), model.logits(TOKENS), rtol=1e-11, atol=1e-11)


@families
def test_a_prompt_that_is_filled_up_on_the_left_has_the_completion_that_it_has_alone(family):
    model = network(family)
    prompts = [[5, 9, 1, 33, 7, 12, 8], [4, 8]]
    assert generate_batch(model, prompts, 12, stop=[]) == [model.generate(p, 12, stop=[]) for p in prompts]


@families
def test_packed_sequences_have_the_logits_of_separate_ones(family):
    model = network(family)
    first, second = tiny.tokens(1, 6, seed=1), tiny.tokens(1, 7, seed=2)
    logits = model.logits(np.concatenate([first, second], axis=1), np.array([[1] * 6 + [2] * 7]))
    np.testing.assert_allclose(logits[:, :6], model.logits(first), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(logits[:, 6:], model.logits(second), rtol=1e-11, atol=1e-11)


@families
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_and_loaded_has_the_same_logits(family, tied, tmp_path):
    model = ml.new_model(tiny.FAMILIES[family] | {"tie_word_embeddings": tied}, dtype="float32", std=0.3)
    model.save(tmp_path)
    again = ml.load_model(tmp_path)
    assert again.config == model.config
    assert np.array_equal(again.logits(TOKENS), model.logits(TOKENS))


@families
def test_all_linear_is_every_linear_but_the_head_and_each_of_them_counts(family):
    model = network(family)
    base = model.logits(TOKENS)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=2))
    adapted = set(model._adapters.layers("a"))
    assert adapted == set(model._adapters.linears) - {"lm_head"}
    _, gradients = tiny.gradients(model, TOKENS)
    assert all(np.linalg.norm(gradient) > 0 for gradient in gradients.values())
    merged = model.logits(TOKENS)
    assert tiny.relative_error(merged, base) > 1e-2
    model.merge_adapter("a")
    assert tiny.relative_error(model.logits(TOKENS), merged) < 1e-12
    model.unmerge_adapter()
    assert np.array_equal(model.logits(TOKENS), base)


@families
def test_a_tensor_that_the_family_has_no_place_for_is_named(family, tmp_path):
    other = next(name for name in tiny.FAMILIES if name not in (family, "llama", "mistral"))
    network(other, "float32").save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.FAMILIES[family]))
    with pytest.raises(MiniloraError, match=r"has no place for, first |has no tensor "):
        ml.load_model(tmp_path)


# --- windows ----------------------------------------------------------------------------------------------------------


def test_what_lies_before_the_windows_of_all_layers_has_no_influence():
    """Two layers that look 4 back each: position 9 is the first that position 0 cannot reach."""
    model = network("mistral")
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % tiny.VOCABULARY
    before, after = model.logits(TOKENS), model.logits(changed)
    assert np.array_equal(before[:, 9:], after[:, 9:])
    assert (before[:, :9] != after[:, :9]).any(axis=-1).all()


def test_a_layer_without_the_window_reaches_back_to_the_start():
    model = network("qwen2")  # the first layer sees everything, the second 5 positions
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % tiny.VOCABULARY
    assert (model.logits(TOKENS) != model.logits(changed)).any(axis=-1).all()


# --- GPT-2's files ----------------------------------------------------------------------------------------------------


def renamed(path, names) -> None:
    """Write the directory's tensors again under other names, as `names(tensors)` gives them."""
    tensors = {name: np.array(entry.array()) for name, entry in open_model_tensors(path).items()}
    (path / "model.safetensors").unlink()
    save_checkpoint_tensors(path, names(tensors))


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_files_without_the_prefix_and_with_masks_load_to_the_same_model(tied, tmp_path):
    """As OpenAI's are on the hub: "h.0.attn.bias" is the causal mask."""
    model = ml.new_model(tiny.gpt2(tie_word_embeddings=tied), dtype="float32", std=0.3)
    model.save(tmp_path)

    def as_on_the_hub(tensors):
        masks = {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)) for layer in range(2)}
        masks |= {f"h.{layer}.attn.masked_bias": np.array(-1e4, np.float32) for layer in range(2)}
        return masks | {name.removeprefix("transformer."): array for name, array in tensors.items()}

    renamed(tmp_path, as_on_the_hub)
    assert np.array_equal(ml.load_model(tmp_path).logits(TOKENS), model.logits(TOKENS))


def test_a_gpt2_file_with_a_stray_or_missing_tensor_is_refused(tmp_path):
    network("gpt2", "float32").save(tmp_path)
    renamed(
        tmp_path, lambda tensors: tensors | {"transformer.h.0.attn.q_attn.weight": tensors["transformer.wte.weight"]}
    )
    with pytest.raises(MiniloraError, match=r"no place for, first transformer\.h\.0\.attn\.q_attn\.weight"):
        ml.load_model(tmp_path)
    renamed(tmp_path, lambda tensors: {name: array for name, array in tensors.items() if "attn" not in name})
    with pytest.raises(MiniloraError, match=r"no tensor transformer\.h\.0\.attn\.c_attn\.weight"):
        ml.load_model(tmp_path)


def test_gpt2_saves_its_weights_as_in_by_out(tmp_path):
    network("gpt2", "float32").save(tmp_path)
    shapes = {name: tuple(entry.shape) for name, entry in open_model_tensors(tmp_path).items()}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (24, 3 * 24)
    assert shapes["transformer.h.1.mlp.c_fc.weight"] == (24, 40)
    assert "lm_head.weight" not in shapes


@pytest.mark.parametrize(
    ("targets", "layers", "fan_in_fan_out"),
    [
        (["c_attn"], {"attn.c_attn"}, True),
        (["c_attn", "c_proj", "c_fc"], {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, True),
        (["attn.c_proj", "lm_head"], {"attn.c_proj", "lm_head"}, True),
        (["lm_head"], {"lm_head"}, False),
    ],
)
def test_an_adapter_of_gpt2_says_that_its_weights_lie_in_by_out(targets, layers, fan_in_fan_out, tmp_path):
    model = network("gpt2")
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=2, target_modules=targets))
    assert {name.partition(".h.1.")[2] or name for name in model._adapters.layers("a") if ".h.0." not in name} == layers
    expected = model.logits(TOKENS)
    model.save_adapter("a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is fan_in_fan_out
    for written in (True, False):  # PEFT puts right what does not fit the layer; so it is only a note
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": written}))
        again = network("gpt2")
        again.load_adapter("a", tmp_path)
        assert tiny.relative_error(again.logits(TOKENS), expected) < 1e-12


def test_a_position_of_gpt2_reaches_the_logits_and_restarts_in_a_segment():
    model = network("gpt2")
    same = np.full((1, 6), 7)
    logits = model.logits(same)  # equal tokens: only their positions tell them apart
    assert all(tiny.relative_error(logits[0, time], logits[0, 0]) > 1e-2 for time in range(1, 6))
    restarted = model.logits(same, np.array([[1, 1, 1, 2, 2, 2]]))
    np.testing.assert_allclose(restarted[0, 3:], restarted[0, :3], rtol=1e-12, atol=1e-12)


# --- the page about them ----------------------------------------------------------------------------------------------


def test_the_page_of_models_lists_every_family_and_tests_that_exist():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "models.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(\w+)` \(`", page, re.M)) == set(FAMILIES)
    named = re.findall(r"`(tests/[\w/]+\.py|…)(?:::(\w+))?`", page)
    assert len(named) > 15
    file = ""
    for path, test in named:
        file = file if path == "…" else path
        assert not test or f"def {test}(" in (root / file).read_text("utf-8"), test
        assert (root / file).exists(), file
