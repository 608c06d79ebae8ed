"""The 4×4 example does what its text says."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "four_by_four.py"


@pytest.fixture(scope="module")
def finished():
    with contextlib.redirect_stdout(io.StringIO()) as output:
        names = runpy.run_path(str(SCRIPT))
    return names, output.getvalue()


@pytest.fixture(scope="module")
def run(finished):
    return finished[0]


@pytest.fixture(scope="module")
def printed(finished):
    return finished[1]


def rows_of(printed: str) -> dict[int, tuple[float, float, float]]:
    """{step: (loss, |dA|, |dB|)} of the printed table."""
    found = re.findall(r"^ *(\d+) +([\d.]+) +([\d.]+) +([\d.]+)", printed, re.M)
    return {int(step): (float(loss), float(dA), float(dB)) for step, loss, dA, dB in found}


def test_it_fits_on_a_page():
    assert len(SCRIPT.read_text().splitlines()) < 60


def test_eight_numbers_are_trained_and_sixteen_are_frozen(run, printed):
    assert (run["W"].shape, run["A"].shape, run["B"].shape) == ((4, 4), (1, 4), (4, 1))
    assert isinstance(run["W"], np.ndarray)
    assert "W: 16 numbers, frozen." in printed
    assert "8 numbers, trained." in printed


def test_at_step_zero_only_B_has_a_gradient_and_from_then_on_both(printed):
    rows = rows_of(printed)
    assert rows[0][1] == 0
    assert rows[0][2] > 1
    assert rows[1][1] > 0.01
    assert rows[1][2] > 0.01


def test_the_loss_at_step_zero_is_that_of_W_alone(run, printed):
    x, y, W = run["x"], run["y"], run["W"]
    assert rows_of(printed)[0][0] == pytest.approx(np.mean((x @ W.T - y) ** 2), abs=1e-5)


def test_the_task_is_one_that_rank_one_reaches_and_training_reaches_it(run, printed):
    assert np.linalg.matrix_rank(run["target"] - run["W"]) == 1
    assert rows_of(printed)[200][0] < 1e-6
    assert np.abs(run["merged"] - run["target"]).max() < 1e-3


def test_W_is_unchanged_and_merging_gives_the_same_outputs(run):
    W, A, B, new = run["W"], run["A"].data, run["B"].data, run["new"]
    np.testing.assert_array_equal(W, np.random.default_rng(0).normal(size=(4, 4)))
    np.testing.assert_allclose(new @ run["merged"].T, new @ W.T + (new @ A.T) @ B.T, atol=1e-12)
    assert run["difference"] < 1e-12
