"""The suite notices planted bugs: a sample of them here, all of them with --thorough or `python -m tests.mutants`."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from tests.mutants.harness import run_all
from tests.mutants.planted import MUTANTS

SAMPLE = 9  # one in so many is planted in a default run


def test_there_are_enough_distinct_bugs_and_each_still_finds_its_place():
    mutated = [(mutant.file, mutant.apply(mutant.source())) for mutant in MUTANTS]
    assert len(set(mutated)) == len(MUTANTS) >= 60
    for _, source in mutated:
        ast.parse(source)  # a syntax error would be noticed by any test


def test_a_snippet_that_is_gone_or_not_alone_is_an_error():
    mutant = MUTANTS[0]
    for original in ("no such line", "return"):
        with pytest.raises(ValueError, match="expected once"):
            list(run_all([replace(mutant, original=original)]))
    without_effect = replace(mutant, mutated=mutant.original)
    with pytest.raises(ValueError, match="is not changed"):
        list(run_all([without_effect]))


def test_planted_bugs_are_noticed_and_what_is_none_is_not(pytestconfig):
    """Among them one change that is no bug: a harness that calls everything noticed would fail here."""
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("bugs are planted in runs on the CPU")
    harmless = replace(MUTANTS[0], mutated=f"{MUTANTS[0].original}  ", what="two spaces")
    chosen = MUTANTS if pytestconfig.getoption("--thorough") else MUTANTS[::SAMPLE]
    *outcomes, none = run_all([*chosen, harmless])
    assert not [outcome.mutant.what for outcome in outcomes if not outcome.killed_by]
    assert none.killed_by == ""
