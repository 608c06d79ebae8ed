"""Frozen weights in another form than x: held in bfloat16 or float16, or compressed. The arithmetic is that of x."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import ops
from minilora.backend import array_module, dtype_of, matmul, to_device
from minilora.tensor import Tensor, definitions_only
from tests.cases.check import assert_close

WIDE = {"float32": 1e-5, "float64": 1e-12}


class Halves(ops.CompressedWeight):
    """A matrix stored as float16, which knows its products in whatever dtype it is asked for."""

    def __init__(self, array):
        self.stored, self.shape, self.dtype = array.astype(np.float16), array.shape, np.dtype(np.float32)

    def matmul(self, x):
        return matmul(x, self.stored.astype(x.dtype).T)

    def matmul_t(self, g):
        return matmul(g, self.stored.astype(g.dtype))

    def dense(self):
        return self.stored.astype(self.dtype)


def layers(x, weight, table, norm, lora):
    """Every primitive that takes a frozen weight, in a row."""
    tokens = array_module(x.data).arange(x.shape[0])
    rows = ops.embedding(table, tokens=tokens, dtype=x.dtype)
    assert rows.dtype == x.dtype
    h = x + rows
    h = ops.rms_norm(h, norm, eps=1e-5)
    h = ops.linear(h, weight)
    h = ops.lora_linear(h, weight, None, *lora, scale=0.5)
    h = ops.layer_norm(h, norm, norm, eps=1e-5)
    return ops.linear_cross_entropy(h, weight, labels=tokens, weights=x.data[:, 0] * 0 + 1)


@pytest.mark.parametrize("definitions", [True, False])
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("form", ["bfloat16", "float16", "compressed"])
@given(rows=st.sampled_from((1, 3, 8)), seed=st.integers(0, 99))
def test_a_narrow_frozen_weight_computes_as_its_widened_copy(definitions, form, wide, rows, seed, device):
    rng = np.random.default_rng(seed)
    width, dtype, single = 8, np.dtype(wide), np.dtype(np.float32)

    def array(*shape, of=dtype):
        return to_device(rng.standard_normal(shape).astype(of), device)

    x, lora = array(rows, width), (array(2, width), array(width, 2))
    narrow = dtype_of("float16" if form == "compressed" else form)
    parts = [array(width, width, of=single), array(width, width, of=single), array(width, of=single)]
    parts = [part.astype(narrow) for part in parts]  # the square matrix, the table, the norm
    widened = [part.astype(dtype) for part in parts]
    if form == "compressed":
        parts[0] = Halves(parts[0])

    def run(weights):
        leaves = [Tensor(value, requires_grad=True) for value in (x, *lora)]
        loss = layers(leaves[0], *weights, leaves[1:])
        loss.backward()
        return [loss.data], [leaf.grad for leaf in leaves]

    with definitions_only() if definitions else nullcontext():
        values, gradients = run(parts)
    with definitions_only():
        expected, expected_gradients = run(widened)
    assert values[0].dtype == dtype
    assert all(gradient.dtype == dtype for gradient in gradients)
    assert_close(values, expected, WIDE[wide], "loss")
    assert_close(gradients, expected_gradients, 10 * WIDE[wide], "gradient", 0.1)
