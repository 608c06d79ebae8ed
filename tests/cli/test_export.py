"""`minilora export`: the adapter that it writes is the adapter that it was given, and it fits the base."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from tests import tiny


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


# --- several adapters as one ------------------------------------------------------------------------------------------


def second_adapter(base, folder):
    model = ml.load_model(base)
    config = ml.LoraConfig(r=2, alpha=5, target_modules=["q_proj", "up_proj"])
    tiny.add_random_adapter(model, "b", config, seed=9)
    model.save_adapter("b", folder)
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "2 adapters combined by cat: ranks 2 to 5, exact"),
        (
            ["--weight", "0.7", "--weight", "-0.3", "--combination", "svd", "--rank", "1"],
            "by svd: rank 1, relative error",
        ),
    ],
)
def test_several_adapters_are_written_as_one(run, base, adapter, tmp_path, options, said):
    second, out = second_adapter(base, tmp_path / "b"), tmp_path / "combined"
    arguments = ["export", "--model", base, "--adapter", adapter, "--adapter", second, "--format", "peft", "--out", out]
    status, _, errors = run(*arguments, *options)
    assert (status, said in errors) == (0, True)
    model = ml.load_model(base)
    model.load_adapter("a", adapter)
    model.load_adapter("b", second)
    if options:
        model.combine_adapters("c", {"a": 0.7, "b": -0.3}, "svd", rank=1)
    else:
        model.set_adapter({"a": 1.0, "b": 1.0})
    expected = model.logits(np.arange(12)[None])
    model.load_adapter("written", out)
    assert tiny.relative_error(model.logits(np.arange(12)[None]), expected) < 1e-5


def test_options_of_a_combination_need_one(run, base, adapter, tmp_path):
    one = ["export", "--model", base, "--adapter", adapter, "--format", "peft", "--out", tmp_path / "x"]
    assert run(*one, "--combination", "svd")[0] == 2
    assert run(*one, "--rank", "3")[0] == 2
    assert run(*one, "--weight", "1", "--weight", "2")[0] == 2
    assert run(*one, "--weight", "0.5", "--combination", "svd", "--rank", "2")[0] == 0
