"""`minilora merge`: what it writes computes what base and adapter compute, and it writes nothing that does not."""

from __future__ import annotations

import json

import numpy as np
import pytest

import minilora as ml
from minilora.backend import dtype_of
from minilora.lora import LoraLayer
from tests import texts, tiny

TOKENS = np.random.default_rng(5).integers(0, texts.VOCABULARY, (2, 20))


def logits(path, adapter=None) -> np.ndarray:
    model = ml.load_model(path, dtype="float32")
    if adapter is not None:
        model.load_adapter("a", adapter)
    return ml.to_numpy(model.logits(TOKENS))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_merged_model_has_the_logits_of_base_and_adapter_and_the_tokenizer(run, base, adapter, tmp_path):
    out = tmp_path / "merged"
    before = contents(base)
    status, shown, errors = run("merge", "--model", base, "--adapter", adapter, "--out", out)
    assert (status, errors) == (0, "")
    np.testing.assert_allclose(logits(out), logits(base, adapter), rtol=1e-5, atol=1e-5)
    assert np.abs(logits(out) - logits(base)).max() > 0.1
    merged, original = ml.load_model(out), ml.load_model(base)
    assert merged.tokenizer.encode("añ<|turn|>") == original.tokenizer.encode("añ<|turn|>")
    assert merged.tokenizer.chat_template == original.tokenizer.chat_template
    assert contents(base) == before
    assert "largest logit difference between merged and unmerged" in shown
    assert f"wrote {out} (float32)" in shown


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_difference_is_measured_against_a_bound_for_the_dtype_that_is_written(run, base, adapter, tmp_path, dtype):
    out = tmp_path / "merged"
    status, shown, _ = run("merge", "--model", base, "--adapter", adapter, "--out", out, "--dtype", dtype, "--json")
    report = json.loads(shown)
    assert status == 0
    assert report["dtype"] == dtype
    written = ml.load_model(out)
    assert {tensor.dtype.name for _, tensor in written.network.named_parameters()} == {dtype}
    assert 0 <= report["difference"] < report["bound"] < report["largest_logit"] / 5
    assert report["moved"] > report["difference"]
    model = ml.load_model(base, dtype="float32")
    model.load_adapter("a", adapter)
    probe = np.random.default_rng(0).integers(0, texts.VOCABULARY, (4, 64))
    difference = np.abs(ml.to_numpy(written.logits(probe)) - ml.to_numpy(model.logits(probe))).max()
    if dtype in ("float16", "bfloat16"):  # of the others the difference is rounding of the passes themselves
        assert report["difference"] == pytest.approx(float(difference), rel=0.05)


def test_the_bound_is_that_of_the_least_precise_matrix(run, base, adapter, tmp_path):
    model = ml.load_model(base)
    weight = dict(model.network.named_parameters())["model.layers.1.self_attn.q_proj.weight"]
    weight.data = weight.data.astype(dtype_of("bfloat16"))
    model.save(tmp_path / "mixed")
    shown = run("merge", "--model", tmp_path / "mixed", "--adapter", adapter, "--out", tmp_path / "out", "--json")[1]
    assert json.loads(shown)["dtype"] == "bfloat16"


def test_a_difference_over_the_bound_writes_nothing(run, base, adapter, tmp_path):
    out = tmp_path / "merged"
    arguments = ["merge", "--model", base, "--adapter", adapter, "--out", out]
    status, shown, errors = run(*arguments, "--dtype", "bfloat16", "--tolerance", 1e-6)
    assert (status, shown) == (1, "")
    assert "logits differ from those of base and adapter by up to" in errors
    assert "nothing was written" in errors
    assert not out.exists()
    assert run(*arguments)[0] == 0
    before = contents(out)
    assert run(*arguments, "--dtype", "bfloat16", "--tolerance", 1e-6, "--overwrite")[0] == 1
    assert contents(out) == before


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_wrong_merge_is_noticed(run, base, adapter, tmp_path, monkeypatch, dtype):
    right = LoraLayer.delta
    monkeypatch.setattr(LoraLayer, "delta", lambda layer, base: -right(layer, base))
    status, _, errors = run(
        "merge", "--model", base, "--adapter", adapter, "--out", tmp_path / "merged", "--dtype", dtype
    )
    assert status == 1
    assert "nothing was written" in errors
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_changes_nothing_is_said_to(run, base, tmp_path):
    model = ml.load_model(base)
    model.add_adapter("new")
    model.save_adapter("new", tmp_path / "new")
    status, _, errors = run("merge", "--model", base, "--adapter", tmp_path / "new", "--out", tmp_path / "merged")
    assert status == 0
    assert errors == "warning: the adapter changes no logit: is it trained?\n"


def test_what_is_there_is_only_replaced_on_request(run, base, adapter, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()
    arguments = ["merge", "--model", base, "--adapter", adapter, "--out", out]
    assert run(*arguments)[0] == 0  # an empty directory
    before = contents(out)
    status, _, errors = run(*arguments, "--dtype", "float16")
    assert (status, "give --overwrite" in errors) == (1, True)
    assert contents(out) == before
    assert run(*arguments, "--dtype", "float16", "--overwrite")[0] == 0
    assert contents(out) != before


def test_neither_the_base_nor_the_adapter_nor_a_file_is_written_over(run, base, adapter, tmp_path):
    for out, message in ((base, "directory of --model"), (adapter, "directory of --adapter")):
        status, _, errors = run("merge", "--model", base, "--adapter", adapter, "--out", out, "--overwrite")
        assert status == 1
        assert message in errors
    file = tmp_path / "file"
    file.write_text("mine")
    assert run("merge", "--model", base, "--adapter", adapter, "--out", file, "--overwrite")[0] == 1
    assert file.read_text() == "mine"


def test_a_model_without_a_tokenizer_is_merged_without_one(run, base, adapter, tmp_path):
    model = ml.load_model(base)
    model.tokenizer = None
    model.save(tmp_path / "bare")
    status, shown, _ = run("merge", "--model", tmp_path / "bare", "--adapter", adapter, "--out", tmp_path / "merged")
    assert status == 0
    assert "without a tokenizer" in shown
    assert not (tmp_path / "merged" / "tokenizer.json").exists()


# --- several adapters, and a base in blocks ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(base, tmp_path_factory):
    """Another adapter for `base`, of other layers, rank and scale."""
    model = ml.load_model(base)
    config = ml.LoraConfig(r=2, alpha=5, target_modules=["q_proj", "up_proj"])
    tiny.add_random_adapter(model, "b", config, seed=9)
    path = tmp_path_factory.mktemp("second") / "b"
    model.save_adapter("b", path)
    return path


def test_several_adapters_are_merged_by_their_weights(run, base, adapter, second, tmp_path):
    both = ["merge", "--model", base, "--adapter", adapter, "--adapter", second]
    model = ml.load_model(base, dtype="float32")
    model.load_adapter("a", adapter)
    model.load_adapter("b", second)
    for options, weights in (([], {"a": 1.0, "b": 1.0}), (["--weight", 0.7, "--weight", -0.3], {"a": 0.7, "b": -0.3})):
        out = tmp_path / str(len(options))
        assert run(*both, *options, "--out", out)[::2] == (0, "")
        model.set_adapter(weights)
        np.testing.assert_allclose(logits(out), ml.to_numpy(model.logits(TOKENS)), rtol=1e-4, atol=1e-4)


def test_as_many_weights_as_adapters_are_expected(run, base, adapter, tmp_path):
    arguments = ["merge", "--model", base, "--adapter", adapter, "--out", tmp_path / "out"]
    status, _, errors = run(*arguments, "--weight", 1, "--weight", 2)
    assert (status, "given 2 times for 1 adapters" in errors) == (2, True)
    assert run("merge", "--model", base, "--out", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory):
    """A GGUF of Q8_0 blocks, and an adapter for it."""
    folder = tmp_path_factory.mktemp("blocks")
    model = tiny.model("float32", vocab_size=texts.MERGED, hidden_size=64, intermediate_size=96)
    model.tokenizer = texts.merging_tokenizer()
    model.save_gguf(folder / "base.gguf", "q8_0")
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=3, target_modules=["q_proj", "down_proj"]))
    model.save_adapter("a", folder / "adapter")
    return folder / "base.gguf", folder / "adapter"


def test_a_base_in_blocks_is_dequantised_and_that_is_said(run, in_blocks, tmp_path):
    """With the choice made or not, the same weights; without it a line says what was done."""
    base, adapter = in_blocks
    arguments = ["merge", "--model", base, "--adapter", adapter, "--out"]
    status, _, errors = run(*arguments, tmp_path / "default")
    assert status == 0
    assert errors.startswith("the base is quantised (Q8_0): merged into its dequantised weights; --quantised requant")
    assert run(*arguments, tmp_path / "chosen", "--quantised", "dequantise")[::2] == (0, "")
    assert contents(tmp_path / "default") == contents(tmp_path / "chosen")


def test_requantising_reports_each_layer_and_writes_the_values_of_blocks(run, in_blocks, tmp_path):
    base, adapter = in_blocks
    arguments = ["merge", "--model", base, "--adapter", adapter, "--quantised", "requantise", "--out"]
    status, shown, _ = run(*arguments, tmp_path / "a")
    assert status == 0
    assert "requantised 4 weights: relative error 0.0" in shown
    assert "down_proj.weight" in shown
    assert "wrote" in shown
    assert "(the values of Q8_0 blocks as float32)" in shown
    report = json.loads(run(*arguments, tmp_path / "b", "--json")[1])
    model = ml.load_model(base, dtype="stored")
    model.load_adapter("a", adapter)
    lost = model.merge_adapter("a", quantised="requantise")
    assert report["requantised"] == {name: {"error": e, "update": u} for name, (e, u) in lost.items()}
    assert report["dtype"] == "Q8_0"
    tokens = np.arange(8)[None]
    written = ml.to_numpy(ml.load_model(tmp_path / "a").logits(tokens))
    np.testing.assert_allclose(written, ml.to_numpy(model.logits(tokens)), rtol=1e-4, atol=1e-4)


def test_a_choice_for_blocks_goes_with_blocks_only(run, base, adapter, in_blocks, tmp_path):
    out = tmp_path / "out"
    status, _, errors = run("merge", "--model", base, "--adapter", adapter, "--quantised", "dequantise", "--out", out)
    assert (status, "has no weights in blocks" in errors) == (1, True)
    gguf, its_adapter = in_blocks
    arguments = ["merge", "--model", gguf, "--adapter", its_adapter, "--quantised", "requantise", "--out", out]
    assert run(*arguments, "--dtype", "float16")[0] == 2
    status, _, errors = run(*arguments, "--tolerance", 1e-9)
    assert (status, "try --quantised dequantise" in errors) == (1, True)
    assert not out.exists()


def test_a_warning_says_where_rounding_drowns_the_adapter(run, in_blocks, tmp_path):
    """An update far below a step of Q8_0's blocks."""
    base, _ = in_blocks
    model = ml.load_model(base)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=1, alpha=0.002, target_modules=["q_proj"]))
    model.save_adapter("a", tmp_path / "faint")
    arguments = ["merge", "--model", base, "--adapter", tmp_path / "faint", "--quantised", "requantise"]
    status, _, errors = run(*arguments, "--out", tmp_path / "out")
    assert status == 0
    assert "in 2 of 2 weights rounding to blocks moved more than the adapter did" in errors
