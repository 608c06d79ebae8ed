"""Settings that cannot be meant, and data that cannot be trained on, are refused before anything starts."""

import numpy as np
import pytest

import minilora as ml
from minilora.data import Example
from minilora.errors import MiniloraError
from tests import texts
from tests.train import made


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a whole number of at least 1"),
        ({"steps": True}, "steps is True"),
        ({"epochs": 1.5}, r"epochs is 1\.5, expected a whole number"),
        ({"steps": 3, "epochs": 1}, "steps = 3 and epochs = 1, expected one of them"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": -1}, "accumulate is -1"),
        ({"lr": "1e-4"}, r"lr is '1e-4', expected a number above 0, e\.g\. 1e-4"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": 0}, "eps is 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\)"),
        ({"betas": 0.9}, r"betas is 0\.9"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"warmup": 1.5}, r"warmup is 1\.5, expected a whole number of steps, or a fraction"),
        ({"warmup": -1}, "warmup is -1"),
        ({"schedule": "step"}, "schedule is 'step', expected one of constant, linear, cosine"),
        ({"max_length": 1}, "max_length is 1"),
        ({"valid_fraction": 1}, "valid_fraction is 1"),
        ({"packing": "yes"}, "packing is 'yes', expected true or false"),
        ({"keep": -1}, "keep is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"out": ""}, "out is ''"),
        ({"save_every": 5}, "save_every = 5 without out"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(setting, message):
    with pytest.raises(MiniloraError, match=message):
        ml.TrainConfig(**setting)


def test_warmup_counts_steps_or_is_a_fraction_of_them():
    assert ml.TrainConfig(warmup=7).warmup_steps(100) == 7
    assert ml.TrainConfig(warmup=0.25).warmup_steps(100) == 25
    assert ml.TrainConfig(warmup=0).warmup_steps(100) == 0


def test_rows_have_the_models_context_at_most():
    assert ml.TrainConfig().row_length(8192) == 1024
    assert ml.TrainConfig().row_length(256) == 256
    assert ml.TrainConfig(max_length=2048).row_length(8192) == 2048
    with pytest.raises(MiniloraError, match=r"max_length is 9,000, over the model's context of 8,192"):
        ml.TrainConfig(max_length=9000).row_length(8192)


def row(tokens, labels=None):
    return Example(np.array(tokens), np.array(tokens if labels is None else labels))


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([], {}, "no rows to train on"),
        ([row(range(3, 53)), row([3] * 65)], {}, "training example 1 has 65 tokens, over the 64"),
        ([row([3] * 11)], {"max_length": 10}, "training example 0 has 11 tokens, over the 10"),
        ([row([3, 4]), row([3, 4], [3, -100])], {}, "training example 1 has no label that counts"),
        ([row([3, 61])], {}, "training example 0 has the token 61, expected less than 61"),
        ([row([3, 4])], {"eval_every": 1}, r"eval_every = 1 and no rows to validate on.*valid_fraction"),
        ([row([3, 4])], {"valid_fraction": 0.5}, "hand other rows over as valid="),
        ([row([3, 4])], {"max_length": 65}, "over the model's context of 64"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, rows, config, message):
    with pytest.raises(MiniloraError, match=message):
        made.train(made.model(), rows, out=tmp_path / "run", **config)
    assert not (tmp_path / "run").exists()


def test_validation_rows_are_checked_before_training(tmp_path):
    with pytest.raises(MiniloraError, match="validation example 0 has the token 99"):
        made.train(made.model(), made.examples(4), out=tmp_path / "run", call={"valid": [row([3, 99])]})
    assert not (tmp_path / "run").exists()


def test_a_file_a_folder_and_a_dataset_are_the_same_data(tmp_path, capsys):
    lines = [f'{{"prompt": "{number}+1=", "completion": "{number + 1}"}}\n' for number in range(12)]
    (tmp_path / "train.jsonl").write_text("".join([*lines, '{"prompt": "x", "completion": "' + "y" * 300 + '"}\n']))
    (tmp_path / "valid.jsonl").write_text("".join(lines[:3]))
    losses = []
    for data in ("train.jsonl", ".", "dataset"):
        network = texts.model()
        network.add_adapter("a")
        source = ml.data.load_data(tmp_path, network.tokenizer, 20) if data == "dataset" else tmp_path / data
        result = ml.train(network, source, ml.TrainConfig(steps=3, batch_size=4, max_length=20))
        losses.append([record["loss"] for record in result.history])
        assert (result.validation_loss is None) == (data == "train.jsonl")
    assert losses[0] == losses[1] == losses[2]
    shown = capsys.readouterr().out
    assert "train: 13 rows" in shown
    assert "1 truncated to 20 tokens" in shown
    assert "each epoch: 4 batches, 13 rows" in shown
    assert "padding" in shown


def test_a_fraction_of_the_rows_is_held_back_for_validation(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(10)))
    network = texts.model()
    network.add_adapter("a")
    config = ml.TrainConfig(epochs=1, batch_size=1, valid_fraction=0.3)
    result = ml.train(network, tmp_path / "d.jsonl", config, quiet=True)
    assert result.steps == 7
    assert result.validation_loss is not None
