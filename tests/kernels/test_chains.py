"""Kernels one after another: what is made again in backward, and buffers that are used again, change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import ops
from minilora.tensor import Tensor, definitions_only

BOUNDS = {np.float64: 1e-11, np.float32: 2e-5}


def block(arrays: dict[str, np.ndarray], cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """Value and gradients of norm -> LoRA (twice) -> SwiGLU -> LoRA, with its residual: a block's MLP."""
    leaves = {name: Tensor(array, requires_grad=not name.startswith("W")) for name, array in arrays.items()}

    def layer(x: Tensor, name: str) -> Tensor:
        weight = leaves[f"W_{name}"]
        return ops.lora_linear(x, weight, None, leaves[f"A_{name}"], leaves[f"B_{name}"], scale=0.5)

    x = leaves["x"]
    n = ops.rms_norm(x, leaves["norm"], eps=1e-5)
    y = x + layer(ops.silu_mul(layer(n, "gate"), layer(n, "up")), "down")
    del n  # in backward only what the layers kept is there
    y.backward(cotangent)
    return {"y": y.data} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def random_arrays(
    rows: int, width: int, inner: int, dtype: type, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (rows, width), "norm": (width,)}
    for name, (outside, inside) in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
        shapes |= {f"W_{name}": (outside, inside), f"A_{name}": (3, inside), f"B_{name}": (outside, 3)}
    arrays = {name: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype) for name, shape in shapes.items()}
    return arrays, rng.standard_normal((rows, width)).astype(dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@given(
    rows=st.sampled_from((1, 31, 70, 700, 3000)),
    sizes=st.sampled_from(((8, 24), (24, 8), (96, 160))),
    seed=st.integers(0, 99),
)
def test_a_chain_of_kernels_is_the_chain_of_their_definitions(dtype, rows, sizes, seed):
    arrays, cotangent = random_arrays(rows, *sizes, dtype, seed)
    found = block(arrays, cotangent)
    again = block(arrays, cotangent)  # the first one's buffers are in use
    with definitions_only():
        expected = block(
            {name: array.astype(np.float64) for name, array in arrays.items()}, cotangent.astype(np.float64)
        )
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(found[name] - array) <= BOUNDS[dtype] * np.linalg.norm(array), name
        assert found[name].tobytes() == again[name].tobytes(), name


@pytest.mark.parametrize("dtype", BOUNDS)
def test_rows_of_several_adapters_after_a_norm(dtype):
    """The norm's output is not kept: dA comes from the norm's input and its two factors."""
    rng = np.random.default_rng(0)
    shapes = {"x": (3, 50, 12), "norm": (12,), "W": (9, 12), "A0": (2, 12), "B0": (9, 2), "A1": (3, 12), "B1": (9, 3)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    cotangent = rng.standard_normal((3, 50, 9)).astype(dtype)

    def gradients() -> dict[str, np.ndarray]:
        leaves = {name: Tensor(array, requires_grad=name != "W") for name, array in arrays.items()}
        normed = ops.rms_norm(leaves["x"], leaves["norm"], eps=1e-5)
        factors = (leaves[name] for name in ("A0", "B0", "A1", "B1"))
        y = ops.lora_rows(normed, leaves["W"], None, *factors, scales=(0.5, -2.0), owners=(1, None, 0))
        del normed
        y.backward(cotangent)
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    found = gradients()
    with definitions_only():
        expected = gradients()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(found[name] - array) <= BOUNDS[dtype] * np.linalg.norm(array), name
