"""Switching adapters on a real model: under a millisecond, and no base weight is copied, moved or touched."""

from __future__ import annotations

import statistics
import time
import tracemalloc

import numpy as np
import pytest

import minilora as ml
from tests import tiny

pytestmark = pytest.mark.slow
SECONDS_TO_SWITCH = 1e-3


@pytest.fixture(scope="module")
def smollm2() -> ml.Model:
    """SmolLM2-135M with three adapters on all its 210 linear layers."""
    try:
        model = ml.load_model("smollm2")
    except ml.MiniloraError as error:
        pytest.skip(str(error))
    for seed, name in enumerate("abc"):
        tiny.add_random_adapter(model, name, ml.LoraConfig(r=8, alpha=16), seed)
    return model


SELECTIONS = [
    lambda m: m.set_adapter("a"),
    lambda m: m.set_adapter(None),
    lambda m: m.set_adapter({"a": 0.7, "b": -0.3}),
    lambda m: m.set_adapter(rows=["a", "b", None, "c"] * 16),
    lambda m: m.set_adapter("b"),
]


def test_a_switch_takes_under_a_millisecond(smollm2):
    """The median of a hundred rounds over every kind of selection."""
    seconds = []
    for _ in range(100):
        for select in SELECTIONS:
            begun = time.perf_counter()
            select(smollm2)
            seconds.append(time.perf_counter() - begun)
    assert statistics.median(seconds) < SECONDS_TO_SWITCH
    assert statistics.quantiles(seconds, n=20)[-1] < SECONDS_TO_SWITCH  # of 95 in 100, also on a busy machine


def test_a_switch_copies_no_base_weight(smollm2):
    """The arrays are the same objects, of one base for all adapters, and switching takes kilobytes."""
    before = {name: parameter.data for name, parameter in smollm2.network.named_parameters()}
    tracemalloc.start()
    try:
        for select in SELECTIONS:
            select(smollm2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(parameter.data is before[name] for name, parameter in smollm2.network.named_parameters())
    assert peak < 100_000


def test_an_adapter_costs_its_own_matrices_and_nothing_else():
    """Adding one to a loaded model takes what A and B take; adding a third as much as a second."""
    model = tiny.model("float32", hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=64)
    base = sum(parameter.data.nbytes for _, parameter in model.network.named_parameters())
    for name in "ab":
        tracemalloc.start()
        try:
            model.add_adapter(name, ml.LoraConfig(r=2))
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        own = sum(tensor.data.nbytes for tensor in model.adapter_parameters(name).values())
        assert own <= taken < own + 50_000 < base / 10


def test_what_a_switch_selects_is_what_the_next_pass_computes(smollm2):
    tokens = np.array([smollm2.tokenizer.encode("The frost performs its secret ministry")])
    found = {}
    for name in ("a", None, "b"):
        smollm2.set_adapter(name)
        found[name] = smollm2.logits(tokens)
    for name in ("b", "a", None):
        smollm2.set_adapter(name)
        assert np.array_equal(smollm2.logits(tokens), found[name])
    assert not np.array_equal(found["a"], found["b"])
