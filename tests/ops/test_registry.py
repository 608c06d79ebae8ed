"""Nothing escapes the suite: every primitive and kernel is compared with what it should be, and the page says so."""

from __future__ import annotations

import json
from functools import partial

from minilora.tensor import PRIMITIVES
from tests.cases import CASES, Call, check_kernels
from tests.cases.case import for_each
from tests.cases.report import PAGE, RECORD, formula_and_source, measure, render
from tests.kernels.test_cpu import large_calls


def test_every_primitive_has_a_case():
    assert set(CASES) == set(PRIMITIVES)


def test_every_kernel_applies_to_some_call_and_is_compared_there(device):
    kind = device.partition(":")[0]
    compared: set[str] = set()

    def compare(name: str, call: Call) -> None:
        compared.update(check_kernels(name, CASES[name], call, device, ("float64", "float32")))

    for name, case in CASES.items():
        for_each(case.calls, 5, partial(compare, name))
        if name in large_calls():
            compare(name, large_calls()[name])
    kernels = {
        kernel.name for primitive in PRIMITIVES.values() for kernel in primitive.kernels if kernel.device == kind
    }
    assert compared == kernels


def test_the_page_of_gradients_is_what_the_record_says():
    """After a change: python -m tests.cases.report, or with --render where only docstrings have changed."""
    records = json.loads(RECORD.read_text("utf-8"))
    assert PAGE.read_text("utf-8") == render(records), "docs/gradients.md is out of date: see this test's docstring"
    kernels = {
        kernel.name for primitive in PRIMITIVES.values() for kernel in primitive.kernels if kernel.device == "cpu"
    }
    assert set(records["cpu"]["primitives"]) == set(PRIMITIVES)
    assert set(records["cpu"]["kernels"]) == kernels


def test_every_primitive_states_its_formula():
    for name, primitive in PRIMITIVES.items():
        formula, source = formula_and_source(primitive)
        assert "=" in formula, f"{name}'s docstring has no formula"
        assert source


def test_a_record_holds_the_errors_of_this_device(device):
    record = measure(device, examples=1)
    assert set(record["primitives"]) == set(CASES)
    assert all(error < 1e-4 for errors in record["primitives"].values() for error in errors.values())
