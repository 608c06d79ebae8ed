"""The example of many adapters proves what it says."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "many_adapters.py"


@pytest.fixture(scope="module")
def finished():
    with contextlib.redirect_stdout(io.StringIO()) as output:
        names = runpy.run_path(str(SCRIPT))
    return names, output.getvalue()


def test_every_adapter_ends_where_a_run_of_its_own_ends(finished):
    names, printed = finished
    assert set(names["differences"]) == {"law", "code", "chat"}
    assert all(0 <= value < 1e-12 for value in names["differences"].values())
    rows = re.findall(r"^(\w+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +[\d.e-]+$", printed, re.M)
    assert [row[0] for row in rows] == list(names["ADAPTERS"])
    for _, _, first, last, alone in rows:
        assert last == alone
        assert float(last) < float(first) - 0.5


def test_the_batches_are_mixed_and_each_adapter_is_absent_now_and_then(finished):
    names, printed = finished
    rows = [set(rows) for _, rows in names["batches"]()]
    assert sum(len(present) >= 2 for present in rows) > 0.8 * len(rows)
    steps = {name: sum(name in present for present in rows) for name in names["ADAPTERS"]}
    assert all(20 < count < names["STEPS"] for count in steps.values())
    assert all(f"{name:8} {count:6}" in printed for name, count in steps.items())


def test_the_adapters_end_apart_from_one_another(finished):
    """One base, three behaviours: each is best on its own texts."""
    names, _ = finished
    model = names["model"]
    tokens, rows = next(names["batches"]())
    for name in dict.fromkeys(rows):
        own = tokens[[row for row, owner in enumerate(rows) if owner == name]]
        losses = {}
        for other in names["ADAPTERS"]:
            model.set_adapter(other)
            losses[other] = float(model.loss(own))
        assert min(losses, key=losses.get) == name
    assert np.isfinite(list(losses.values())).all()
