"""`minilora plan`: the article's table, columns side by side, JSON, and bad input in one line."""

from __future__ import annotations

import json
import re

import pytest

from tests import tiny


def planned(run, *arguments):
    status, shown, errors = run("plan", *arguments, "--json")
    assert (status, errors) == (0, "")
    return json.loads(shown)


def test_the_table_of_one_matrix(run):
    status, shown, errors = run("plan", "4096x4096", "--rank", "4,8,16,64")
    assert (status, errors) == (0, "")
    lines = [line.split() for line in shown.splitlines()[2:]]
    assert lines == [
        "full 16,777,216 100 %".split(),
        "rank 4 32,768 0.2 %".split(),
        "rank 8 65,536 0.4 %".split(),
        "rank 16 131,072 0.8 %".split(),
        "rank 64 524,288 3.1 %".split(),
    ]
    found = planned(run, "4096x11008", "--rank", "8")
    assert found == {
        "out": 4096, "in": 11008, "parameters": 4096 * 11008,
        "lora": [{"rank": 8, "trained": 8 * 15104, "share": 8 * 15104 / (4096 * 11008)}],
    }  # fmt: skip


def test_a_model_has_a_column_for_each_way_and_a_line_for_each_part(run):
    arguments = ("llama-7b", "--rank", "8,64", "--dtype", "bfloat16", "--adapter-dtype", "bfloat16", "--max-length", 64)
    status, shown, errors = run("plan", *arguments)
    assert (status, errors) == (0, "")
    assert "llama-7b: 6,738,415,616 parameters" in shown
    lines = {line[:20].strip(): line for line in shown.splitlines()}
    assert lines["trained parameters"].split()[2:] == ["6,738,415,616", "19,988,480", "159,907,840"]
    assert lines["of all"].split()[2:] == ["100", "%", "0.3", "%", "2.4", "%"]
    assert lines["weights of the base"].split()[4:] == ["27.0", "GB", "13.5", "GB", "13.5", "GB"]
    assert lines["file that is saved"].split()[4:] == ["13.5", "GB", "40.0", "MB", "319.9", "MB"]
    by_name = {cells[0]: cells[1:] for line in shown.splitlines() if (cells := re.split(r"\s{2,}", line))}
    assert by_name["laptop with 16 GB"] == ["16 GiB, 17.2 GB", "13.6 GB", "–", "–", "–"]
    assert by_name["A100, H100 80 GB"][:2] == ["80 GiB, 85.9 GB", "85.4 GB"]
    assert "20% of a computer's memory is left to the system, 150 MB to the program" in shown
    assert "0.5 GiB of a card are left to its driver and the CUDA context" in shown
    assert "on a GPU, estimated (bfloat16)" in shown


def test_json_has_the_numbers_of_the_table(run):
    found = planned(run, "gpt2", "--rank", "4,8", "--batch-size", "2", "--max-length", "64", "--checkpoint")
    assert (found["model"], found["parameters"], found["dtype"]) == ("gpt2", 124_439_808, "float32")
    assert (found["batch_size"], found["length"], found["checkpoint"], found["device"]) == (2, 64, True, "cpu")
    assert [(way["method"], way["rank"]) for way in found["ways"]] == [("full", None), ("lora", 4), ("lora", 8)]
    for way in found["ways"]:
        parts = way["bytes"]
        assert parts["peak"] == sum(value for name, value in parts.items() if name not in ("peak", "file"))
        assert way["fits"].keys() == {"cpu", "cuda"}
        assert all(way["fits"]["cuda"].values())
        assert list(way["fits"]["cuda"]) == [machine["name"] for machine in found["machines"]["cuda"]]
    card = found["machines"]["cuda"][0]
    assert card == {"name": "RTX 4060", "memory_gib": 8, "usable_bytes": 8 * 2**30 - 2**29}
    four, eight = (way["trained"] for way in found["ways"][1:])
    assert eight == 2 * four


def test_targets_exclusions_and_a_configuration_without_weights(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA))
    q = planned(run, tmp_path, "--targets", "q_proj", "--rank", "3")["ways"][1]["trained"]
    assert q == 2 * 3 * (24 + 32)
    all_but_q = planned(run, tmp_path, "--exclude", "q_proj", "--rank", "3")["ways"][1]["trained"]
    assert planned(run, tmp_path, "--rank", "3")["ways"][1]["trained"] == q + all_but_q


def test_magnitudes_frozen_as_whole_modules_and_biases_are_planned(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.LLAMA | {"attention_bias": True}))

    def trained(*arguments):
        return planned(run, tmp_path, "--targets", "q_proj", "--rank", "3", *arguments)["ways"][1]["trained"]

    plain = trained()
    outputs = 2 * 32
    assert trained("--dora") == plain + outputs
    assert trained("--variant", "lora_fa") == 3 * outputs
    assert trained("--bias", "lora_only") == plain + outputs
    assert trained("--modules-to-save", "model.norm") == plain + 24
    status, shown, _ = run("plan", tmp_path, "--dora", "--max-length", 8)
    assert (status, "DoRA, rank 8" in shown) == (0, True)


def test_on_a_gpu_it_is_said_to_be_an_estimate_and_the_base_is_bfloat16(run):
    status, shown, _ = run("plan", "smollm2-135m", "--device", "cuda", "--max-length", 64, "--checkpoint")
    assert status == 0
    assert "on a GPU (an estimate)" in shown
    assert "LoRA holds the base in bfloat16" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["llama-8"], "llama-8 was not found: expected a model directory"),
        (["gpt2", "--variant", "lora_fb"], "--variant is 'lora_fb', expected one of lora, lora_fa"),
        (["gpt2", "--bias", "some"], "--bias is 'some', expected one of none, all, lora_only"),
        (["gpt2", "--modules-to-save", "h.99"], "--modules-to-save 'h.99' matches no module"),
        (["gpt2", "--targets", "q_proj"], "--targets 'q_proj' matches no"),
        (["gpt2", "--max-length", "2000"], "--max-length is 2,000, over the model's context of 1,024"),
        (["gpt2", "--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["gpt2", "--label-share", "2"], "--label-share is 2.0, expected above 0 and at most 1"),
        (["gpt2", "--dtype", "int3"], "--dtype is 'int3', expected one of"),
        (["gpt2", "--adapter-dtype", "int3"], "--adapter-dtype is 'int3', expected one of"),
        (["gpt2", "--device", "tpu"], "--device is 'tpu', expected cpu or cuda"),
    ],
)
def test_bad_input_is_one_line(run, arguments, expected):
    status, shown, errors = run("plan", *arguments)
    assert (status, shown) == (1, "")
    (line,) = errors.splitlines()
    assert expected in line


@pytest.mark.parametrize("rank", ["0", "4,-1", "many", ""])
def test_ranks_that_are_no_ranks_are_wrong_usage(run, rank):
    status, shown, errors = run("plan", "gpt2", "--rank", rank)
    assert (status, shown) == (2, "")
    assert "--rank" in errors
