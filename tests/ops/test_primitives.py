"""Every primitive: its vjp is autograd of its composition is finite differences; every kernel is its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import ops
from minilora.backend import to_device, to_numpy
from minilora.gradcheck import gradcheck
from minilora.tensor import PRIMITIVES, Tensor
from tests.cases import CASES, Call, check_primitive
from tests.cases.check import run


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_the_vjp_is_autograd_of_the_composition_is_finite_differences(name, data, device):
    check_primitive(name, CASES[name], data.draw(CASES[name].calls), device)


@given(axis=st.sampled_from((None, 0, -1, (0, 2))), keepdims=st.booleans())
def test_the_mean_over_an_axis_divides_by_what_it_sums(axis, keepdims, device):
    values = np.random.default_rng(0).standard_normal((3, 4, 5))
    found = ops.mean(Tensor(to_device(values, device)), axis=axis, keepdims=keepdims)
    assert np.allclose(found.numpy(), values.mean(axis=axis, keepdims=keepdims), rtol=1e-14)
    gradcheck(lambda x: ops.mean(x, axis=axis, keepdims=keepdims), [to_device(values, device)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_far_out_are_finite_and_right(dtype, device):
    x = to_device(np.array([-1e4, -800.0, -100.0, 0.0, 100.0, 800.0, 1e4], dtype), device)
    positive = to_numpy(x) > 0
    for name in ("silu", "gelu_tanh"):
        values, gradients, _ = run(PRIMITIVES[name], Call((x,)), [x * 0 + 1])
        assert np.allclose(to_numpy(values[0]), np.where(positive, to_numpy(x), 0.0), atol=1e-6)
        expected = np.where(positive, 1.0, 0.0) + 0.5 * (to_numpy(x) == 0)
        assert np.allclose(to_numpy(gradients[0]), expected, atol=1e-6)


def test_equal_values_share_the_gradient_of_their_maximum(device):
    x = to_device(np.array([1.0, 2.0]), device)
    _, gradients, _ = run(PRIMITIVES["maximum"], Call((x, x.copy())), [x * 0 + 1])
    assert all(bool((gradient == 0.5).all()) for gradient in gradients)
