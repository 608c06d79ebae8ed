"""Every CPU kernel is its definition, also where its work is cut into many blocks, with the same bits every time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.kernels import cpu
from minilora.tensor import PRIMITIVES, definitions_only
from tests.cases import CASES, Call, check_kernels
from tests.cases.check import run

KERNELS = [
    name for name, primitive in PRIMITIVES.items() if any(kernel.device == "cpu" for kernel in primitive.kernels)
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that a test's small arrays are cut at every place that large ones are cut at."""
    monkeypatch.setattr(cpu.elementwise, "BLOCK_ENTRIES", 8)
    monkeypatch.setattr(cpu.elementwise, "LEAST_ENTRIES", 1)
    monkeypatch.setattr(cpu.linear, "MOST_ROWS", 2)
    monkeypatch.setattr(cpu.linear, "LEAST_ROWS", 1)
    monkeypatch.setattr(cpu.linear, "SKINNY_ENTRIES", 8)
    monkeypatch.setattr(cpu.attention, "STEP", 2)
    monkeypatch.setattr(cpu.attention, "BLOCK_ENTRIES", 1)
    monkeypatch.setattr(cpu.small, "SMALL", 8)
    monkeypatch.setattr(cpu.rotary, "BLOCK_ENTRIES", 8)
    monkeypatch.setattr(cpu.rotary, "LEAST_ENTRIES", 1)
    monkeypatch.setattr(cpu.loss, "TILE", 3)


@pytest.mark.parametrize("name", KERNELS)
@given(data=st.data())
def test_a_kernel_is_its_definition(name, data):
    check_kernels(name, CASES[name], data.draw(CASES[name].calls), "cpu")


@pytest.mark.parametrize("name", KERNELS)
@given(data=st.data())
def test_a_kernel_is_its_definition_however_its_work_is_cut(small_blocks, name, data):
    check_kernels(name, CASES[name], data.draw(CASES[name].calls), "cpu")


def large_calls() -> dict[str, Call]:
    """Calls that take several blocks and all threads, of sizes that no block length divides."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [70, 61, 150, 20], axis=1)
    labels = {"labels": rng.integers(0, 5001, 203), "weights": rng.uniform(0, 1 / 203, 203)}
    angle = rng.uniform(-3, 3, (2, 301, 1, 8))
    return {
        "rotary": Call((normal(2, 301, 6, 16),), {"cos": np.cos(angle), "sin": np.sin(angle)}),
        "add": Call((normal(3, 211, 97), normal(3, 211, 97))),
        "silu_mul": Call((normal(3, 211, 97), normal(3, 211, 97))),
        "rms_norm": Call((normal(3, 211, 97), normal(97)), {"eps": 1e-5}),
        "linear": Call((normal(2, 613, 45), normal(83, 45), normal(83))),
        "lora_linear": Call((normal(2, 613, 45), normal(83, 45), None, normal(4, 45), normal(83, 4)), {"scale": 0.5}),
        "lora_linears": Call(
            (
                *(normal(2, 613, 45), normal(83, 45), None, normal(4, 45), normal(83, 4)),
                *(normal(9, 45), normal(9), None, None),
                *(normal(21, 45), None, normal(3, 45), normal(21, 3)),
            ),
            {"scales": (0.5, 0.0, -2.0)},
        ),
        "with_magnitude": Call((normal(3, 211, 97), normal(97), normal(97)), {"norm": rng.uniform(0.5, 2, 97)}),
        "lora_rows": Call(
            (normal(5, 313, 45), normal(83, 45), None, normal(4, 45), normal(83, 4), normal(3, 45), normal(83, 3)),
            {"scales": (0.5, -2.0), "owners": (1, 1, None, 0, 1)},
        ),
        "add_rms_norm": Call((normal(3, 211, 97), normal(3, 211, 97), normal(97)), {"eps": 1e-5}),
        "attention": Call(
            (normal(2, 301, 6, 16), normal(2, 301, 2, 16), normal(2, 301, 2, 16)), {"scale": 0.25, "segments": segments}
        ),
        "linear_cross_entropy": Call((normal(203, 24), normal(5001, 24)), labels),
    }


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_its_definition_on_large_arrays(name):
    assert check_kernels(name, CASES[name], large_calls()[name], "cpu", ("float64", "float32"))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_gives_the_same_bits_every_time(name):
    call = large_calls()[name]
    values, gradients, cotangents = run(PRIMITIVES[name], call)
    for _ in range(3):
        again, gradients_again, _ = run(PRIMITIVES[name], call, cotangents)
        for first, second in zip((*values, *gradients), (*again, *gradients_again), strict=True):
            assert (first is None and second is None) or first.tobytes() == second.tobytes()


@pytest.mark.parametrize(
    ("name", "definition"),  # linear has no kernel for it
    [("linear", True), *((name, way) for name in ("lora_linear", "lora_linears") for way in (False, True))],
)
def test_the_gradients_are_the_same_bits_where_the_value_is_left_out(name, definition):
    call = large_calls()[name]
    with definitions_only() if definition else nullcontext():
        values, expected, cotangents = run(PRIMITIVES[name], call)
        zeros, found, _ = run(PRIMITIVES[name], replace(call, options={**call.options, "value": False}), cotangents)
    for value, zero in zip(values, zeros, strict=True):
        assert (zero.shape, zero.dtype) == (value.shape, value.dtype)
        assert not zero.any()
        assert zero.strides == (0,) * zero.ndim  # it takes no memory
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None and theirs is None) or ours.tobytes() == theirs.tobytes()


def test_long_attention_of_every_kind_is_the_definition():
    """No segments, a window, both, and queries after cached keys; more positions than one block holds."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 200, heads, 8)) for heads in (4, 2, 2))
    segments = np.sort(rng.integers(0, 4, (1, 200)), axis=1)
    for options in ({}, {"window": 37}, {"window": 70, "segments": segments}):
        for late in (slice(None), slice(150, None), slice(199, None)):
            call = Call((q[:, late], k, v), {"scale": 0.3, **options})
            assert check_kernels("attention", CASES["attention"], call, "cpu", ("float64",))


@pytest.mark.parametrize("rows", [1, 5, 64, 67])
def test_a_product_in_parts_is_the_product(monkeypatch, rows):
    """Of views and into one; a matrix of the left operand beside each of the right one."""
    monkeypatch.setattr(cpu.small, "SMALL", 200)
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((2, rows, 3, 7)).swapaxes(1, 2), rng.standard_normal((2, 1, 7, 4))
    out = np.full((2, rows, 3, 4), np.nan).swapaxes(1, 2)
    assert cpu.small.product(left, right, out) is out
    np.testing.assert_allclose(out, left @ right, rtol=1e-12)
