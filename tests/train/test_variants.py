"""Runs with the variants of LoRA: exact resume, the settings they leave, and the command line's options for them."""

import json

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.train import TrainingInterrupted
from minilora.train.settings import read_settings
from minilora.train.table import summarise
from tests import texts
from tests.cli.test_train import adapter_bytes, minilora
from tests.train import made
from tests.train.test_resume import at_step, press_ctrl_c

VARIANTS = {
    "dora": {"use_dora": True, "dropout": 0.2},
    "pissa": {"init": "pissa"},
    "pissa_niter": {"init": "pissa_niter_2", "use_rslora": True},
    "lora_fa": {"variant": "lora_fa"},
}
RUN = {"steps": 6, "accumulate": 2, "warmup": 2, "lora_plus_ratio": 4.0}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_has_the_numbers_of_an_unbroken_one(monkeypatch, tmp_path, name):
    unbroken = made.model(**VARIANTS[name])
    made.train(unbroken, out=tmp_path / "unbroken", **RUN)
    with monkeypatch.context() as patch:
        at_step(patch, 3, press_ctrl_c)
        with pytest.raises(TrainingInterrupted):
            made.train(made.model(**VARIANTS[name]), out=tmp_path / "run", **RUN)
    network = made.model(**VARIANTS[name])
    made.train(network, out=tmp_path / "run", call={"resume": True}, **RUN)
    made.assert_same(made.values(network), made.values(unbroken))


def test_the_ratio_reaches_the_optimiser():
    results = []
    for ratio in (None, 1.0, 8.0):
        network = made.model()
        made.train(network, steps=2, lora_plus_ratio=ratio)
        results.append(made.values(network))
    plain, same, faster = results
    made.assert_same(same, plain)
    name = next(key for key in plain if "lora_B" in key)
    assert np.abs(faster[name]).max() > 3 * np.abs(plain[name]).max()


@pytest.mark.parametrize("ratio", [0, -1.0, "16", True, float("inf")])
def test_a_ratio_that_cannot_be_meant_is_named(ratio):
    with pytest.raises(MiniloraError, match=r"lora_plus_ratio is .*, expected a number above 0"):
        ml.TrainConfig(lora_plus_ratio=ratio)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    texts.model().save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("options", "settings", "written"),
    [
        (["--dora"], {"dora": True, "init": "kaiming"}, {"use_dora": True, "r": 2, "init_lora_weights": True}),
        (["--init", "pissa"], {"init": "pissa"}, {"use_dora": False, "r": 4, "init_lora_weights": True}),
        (["--init", "pissa_niter_2", "--rslora"], {"rslora": True, "init": "pissa_niter_2"}, {"r": 4}),
        (["--variant", "lora_fa", "--dropout", 0.1], {"variant": "lora_fa"}, {"r": 2, "lora_dropout": 0.1}),
        (["--init", "gaussian"], {"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    ],
)
def test_the_command_line_trains_each_and_its_settings_do_it_again(base, data, tmp_path, options, settings, written):
    common = ["--model", base, "--data", data, "--rank", 2, "--steps", 2, "--lr", "1e-2", "--lora-plus-ratio", 4]
    status, _, errors = minilora(*common, "--out", tmp_path / "run", "--quiet", *options)
    assert (status, errors) == (0, "")
    found = read_settings(tmp_path / "run" / "minilora.toml")
    assert settings.items() <= found.items()
    assert found["lora_plus_ratio"] == 4
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert written.items() <= saved.items()
    again = minilora("--config", tmp_path / "run" / "minilora.toml", "--out", tmp_path / "again", "--quiet")
    assert again[0] == 0
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dora", "--init", "pissa"], "error: found --dora and --init 'pissa', expected one of them"),
        (["--variant", "lora-fa"], "error: --variant is 'lora-fa', expected one of lora, lora_fa"),
        (["--lora-plus-ratio", "0"], "error: --lora-plus-ratio is 0.0, expected a number above 0"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_leaves_nothing(base, data, tmp_path, options, message):
    status, _, errors = minilora("--model", base, "--data", data, "--out", tmp_path / "run", *options)
    assert status == 1
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_table_counts_magnitudes_with_their_layers():
    network = made.model(use_dora=True, target_modules=["q_proj"])
    summary = summarise(network)
    assert [row.pattern for row in summary.rows] == ["q_proj"]
    assert summary.trainable == sum(tensor.size for tensor in network.parameters().values())
