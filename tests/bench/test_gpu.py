"""The table of the GPU's benchmark, from its record."""

from __future__ import annotations

from tests.bench.gpu import CASES, IN_LINE, MARKED, PAGE, SIDES, SIDES_OF_TORCH, tables


def record(milliseconds: float, gibibytes: float = 1.0) -> dict:
    return {"seconds": [milliseconds / 1000] * 3, "peak_bytes": gibibytes * 2**30, "versions": "v 1"}


def test_the_page_has_a_place_for_the_table():
    assert len(MARKED.findall(PAGE.read_text(encoding="utf-8"))) == 1


def test_every_side_of_a_case_is_known_and_has_a_column():
    assert {side for case in CASES.values() for side in case.sides} == {"ours", *SIDES_OF_TORCH}
    assert set(SIDES) == {"ours", IN_LINE, *SIDES_OF_TORCH}


def test_a_row_says_whether_its_targets_are_met_and_is_measured_against_the_fastest():
    sides = {"ours": record(120, 20.5), IN_LINE: record(130), "eager": record(250), "eager-bf16": {"failed": "why"}}
    sides["compiled"] = record(150) | {"seconds": [0.14, 0.15, 0.17]}
    text = tables({"card": "a card", "commit": "abc", "cases": {"llama-7b": sides}})
    (row,) = [line for line in text.splitlines() if line.startswith("| Llama-7B")]
    assert "| 120.0 ms, 20.5 | 250.0 ms, 1.0 | 150.0 ms ± 10 %, 1.0 | 0.80 |" in row  # no column without a number
    assert row.endswith("| 125 ms: met; goal 100 ms: missed; 20 GiB: missed |")
    assert text.startswith("a card; v 1; all of commit abc")
    assert text.endswith("Not measured: Llama-7B, 1 × 2048, eager-bf16: why.\n")
