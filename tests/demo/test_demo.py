"""The demo, on a tiny model: what it claims it measures, and what it measures is right."""

import json
import random
import re
from dataclasses import replace
from datetime import date

import numpy as np
import pytest

import minilora as ml
from minilora.demo import TASKS, run_demo
from minilora.demo import show as demo
from minilora.demo.tasks import date_rows, written
from minilora.train.folder import ADAPTER
from tests import texts


class Heard(demo.Watcher):
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def stage(self, title, about=""):
        self.told.append(title)

    def found(self, results, what):
        self.told.append(what)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "base"
    texts.model().save(path)
    return str(path)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """(the folder, the results, what was told) of a demo of two steps for each adapter."""
    out, heard = tmp_path_factory.mktemp("demo") / "out", Heard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SPEED_BATCH", (2, 32))
        patch.setattr(demo, "exactly_right", lambda model, rows, plain=demo.exactly_right: plain(model, rows[:8]))
        results = run_demo(out, seed=3, steps=2, watch=heard, model=base)
    return out, results, heard.told


def test_every_part_is_told_of_in_order(finished):
    _, results, told = finished
    found = [name for name in told if hasattr(results, name)]
    assert found == ["base_texts", *["learned"] * 3, "continued", "full", "merged", "checked"]


def test_three_adapters_are_left_that_load_on_the_base_and_write_what_was_shown(finished, base):
    out, results, _ = finished
    model = ml.load_model(base, dtype="float32")
    for task in TASKS:
        assert all((out / task.name / name).exists() for name in ADAPTER)
        model.load_adapter(task.name, out / task.name)
    for row in results.continued:
        for name, text in row.texts.items():
            model.set_adapter(None if name == "base" else name)
            assert model.generate(row.prompt, demo.NEW_TOKENS, **demo.DRAW, seed=3) == text
    assert results.one_batch_agrees


def test_the_base_is_as_it_was_and_merging_changes_rounding_only(finished):
    merged = finished[1].merged
    assert merged.restored
    assert merged.difference < 1e-5 * merged.scale
    assert merged.same_text
    assert set(merged.pass_seconds) == set(merged.token_seconds) == {"base", "adapter", "merged"}


def test_an_adapter_that_is_merged_wrongly_would_be_seen(base, finished, monkeypatch):
    out, results, _ = finished
    model = ml.load_model(base, dtype="float32")
    for task in TASKS:
        model.load_adapter(task.name, out / task.name)
    right = ml.Model.merge_adapter
    monkeypatch.setattr(ml.Model, "merge_adapter", lambda self, name: right(self, {name: 1.01}))
    wrong = demo.Results(base, 0, 0, 0)
    demo.merge(model, wrong, demo.Demo(out, 3, None, demo.Watcher(), base))
    assert wrong.merged.difference > 100 * results.merged.difference
    assert "merging changed the logits" in wrong.fault()


def test_what_cannot_be_so_is_a_fault(finished):
    results = finished[1]
    assert results.fault() is None
    broken = replace(results, checked=replace(results.checked, wrong=2))
    assert broken.fault() == "2 gradients differ from the finite differences"
    broken = replace(results, merged=replace(results.merged, restored=False))
    assert "bit for bit" in broken.fault()
    broken = replace(results, merged=replace(results.merged, difference=float("nan")))
    assert "merging changed" in broken.fault()


def test_the_bytes_are_those_of_two_moments_for_each_trained_parameter(finished):
    results = finished[1]
    assert results.lora.moments == 2 * 4 * results.trainable
    assert results.full.moments == 2 * 4 * results.parameters
    assert results.lora.gradients == results.lora.parameters == 4 * results.trainable


def test_the_gradients_were_checked_and_none_is_wrong(finished):
    checked = finished[1].checked
    assert checked.comparisons > 0
    assert checked.wrong == 0
    assert checked.worst < 1e-5


def test_the_results_and_the_page_say_the_same(finished):
    out, results, _ = finished
    stored = json.loads((out / "demo.json").read_text())
    assert stored["trainable"] == results.trainable
    html = (out / "report.html").read_text("utf-8")
    assert f"{results.trainable:,} trained beside {results.parameters:,} frozen" in html
    for task in results.learned:
        assert f"{task.loss_after:.3f}" in html


def test_the_same_seed_gives_the_same_adapters(finished, base, tmp_path, monkeypatch):
    out, results, _ = finished
    monkeypatch.setattr(demo, "SPEED_BATCH", (2, 32))
    monkeypatch.setattr(demo, "exactly_right", lambda model, rows: 0)
    again = run_demo(tmp_path / "again", seed=3, steps=2, model=base)
    assert again.continued == results.continued
    for task in TASKS:
        name = f"{task.name}/adapter_model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_a_folder_that_is_no_demos_is_refused_and_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ml.MiniloraError, match="not empty and holds no earlier demo"):
        run_demo(tmp_path)
    with pytest.raises(ml.MiniloraError, match="is a file"):
        run_demo(tmp_path / "mine.txt")
    with pytest.raises(ml.MiniloraError, match="steps is 0"):
        run_demo(tmp_path / "new", steps=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --- the tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_training_and_validation_rows_have_nothing_in_common(task):
    training, validation = task.rows(0)
    assert len(validation) >= 40
    assert len(training) > 10 * len(validation) or task.exact
    assert not {json.dumps(row) for row in training} & {json.dumps(row) for row in validation}
    assert task.rows(0) == (training, validation) != task.rows(1)


def test_no_day_of_the_validation_rows_is_trained_on():
    training, validation = date_rows(0)
    assert not {row["completion"] for row in training} & {row["completion"] for row in validation}


def test_a_date_is_written_in_three_ways_that_all_say_the_day():
    day = date(2021, 3, 7)
    ways = {written(day, random.Random(seed)) for seed in range(30)}
    assert ways == {"7 March 2021 =", "March 7, 2021 =", "Mar 7 2021 ="}


def test_texts_in_the_package_are_plain_and_as_long_as_a_row_may_be():
    for task in TASKS[:2]:
        rows = [row["text"] for part in task.rows(0) for row in part]
        assert all(re.fullmatch(r"[ -~À-ÿ]+", row) for row in rows), task.name
        assert np.mean([len(row) for row in rows]) < 400
