"""The GPU's attention kernel is the definition: any length, grouped queries, segments, views, and the same bits twice.

`python -m tests.gpu.flash` checks more shapes and times them.
"""

from __future__ import annotations

import numpy as np
import pytest

from minilora import ops
from minilora.backend import array_module, dtype_of, to_device, to_numpy
from minilora.tensor import PRIMITIVES, Tensor, definitions_only

BOUND = 1e-2  # ‖found − expected‖ / ‖expected‖ in bfloat16


@pytest.fixture(autouse=True)
def gpu(device):
    if device == "cpu":
        pytest.skip("needs --device cuda")


def inputs(device, batch, tokens, heads, kv_heads, width, seed=0):
    """q, k, v as views of one array, and do."""
    random = np.random.default_rng(seed)
    narrow = dtype_of("bfloat16")
    together = to_device(random.standard_normal((batch, tokens, heads + 2 * kv_heads, width)).astype(narrow), device)
    do = to_device(random.standard_normal((batch, tokens, heads, width)).astype(narrow), device)
    return together[:, :, :heads], together[:, :, heads:-kv_heads], together[:, :, -kv_heads:], do


def results(function, q, k, v, do, **options):
    o, vjp = function(q, k, v, **options)
    return [to_numpy(x).astype(np.float64) for x in (o, *vjp(do))]


def check(device, shape, segments=None):
    *qkv, do = inputs(device, *shape)
    options = {"scale": shape[-1] ** -0.5, "segments": None if segments is None else to_device(segments, device)}
    assert PRIMITIVES["attention"].has_kernel_for(*qkv, **options)
    kernel = PRIMITIVES["attention"].implementation(qkv, options)
    found, again = (results(kernel, *qkv, do, **options) for _ in range(2))
    wide = [x.astype(np.float64) for x in (*qkv, do)]
    expected = results(ops.attention.definition, *wide, **options)
    for name, a, b, c in zip(("o", "dq", "dk", "dv"), found, again, expected, strict=True):
        # With one token dq and dk are zero but for rounding: entries below 1e-4 count as 1e-4.
        difference = np.linalg.norm(a - c) / max(np.linalg.norm(c), 1e-4 * c.size**0.5)
        assert difference <= BOUND, f"{name} is off by {difference:.2g}"
        assert np.array_equal(a, b), f"{name} has other bits the second time"


@pytest.mark.parametrize("tokens", [1, 17, 64, 127, 128, 200, 513])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 128), (9, 3, 64), (8, 1, 128)])
def test_attention_is_its_definition(tokens, heads, kv_heads, width, device):
    check(device, (2, tokens, heads, kv_heads, width))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_gradients_of_columns_of_one_array_are_columns_of_one_array(heads, kv_heads, device):
    q, k, v, do = inputs(device, 2, 70, heads, kv_heads, 64)
    xp, options = array_module(q), {"scale": 0.125}
    kernel = PRIMITIVES["attention"].implementation((q, k, v), options)
    beside = kernel(q, k, v, **options)[1](do)
    whole = xp.ndarray((2, 70, heads + 2 * kv_heads, 64), q.dtype, beside[0].data)
    apart = kernel(*(xp.ascontiguousarray(x) for x in (q, k, v)), **options)[1](do)
    assert all(gradient.flags.c_contiguous for gradient in apart)
    assert np.array_equal(to_numpy(whole), to_numpy(xp.concatenate(apart, axis=2)))


def test_q_k_and_v_of_one_array_have_its_gradient_without_a_copy(device):
    *_, do = inputs(device, 2, 70, 4, 4, 64)
    xp = array_module(do)
    x = Tensor(xp.stack([xp.roll(do, shift, axis=1) for shift in range(3)], axis=2), requires_grad=True)
    parts = ops.unstack(x, axis=2)
    apart = [Tensor(xp.ascontiguousarray(part.data), requires_grad=True) for part in parts]
    ops.attention(*parts, scale=0.125).backward(do)
    ops.attention(*apart, scale=0.125).backward(do)
    assert np.array_equal(to_numpy(x.grad), to_numpy(xp.stack([part.grad for part in apart], axis=2)))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("tokens", "width"), [(65, 64), (200, 128), (777, 64)])
def test_tokens_attend_within_their_segment(tokens, width, dtype, device):
    random = np.random.default_rng(1)
    packed = 1 + np.cumsum(random.random((2, tokens)) < 8 / tokens, axis=1)
    packed[1, tokens // 2 :] = 0
    check(device, (2, tokens, 4, 2, width), packed.astype(dtype))
    check(device, (2, tokens, 4, 2, width), random.integers(0, 4, (2, tokens)).astype(dtype))


def test_what_the_kernel_does_not_compute_runs_the_definition(device):
    def applies(q, k, v, **options):
        return PRIMITIVES["attention"].has_kernel_for(q, k, v, scale=0.1, **options)

    q, k, v, _ = inputs(device, 1, 64, 4, 2, 64)
    xp = array_module(q)
    assert applies(q, k, v)
    assert applies(q, k, v, window=64)
    assert not applies(q[:, -1:], k, v), "queries and keys of different lengths: a KV cache"
    assert not applies(q, k, v, window=63)
    assert not applies(*(x.astype(np.float32) for x in (q, k, v)))
    assert not applies(q[..., :32], k[..., :32], v[..., :32])
    shifted = xp.zeros(q.size + 1, q.dtype)[1:].reshape(q.shape)
    assert not applies(shifted, k, v), "rows that do not start at a multiple of 16 bytes"
    with definitions_only():
        assert not applies(q, k, v)
