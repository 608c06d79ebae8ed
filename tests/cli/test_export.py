"""`minilora export`: the adapter that it writes is the adapter that it was given, and it fits the base."""

from __future__ import annotations

import numpy as np

import minilora as ml


def test_a_peft_directory_holds_the_same_adapter(run, base, adapter, tmp_path):
    out = tmp_path / "exported"
    status, shown, _ = run("export", "--model", base, "--adapter", adapter, "--format", "peft", "--out", out)
    assert (status, shown) == (0, f"wrote {out}\n")
    model = ml.load_model(base)
    model.load_adapter("given", adapter)
    model.load_adapter("written", out)
    given, written = model.adapter_parameters("given"), model.adapter_parameters("written")
    assert given.keys() == written.keys()
    for key in given:
        np.testing.assert_array_equal(given[key].data, written[key].data)
    assert model.adapters["given"].alpha == model.adapters["written"].alpha


def test_an_adapter_of_another_model_is_refused(run, base, foreign_adapter, tmp_path):
    out = tmp_path / "exported"
    status, _, errors = run("export", "--model", base, "--adapter", foreign_adapter, "--format", "peft", "--out", out)
    assert status == 1
    assert "another model's" in errors
    assert not out.exists()


def test_an_unknown_format_is_wrong_usage(run, base, adapter, tmp_path):
    assert run("export", "--model", base, "--adapter", adapter, "--format", "onnx", "--out", tmp_path / "x")[0] == 2
