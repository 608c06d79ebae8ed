"""Texts that the model writes along the way: when, which, and without changing the training."""

import json

import pytest

import minilora as ml
from minilora.train.progress import Quiet
from tests import texts
from tests.train import made

PROMPTS = ("once upon", "the end")


def model() -> ml.Model:
    network = texts.model()
    network.add_adapter("a", ml.LoraConfig(r=3, alpha=6, dropout=0.1), seed=0)
    return network


def test_samples_are_what_generate_writes_at_the_start_along_the_way_and_at_the_end():
    network = model()
    before = {prompt: network.generate(prompt, 40) for prompt in PROMPTS}
    result = made.train(network, steps=5, sample_prompt=list(PROMPTS), sample_every=2)
    taken = {record["step"]: record["samples"] for record in result.history if "samples" in record}
    assert list(taken) == [0, 2, 4, 5]
    assert taken[0] == before
    assert taken[5] == {prompt: network.generate(prompt, 40) for prompt in PROMPTS} != before


def test_eight_times_in_a_run_is_what_is_taken_by_itself():
    result = made.train(model(), steps=16, sample_prompt="once")
    assert [record["step"] for record in result.history if "samples" in record] == list(range(0, 17, 2))


def test_samples_change_no_number_of_the_training():
    plain, sampled = model(), model()
    made.train(plain, steps=4)
    made.train(sampled, steps=4, sample_prompt=PROMPTS, sample_every=1)
    made.assert_same(made.values(sampled), made.values(plain))


def test_samples_are_in_the_metrics_file_beside_the_validation_losses(tmp_path):
    network = model()
    made.train(
        network, steps=2, out=tmp_path / "run", eval_every=1, sample_prompt="once", sample_every=1,
        call={"valid": made.examples(4, seed=1)},
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], "validation_loss" in record, "samples" in record) for record in records] == [
        (step, True, True) for step in range(3)
    ]


def test_whoever_is_shown_the_progress_hears_of_steps_and_samples(capsys):
    class Listener(Quiet):
        def __init__(self):
            self.lines, self.steps = [], []

        def line(self, text):
            self.lines.append(text)

        def step(self, report):
            self.steps.append(report.step)

    listener = Listener()
    made.train(model(), steps=3, sample_prompt="once", call={"quiet": False, "show": listener})
    assert listener.steps == [1, 2, 3]
    assert sum("once" in line for line in listener.lines) == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_prompt": ""}, "sample_prompt is '', expected a text"),
        ({"sample_prompt": [3]}, r"sample_prompt is \[3\], expected a text"),
        ({"sample_every": 4}, "sample_every = 4 without a sample_prompt"),
        ({"sample_prompt": "a", "sample_every": 0}, "sample_every is 0"),
    ],
)
def test_settings_of_samples_that_cannot_be_meant_are_named(settings, message):
    with pytest.raises(ml.MiniloraError, match=message):
        ml.TrainConfig(**settings)
