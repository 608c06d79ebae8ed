"""`minilora export`: the adapter that it writes is the adapter that it was given, and it fits the base."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from tests import texts, tiny


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


# --- mlx-lm and llama.cpp ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """As the other commands' base, with a tokenizer that has merges: GGUF's have them."""
    model = texts.model(vocab_size=texts.MERGED)
    model.tokenizer = texts.merging_tokenizer()
    path = tmp_path_factory.mktemp("base") / "model"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    model = ml.load_model(base)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]))
    path = tmp_path_factory.mktemp("adapter") / "a"
    model.save_adapter("a", path)
    return path


TOKENS = np.arange(12)[None]


def logits(model, adapter=None):
    loaded = ml.load_model(model)
    if adapter is not None:
        loaded.load_adapter("a", adapter)
    return loaded.logits(TOKENS)


@pytest.mark.parametrize(("format", "name"), [("mlx", "a"), ("gguf", "a.gguf")])
def test_an_adapter_in_another_tool_s_format_is_an_adapter_for_every_command(
    run, base, adapter, tmp_path, format, name
):
    out = tmp_path / name
    status, shown, _ = run("export", "--model", base, "--adapter", adapter, "--format", format, "--out", out)
    assert (status, shown) == (0, f"wrote {out}\n")
    np.testing.assert_array_equal(logits(base, out), logits(base, adapter))
    back = tmp_path / "back"
    assert run("export", "--model", base, "--adapter", out, "--format", "peft", "--out", back)[0] == 0
    np.testing.assert_array_equal(logits(base, back), logits(base, adapter))
    completed = [
        run("generate", "--model", base, "--adapter", either, "--prompt", "the", "--max-new-tokens", 5)
        for either in (adapter, out)
    ]
    assert completed[0] == completed[1]
    assert completed[0][0] == 0
    status, shown, _ = run("inspect", out)
    assert status == 0
    assert f"an adapter ({format})" in shown


def test_a_variant_that_another_tool_does_not_know_is_written_as_plain_lora(run, base, tmp_path):
    """PiSSA: the adapter and what it took from the base."""
    model = ml.load_model(base)
    model.add_adapter("p", ml.LoraConfig(r=2, alpha=4, init="pissa"))
    for tensor in model.adapter_parameters("p").values():
        tensor.data += 0.1
    expected = model.logits(TOKENS)
    model.save_adapter("p", tmp_path / "p")
    out = tmp_path / "p.gguf"
    assert run("export", "--model", base, "--adapter", tmp_path / "p", "--format", "gguf", "--out", out)[0] == 0
    assert tiny.relative_error(logits(base, out), expected) < 1e-5


def test_dora_goes_to_mlx_lm_and_into_a_merged_gguf(run, base, tmp_path):
    model = ml.load_model(base)
    tiny.add_random_adapter(model, "d", ml.LoraConfig(r=2, alpha=4, use_dora=True))
    model.save_adapter("d", tmp_path / "d")
    expected = model.logits(TOKENS)
    arguments = ["export", "--model", base, "--adapter", tmp_path / "d", "--out"]
    assert run(*arguments, tmp_path / "mlx", "--format", "mlx")[0] == 0
    assert tiny.relative_error(logits(base, tmp_path / "mlx"), expected) < 1e-6
    status, _, errors = run(*arguments, tmp_path / "a.gguf", "--format", "gguf")
    assert (status, errors.count("\n")) == (1, 1)
    assert "--format gguf --merged" in errors
    assert run(*arguments, tmp_path / "m.gguf", "--format", "gguf", "--merged", "--dtype", "f32")[0] == 0
    assert tiny.relative_error(logits(tmp_path / "m.gguf"), expected) < 1e-5


def test_a_whole_model_is_written_as_gguf_with_or_without_an_adapter(run, base, adapter, tmp_path):
    arguments = ["export", "--model", base, "--format", "gguf", "--dtype", "f32", "--out"]
    assert run(*arguments, tmp_path / "base.gguf")[0] == 0
    np.testing.assert_array_equal(logits(tmp_path / "base.gguf"), logits(base))
    status, shown, _ = run(*arguments, tmp_path / "merged.gguf", "--adapter", adapter, "--merged")
    assert status == 0
    assert "f32; rounding moved no matrix by more than 0 of its norm" in shown
    assert tiny.relative_error(logits(tmp_path / "merged.gguf"), logits(base, adapter)) < 1e-5
    out = tmp_path / "default.gguf"
    assert "(f16; rounding" in run("export", "--model", base, "--format", "gguf", "--out", out)[1]
    assert tiny.relative_error(logits(out), logits(base)) < 1e-2


@pytest.mark.parametrize(
    "options",
    [
        ["--format", "mlx"],
        ["--format", "gguf", "--merged"],
        ["--format", "mlx", "--merged", "--adapter", "ADAPTER"],
        ["--format", "gguf", "--dtype", "f16", "--adapter", "ADAPTER"],
        ["--format", "peft", "--dtype", "f16", "--adapter", "ADAPTER"],
        ["--format", "gguf", "--dtype", "q4_0"],
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(run, base, adapter, tmp_path, options):
    options = [str(adapter) if option == "ADAPTER" else option for option in options]
    assert run("export", "--model", base, "--out", tmp_path / "x", *options)[0] == 2
    assert not (tmp_path / "x").exists()


def test_what_is_there_is_only_replaced_on_request(run, base, adapter, tmp_path):
    for format in ("peft", "mlx", "gguf"):
        out = tmp_path / format
        arguments = ["export", "--model", base, "--adapter", adapter, "--format", format, "--out", out]
        assert run(*arguments)[0] == 0
        status, _, errors = run(*arguments)
        assert (status, "give --overwrite" in errors) == (1, True)
        assert run(*arguments, "--overwrite")[0] == 0


def test_neither_what_is_read_nor_another_kind_of_thing_is_written_over(run, base, adapter, tmp_path):
    arguments = ["export", "--model", base, "--adapter", adapter, "--overwrite", "--out"]
    for out, format in ((base, "mlx"), (adapter, "mlx"), (adapter, "peft"), (base, "gguf")):
        status, _, errors = run(*arguments, out, "--format", format)
        assert (status, "would be lost" in errors) == (1, True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert "is a file, expected a directory" in run(*arguments, tmp_path / "file", "--format", "mlx")[2]
    assert "is a directory, expected a file" in run(*arguments, tmp_path / "folder", "--format", "gguf")[2]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_no_half_of_a_model(run, base, tmp_path, full_disk):
    status, _, errors = run("export", "--model", base, "--format", "gguf", "--out", tmp_path / "m.gguf")
    assert (status, "the disk is full" in errors) == (1, True)
    assert not list(tmp_path.iterdir())


def test_a_sliding_window_is_told(run, tmp_path):
    model = ml.new_model(tiny.mistral(vocab_size=texts.MERGED))
    model.tokenizer = texts.merging_tokenizer()
    model.save(tmp_path / "m")
    status, _, errors = run("export", "--model", tmp_path / "m", "--format", "gguf", "--out", tmp_path / "m.gguf")
    assert (status, "beyond 5 tokens it computes something else" in errors) == (0, True)


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
