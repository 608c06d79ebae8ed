"""The benchmarks' own parts, as far as they need no stopwatch: cases, records, tables, what is switched off."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest

from minilora import ops
from minilora.kernels.cpu import memory
from tests.bench import ours
from tests.bench.cases import CASES, SDPA, Case, Side, Target
from tests.bench.common import IGNORED, labels_of, random_tokens
from tests.bench.measure import ROOT, UNSET, Worker, measure, record
from tests.bench.optimisations import OPTIMISATIONS, no_kernels, replaced
from tests.bench.tables import (
    filled,
    measured_table,
    optimisations_table,
    reached,
    seconds_text,
    sections,
    targets_table,
)

PAGE, RECORD = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.json"


def side(*seconds: float, peak: int = 10**9) -> dict:
    return {"seconds": list(seconds), "peak_bytes": peak, "private_bytes": peak, "environment": {"python": "3"}}


def results_of(name: str, *sides: dict) -> dict:
    return {name: {"sides": {each.name: found for each, found in zip(CASES[name].sides, sides, strict=True)}}}


def test_every_side_of_every_case_names_a_job_that_takes_its_options():
    for case in CASES.values():
        for each in case.sides:
            if each.program == "ours":
                inspect.signature(getattr(ours, each.job)).bind(**each.options)


def test_every_target_is_against_a_side_of_its_own_case():
    for case in CASES.values():
        assert {target.against for target in case.targets} <= {each.name for each in case.sides} | {None}


def test_a_ratio_is_of_the_medians():
    case = CASES["prefill"]
    assert (
        reached(case, results_of("prefill", side(1, 5, 2), side(4, 1, 9))["prefill"]["sides"], case.targets[0]) == 0.5
    )


@pytest.mark.parametrize(("ours_seconds", "verdict"), [(6.5, "goal met"), (7.1, "met"), (7.3, "**missed**")])
def test_targets_are_met_missed_or_their_goal_is_met(ours_seconds, verdict):
    found = results_of("train-4x256", side(ours_seconds), side(10.0), side(10.0))
    row = next(line for line in targets_table(found).splitlines() if f"time against {SDPA} |" in line)
    assert row.split("|")[-2].strip() == verdict
    assert f"{ours_seconds / 10:.3f}" in row


def test_a_table_shows_the_median_the_spread_and_tokens_a_second():
    text = measured_table("training", results_of("train-1x512", side(2.0, 1.0, 4.0), side(3.0), side(5.0)))
    row = text.splitlines()[2]
    assert "**2.00 s**" in row
    assert "1.00 s … 4.00 s" in row
    assert f"{512 / 2:.1f}" in row


def test_seconds_are_written_in_their_unit():
    assert [seconds_text(value) for value in (7e-6, 0.0123, 0.25, 4.2)] == ["7 µs", "12.3 ms", "250 ms", "4.20 s"]


def test_the_cost_of_leaving_an_optimisation_out_is_relative_to_the_step_with_it():
    text = optimisations_table({"buffers": {"where": "here", "with": [4.0, 4.0, 9.0], "without": [5.0]}})
    assert "+25.0 %" in text


def test_records_add_up_and_replace_their_own_case(tmp_path):
    file = tmp_path / "performance.json"
    for name, seconds in (("decode", 1.0), ("load", 2.0), ("decode", 3.0)):
        record(file, CASES[name], {each.name: side(seconds) for each in CASES[name].sides})
    cases = json.loads(file.read_text())["cases"]
    assert {name: found["sides"][CASES[name].sides[0].name]["seconds"] for name, found in cases.items()} == {
        "decode": [3.0],
        "load": [2.0],
    }


def test_a_page_keeps_everything_but_what_stands_between_its_markers():
    page = "a\n<!-- bench:x -->\nold\n<!-- /bench -->\nb\n<!-- bench:y -->\n<!-- /bench -->\n"
    assert filled(page, {"x": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError, match="0 places"):
        filled(page, {"z": "new"})


def test_the_page_has_the_tables_of_the_record():
    page = PAGE.read_text("utf-8")
    assert filled(page, sections(json.loads(RECORD.read_text("utf-8")))) == page


def test_labels_are_on_the_end_of_each_row():
    tokens = random_tokens(3, 10)
    labels = labels_of(tokens, 0.3)
    assert (labels[:, :7] == IGNORED).all()
    assert np.array_equal(labels[:, 7:], tokens[:, 7:])
    assert np.array_equal(labels_of(tokens, 1.0), tokens)


def test_a_side_runs_in_a_process_without_the_variables_that_choose_a_blas_kernel(monkeypatch):
    for name in UNSET:
        monkeypatch.setenv(name, "Haswell")
    case = Case("help", "", "loading", (Side("us", "ours", "help"),), (Target("seconds", 1.0),), fresh=True, repeat=2)
    found = measure(case)["us"]
    assert len(found["seconds"]) == 2
    assert found["peak_bytes"] > found["private_bytes"] > 1e6
    assert "Haswell" not in found["environment"]["blas"]


def test_a_side_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no_such_job"):
        Worker(Side("us", "ours", "no_such_job"), 1)


def test_what_is_switched_off_is_on_again_afterwards():
    kept = list(ops.silu_mul.kernels)
    for optimisation in OPTIMISATIONS:
        with optimisation.without():
            pass
    with no_kernels("silu_mul"):
        assert all(kernel.device != "cpu" for kernel in ops.silu_mul.kernels)
    assert ops.silu_mul.kernels == kept
    before = memory.SMALLEST
    with replaced((memory, "SMALLEST", 1)):
        assert memory.SMALLEST == 1
    assert before == memory.SMALLEST
