"""`minilora merge`: what it writes computes what base and adapter compute, and it writes nothing that does not."""

from __future__ import annotations

import json

import numpy as np
import pytest

import minilora as ml
from minilora.backend import dtype_of
from minilora.lora import LoraLayer
from tests import texts

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
