"""Bad input to any command is one line that names it and status 1, and what was on the disk is still whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import minilora as ml
from minilora import files
from tests import texts

ROW = '{"prompt": "1+1=", "completion": "2"}\n'


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def place(tmp_path, base, adapter, foreign_adapter, monkeypatch):
    """A working directory with a model, two adapters, data, and the results of earlier runs."""
    for name, source in (("model", base), ("adapter", adapter), ("foreign", foreign_adapter)):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "data.jsonl").write_text(ROW * 3)
    shutil.copytree(adapter, tmp_path / "run")
    (tmp_path / "run" / "minilora.toml").write_text("# an earlier run's\n")
    shutil.copytree(base, tmp_path / "merged")
    (tmp_path / "predictions").write_text("earlier")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def truncate(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


EVAL = ["eval", "--model", "model", "--data", "data.jsonl", "--predictions", "predictions"]
GENERATE = ["generate", "--model", "model", "--prompt", "a"]
TRAIN = ["train", "--model", "model", "--data", "data.jsonl", "--out", "run", "--overwrite", "--steps", "1", "--quiet"]
MERGE = ["merge", "--model", "model", "--adapter", "adapter", "--out", "merged", "--overwrite"]
EXPORT = ["export", "--model", "model", "--adapter", "adapter", "--format", "peft", "--out", "exported"]
TRAIN_ANEW = [*TRAIN[: TRAIN.index("--out")], "--out", "fresh", "--steps", "1", "--quiet"]
USING_A_MODEL = {"eval": EVAL, "generate": GENERATE, "train": TRAIN, "merge": MERGE, "export": EXPORT}


@pytest.fixture
def refused(run, place):
    """refused(arguments, text): one line on stderr that has the text, status 1, and every file as it was."""

    def check(arguments: list[str], *expected: str) -> None:
        before = snapshot(place)
        status, shown, errors = run(*arguments)
        assert (status, shown) == (1, ""), errors
        (line,) = [line for line in errors.splitlines() if not line.startswith(("data.jsonl: ", "warning: "))]
        assert line.startswith("error: ")
        for text in expected:
            assert text in line
        assert snapshot(place) == before

    return check


def replaced(arguments: list[str], option: str, value: str) -> list[str]:
    position = arguments.index(option) + 1
    return [*arguments[:position], value, *arguments[position + 1 :]]


# ---------------------------------------------------------------- missing files


@pytest.mark.parametrize("command", USING_A_MODEL)
def test_a_model_that_is_not_there(refused, command):
    refused(replaced(USING_A_MODEL[command], "--model", "absent"), "folder: absent; expected a model directory")


@pytest.mark.parametrize("arguments", [EVAL, TRAIN])
def test_data_that_is_not_there(refused, arguments):
    refused(replaced(arguments, "--data", "nothing"), "no such file or folder: nothing; expected a .jsonl file")


@pytest.mark.parametrize(
    "arguments", [[*EVAL, "--adapter", "absent"], [*GENERATE, "--adapter", "absent"], MERGE, EXPORT]
)
def test_an_adapter_that_is_not_there(refused, arguments):
    refused(replaced(arguments, "--adapter", "absent"), "no such file or folder: absent; expected an adapter")


def test_nothing_to_inspect(refused):
    refused(["inspect", "absent"], "no such file or folder: absent; expected a model directory")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("adaptor", "adapter"), ("./modell", "model"), ("merged/modle.safetensors", "merged/model.safetensors"),
     ("mergd/model.safetensors", "merged/model.safetensors"), ("mni", "mini")],
)  # fmt: skip
def test_a_misspelt_path_is_answered_with_the_one_that_is_there(refused, typed, meant):
    refused(["inspect", typed], f"no such file or folder: {typed}; did you mean {meant}?")


def test_a_misspelt_path_is_answered_by_every_option_that_takes_one(place, refused):
    refused(replaced(EVAL, "--data", "date.jsonl"), "no such file or folder: date.jsonl; did you mean data.jsonl?")
    refused(replaced(MERGE, "--adapter", "./adaptr"), "no such file or folder: adaptr; did you mean adapter?")
    refused(["report", "rum"], "no such file or folder: rum; did you mean run?")


def test_a_name_of_two_parts_is_the_hubs_unless_its_first_part_is_a_folder_here(place, refused, monkeypatch):
    import huggingface_hub

    def unreachable(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    (place / "runs" / "dates").mkdir(parents=True)
    refused(["inspect", "runs/dat"], "no such file or folder: runs/dat; did you mean runs/dates?")
    found = "owner/name is no folder here, and the hub did not give a model of that name (Name or service not known)"
    refused(["inspect", "owner/name"], found)
    refused(["inspect", "runz/dates"], "runz/dates is no folder here (did you mean runs/dates?), and the hub")


@pytest.mark.parametrize("arguments", [[*GENERATE, "--adapter", "model"], replaced(MERGE, "--adapter", "model")])
def test_a_model_given_as_an_adapter(refused, arguments):
    refused(arguments, "model is a model, not an adapter")


@pytest.mark.parametrize("command", USING_A_MODEL)
def test_an_adapter_given_as_a_model(refused, command):
    refused(replaced(USING_A_MODEL[command], "--model", "foreign"), "foreign holds an adapter, not a model")


def test_data_is_looked_for_before_the_model(place, refused):
    arguments = replaced(replaced(TRAIN, "--data", "nothing"), "--model", "absent")
    refused(arguments, "no such file or folder: nothing")


def test_an_empty_name_is_not_the_working_directory(refused):
    refused(replaced(GENERATE, "--model", ""), "the model's name is empty, expected a path or a name")


def test_a_place_that_cannot_be_written_to_is_found_before_the_model_is(place, refused, monkeypatch):
    for command, option in (("train", "--out"), ("merge", "--out"), ("export", "--out"), ("eval", "--predictions")):
        arguments = replaced(USING_A_MODEL[command], "--model", "absent")
        refused(replaced(arguments, option, "data.jsonl/x"), "cannot write data.jsonl/x: ", "data.jsonl is a file")
    refused(
        replaced(replaced(EVAL, "--model", "absent"), "--predictions", "model"), "model is a folder, expected a file"
    )
    monkeypatch.setattr(files.os, "access", lambda folder, mode: Path(folder) != place)  # as of a read-only directory
    for command, option in (("train", "--out"), ("merge", "--out"), ("export", "--out"), ("eval", "--predictions")):
        arguments = replaced(USING_A_MODEL[command], "--model", "absent")
        refused(replaced(arguments, option, "new"), f"cannot write new: no permission to write in {place}")


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("arguments", [EVAL, TRAIN])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (ROW + '{"prompt": "x", "completion"\n', "data.jsonl, line 2: malformed JSON at column 29"),
        (ROW * 2 + '{"question": "x", "answer": "y"}\n', 'data.jsonl, line 3: found keys ["answer", "question"]'),
        (ROW + '{"text": "x"}\n', "data.jsonl, line 2: found a text row; expected prompt+completion"),
        ('{"prompt": 3, "completion": "x"}\n', "data.jsonl, line 1: prompt is 3; expected a string"),
        ("[1, 2]\n", "data.jsonl, line 1: found [1, 2]; expected an object"),
        ("", "data.jsonl: found no rows"),
        ("\n \n", "data.jsonl: found no rows"),
        ('{"messages": []}\n', "data.jsonl, line 1: messages is []"),
    ],
)
def test_data_that_does_not_fit_names_its_line(place, refused, arguments, content, expected):
    (place / "data.jsonl").write_text(content)
    refused(arguments, expected)


@pytest.mark.parametrize("arguments", [EVAL, TRAIN])
def test_rows_longer_than_the_context(place, refused, arguments):
    refused([*arguments, "--max-length", "300"], "--max-length is 300, over the model's context of 256")
    (place / "data.jsonl").write_text(json.dumps({"prompt": "x" * 300, "completion": "y"}) + "\n")
    refused(arguments, "all 1 rows were dropped: 1 with no label within 256 tokens")


def test_a_prompt_longer_than_the_context(refused):
    refused(replaced(GENERATE, "--prompt", "x" * 200), "200 tokens and max_new_tokens 128 make 328, over the model's")


def test_completions_that_leave_the_context(refused):
    refused([*EVAL, "--max-new-tokens", "253"], "4 tokens and max_new_tokens 253 make 257, over the model's context")


# ---------------------------------------------------------------- adapters


def test_a_target_pattern_without_a_match(refused):
    refused([*TRAIN, "--targets", "q_proj,query"], "--targets 'query' matches no linear layer")
    refused([*TRAIN, "--targets", ".*\\.query"], "matches no linear layer")


@pytest.mark.parametrize(
    "arguments", [[*EVAL, "--adapter", "foreign"], [*GENERATE, "--adapter", "foreign"], MERGE, EXPORT]
)
def test_an_adapter_of_another_model(refused, arguments):
    refused(replaced(arguments, "--adapter", "foreign"), "has shape (3, 32), expected (3, 24)", "another model's")


def test_an_adapter_whose_config_asks_for_something_else(place, refused):
    config = json.loads((place / "foreign" / "adapter_config.json").read_text())
    (place / "foreign" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    for arguments in ([*GENERATE, "--adapter", "foreign"], ["inspect", "foreign"]):
        refused(arguments, 'peft_type is "LOHA", expected "LORA"')
    (place / "foreign" / "adapter_config.json").write_text("{")
    refused(["inspect", "foreign"], "adapter_config.json, line 1: malformed JSON")


def test_a_setting_in_an_adapters_file_is_blamed_on_the_file(place, refused):
    config = json.loads((place / "foreign" / "adapter_config.json").read_text())
    (place / "foreign" / "adapter_config.json").write_text(json.dumps(config | {"r": 0}))
    going_on = replaced([*TRAIN, "--adapter", "foreign"], "--out", "fresh")
    for arguments in ([*GENERATE, "--adapter", "foreign"], ["inspect", "foreign"], going_on):
        refused(arguments, "error: foreign/adapter_config.json: LoraConfig.r is 0, expected")


def test_a_file_that_has_the_name_of_an_option_is_no_option(refused):
    refused([*GENERATE, "--adapter", "model"], "error: model is a model, not an adapter")


def test_a_list_of_names_without_a_name(refused):
    for option in ("--targets", "--exclude", "--modules-to-save"):
        refused([*TRAIN, option, " ,"], "found no name in ' ,', expected endings of modules' names")


# ---------------------------------------------------------------- truncated and damaged files


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("model/model.safetensors", GENERATE), ("adapter/adapter_model.safetensors", MERGE)],
)
def test_a_folder_in_the_place_of_a_file_of_tensors_and_none_at_all(place, refused, name, arguments):
    (place / name).unlink()
    if name.startswith("adapter"):
        refused(arguments, f"error: {name} is missing, expected a safetensors file: download or save it again")
    (place / name).mkdir()
    refused(arguments, f"error: {name} is a folder, expected a safetensors file")


def test_an_empty_file(place, refused):
    (place / "data.gguf").touch()
    refused(["inspect", "data.gguf"], "data.gguf is not a GGUF file: it is empty; download or save it again")


@pytest.mark.parametrize("command", [*USING_A_MODEL, "inspect"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.6, 0.999])
def test_a_truncated_safetensors_model(place, refused, command, share):
    truncate(place / "model" / "model.safetensors", share)
    arguments = USING_A_MODEL.get(command, ["inspect", "model"])
    refused(arguments, "model.safetensors")


@pytest.mark.parametrize(
    "arguments",
    [[*EVAL, "--adapter", "adapter"], [*GENERATE, "--adapter", "adapter"], MERGE, EXPORT, ["inspect", "adapter"]],
)
def test_a_truncated_adapter(place, refused, arguments):
    truncate(place / "adapter" / "adapter_model.safetensors")
    refused(arguments, "adapter_model.safetensors is not a whole safetensors file")


@pytest.fixture
def gguf_file(place) -> Path:
    """A small GGUF file, whole."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(place / "tiny.gguf", "llama")
    writer.add_uint32("llama.block_count", 0)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place / "tiny.gguf"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.99])
def test_a_truncated_gguf_file(gguf_file, refused, share):
    truncate(gguf_file, share)
    for arguments in (
        ["inspect", "tiny.gguf"],
        replaced(GENERATE, "--model", "tiny.gguf"),
        replaced(EVAL, "--model", "tiny.gguf"),
    ):
        refused(arguments, "tiny.gguf")


def test_the_gguf_file_that_is_truncated_is_read_when_it_is_whole(gguf_file, run):
    assert run("inspect", gguf_file)[0] == 0


def test_a_file_that_is_something_else(place, refused):
    (place / "picture.gguf").write_bytes(b"\x89PNG\r\n")
    refused(["inspect", "picture.gguf"], "picture.gguf is not a GGUF file")
    refused(["inspect", "data.jsonl"], "data.jsonl is not a GGUF file")
    refused(replaced(GENERATE, "--model", "data.jsonl"), "data.jsonl is a file, expected a model directory or a .gguf")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'; supported are"),
        ({"hidden_act": "relu6"}, "hidden_act = 'relu6'"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2."),
        ({"intermediate_size": 41}, "its configuration calls for (41, 24)"),
    ],
)
def test_a_config_that_does_not_fit(place, refused, change, expected):
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(GENERATE, expected)


def test_weights_with_a_nan_in_them(place, refused):
    model = ml.load_model(place / "model", dtype="float32")
    weight = model.network.lm_head.weight
    weight.data = weight.data.copy()
    weight.data[7, 3] = float("nan")
    model.save(place / "nan")
    refused(replaced(GENERATE, "--model", "nan"), "logits are not finite")
    refused(replaced(MERGE, "--model", "nan"), "logits differ", "nothing was written")


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("command", ["merge", "export", "train", "eval"])
def test_a_full_disk_while_saving(place, refused, full_disk, command):
    refused(USING_A_MODEL[command], "the disk is full")
    if command == "train":
        refused(TRAIN_ANEW, "the disk is full")


def test_a_full_disk_leaves_no_new_directory_with_something_in_it(run, place, full_disk):
    for arguments in (replaced(MERGE, "--out", "fresh"), replaced(EXPORT, "--out", "fresh"), TRAIN_ANEW):
        assert run(*arguments)[0] == 1
        assert not (place / "fresh").exists() or not any((place / "fresh").iterdir())


def test_a_tokenizer_of_another_model(place, refused):
    """One with more tokens than the embedding has rows."""
    model = texts.model(vocab_size=100)
    model.save(place / "small")
    refused(replaced(replaced(GENERATE, "--model", "small"), "--prompt", "~é"), "must lie in 0 … 99", "another model's")
