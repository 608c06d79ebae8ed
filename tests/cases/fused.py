"""Cases of the fused primitives: each is composed of general ones, as its docstring's first formula says."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minilora import ops
from minilora.backend import array_module

from .case import Call, Case, generators, normal, positive, shapes, sizes
from .general import linear, unary

# --- activations ------------------------------------------------------------------------------------------------------


def silu(x):
    return ops.div(x, ops.add(ops.exp(ops.mul(x, -1.0)), 1.0))


def gelu_tanh(x):
    inner = ops.mul(ops.add(x, ops.mul(ops.power(x, exponent=3), 0.044715)), math.sqrt(2 / math.pi))
    return ops.mul(ops.mul(x, 0.5), ops.add(ops.tanh(inner), 1.0))


def pair_calls(values: Any = normal) -> st.SearchStrategy[Call]:
    return st.builds(lambda rng, shape: Call((values(rng, *shape), normal(rng, *shape))), generators, shapes(1, 3))


def wide(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal values with a few far out, where a careless sigmoid overflows."""
    return np.asarray(rng.standard_normal(shape) * rng.choice([1.0, 1.0, 1.0, 6.0], shape))


def moderate(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values up to 4: further out 1 + tanh keeps few bits, which is rounding and no mistake."""
    return np.clip(2 * normal(rng, *shape), -4, 4)


# --- norms ------------------------------------------------------------------------------------------------------------


def mean_last(x):
    return ops.div(ops.sum(x, axis=-1, keepdims=True), float(x.shape[-1]))


def rms_norm(x, weight, *, eps):
    return ops.mul(ops.div(x, ops.sqrt(ops.add(mean_last(ops.mul(x, x)), eps))), weight)


def layer_norm(x, weight, bias, *, eps):
    centred = ops.sub(x, mean_last(x))
    n = ops.div(centred, ops.sqrt(ops.add(mean_last(ops.mul(centred, centred)), eps)))
    return ops.add(ops.mul(n, weight), bias)


@st.composite
def norm_calls(draw: st.DrawFn, parameters: int, least: int) -> Call:
    """eps from negligible to large beside mean(x²): an eps that is left out or put in the wrong place shows.

    least: the smallest width. Of two values less their mean, nothing but a sign and rounding is left to layer_norm.
    """
    rng = draw(generators)
    leading, width = draw(shapes(1, 2)), draw(st.integers(least, 8))
    x = normal(rng, *leading, width) * draw(st.sampled_from((1.0, 1.0, 0.05)))
    eps = draw(st.sampled_from((1e-6, 1e-5, 0.3)))
    return Call((x, *(normal(rng, width) for _ in range(parameters))), {"eps": eps})


def with_residual(norm, x, delta, *parameters, eps):
    s = ops.mul(x, 1.0) if delta is None else ops.add(x, delta)
    return s, norm(s, *parameters, eps=eps)


@st.composite
def residual_calls(draw: st.DrawFn, parameters: int, least: int) -> Call:
    call = draw(norm_calls(parameters, least))
    x, *rest = call.inputs
    delta = normal(draw(generators), *x.shape) if draw(st.booleans()) else None
    return Call((x, delta, *rest), call.options)


# --- attention and rotary ---------------------------------------------------------------------------------------------


def attention(q, k, v, *, scale, segments=None, window=None):
    """A head at a time: softmax over the visible keys, the rest filled with what no score comes near."""
    xp = array_module(q.data)
    batch, queries, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    late = xp.arange(keys - queries, keys)[:, None]  # a query's position
    early = xp.arange(keys)[None, :]
    seen = early <= late
    if window is not None:
        seen = seen & (late - early < window)
    outputs = []
    for row in range(batch):
        mask = seen
        if segments is not None:
            mask = seen & (segments[row][late] == segments[row][early])
        for head in range(heads):
            qh, kh, vh = (
                ops.getitem(x, index=(row, slice(None), h))
                for x, h in ((q, head), (k, head // group), (v, head // group))
            )
            scores = ops.mul(ops.matmul(qh, ops.transpose(kh)), scale)  # (T, S)
            top = xp.where(mask, scores.data, -np.inf).max(axis=1, keepdims=True)  # a constant: it cancels
            e = ops.mul(ops.exp(ops.where(mask, ops.sub(scores, top), -1e3)), mask.astype(float))
            outputs.append(
                ops.reshape(ops.matmul(ops.div(e, ops.sum(e, axis=1, keepdims=True)), vh), shape=(1, queries, 1, width))
            )
    rows = [ops.concatenate(*outputs[row * heads : (row + 1) * heads], axis=2) for row in range(batch)]
    return ops.concatenate(*rows, axis=0)


@st.composite
def attention_calls(draw: st.DrawFn) -> Call:
    """Grouped queries, fewer queries than keys (a cache), packed segments, a sliding window, and their combinations."""
    rng = draw(generators)
    batch, queries, kv_heads, group, width = (
        draw(st.sampled_from(choice)) for choice in ((1, 2), (1, 3, 4, 7), (1, 2), (1, 2, 3), (2, 4, 1))
    )
    earlier = draw(st.sampled_from((0, 0, 0, 2)))
    keys = queries + earlier
    segments = None
    if draw(st.booleans()):
        segments = np.sort(rng.integers(0, 3, (batch, keys)), axis=1)
    q, k, v = (
        normal(rng, batch, t, h, width) for t, h in ((queries, kv_heads * group), (keys, kv_heads), (keys, kv_heads))
    )
    options = {
        "scale": draw(st.sampled_from((0.5, 1.0, 0.25))),
        "segments": segments,
        "window": draw(st.sampled_from((None, None, 1, 2, 3))),
    }
    return Call((q, k, v), options)


def rotary(x, *, cos, sin):
    half = x.shape[-1] // 2
    first, second = (ops.getitem(x, index=(..., part)) for part in (slice(None, half), slice(half, None)))
    turned = (ops.sub(ops.mul(first, cos), ops.mul(second, sin)), ops.add(ops.mul(second, cos), ops.mul(first, sin)))
    return ops.concatenate(*turned, axis=-1)


@st.composite
def rotary_calls(draw: st.DrawFn) -> Call:
    rng = draw(generators)
    batch, time, heads, half = (
        draw(sizes),
        draw(sizes),
        draw(st.sampled_from((1, 2, 3))),
        draw(st.sampled_from((1, 2, 4))),
    )
    angle = rng.uniform(-3, 3, (draw(st.sampled_from((1, batch))), time, 1, half))
    return Call((normal(rng, batch, time, heads, 2 * half),), {"cos": np.cos(angle), "sin": np.sin(angle)})


# --- embedding and loss -----------------------------------------------------------------------------------------------


def one_hot(tokens: Any, vocabulary: int) -> Any:
    xp = array_module(tokens)
    matrix = xp.zeros((tokens.size, vocabulary))
    matrix[xp.arange(tokens.size), tokens.reshape(-1)] = 1.0
    return matrix


def embedding(weight, *, tokens, dtype=None):
    rows = ops.matmul(one_hot(tokens, weight.shape[0]), weight)
    return ops.reshape(rows, shape=(*tokens.shape, weight.shape[1]))


def cross_entropy(logits, *, labels, weights):
    top = logits.data.max(axis=1, keepdims=True)
    shifted = ops.sub(logits, top)
    logsumexp = ops.log(ops.sum(ops.exp(shifted), axis=1))
    at_label = ops.sum(ops.mul(shifted, one_hot(labels, logits.shape[1])), axis=1)
    return ops.sum(ops.mul(ops.sub(logsumexp, at_label), weights))


def linear_cross_entropy(x, weight, *, labels, weights):
    return cross_entropy(linear(x, weight), labels=labels, weights=weights)


@contextmanager
def small_chunks():
    """Three chunks or so: with the real size, all tokens of a test would fit into one."""
    kept, ops.loss.CHUNK_ENTRIES = ops.loss.CHUNK_ENTRIES, 20
    try:
        yield
    finally:
        ops.loss.CHUNK_ENTRIES = kept


@st.composite
def embedding_calls(draw: st.DrawFn) -> Call:
    rng, vocabulary = draw(generators), draw(sizes)
    tokens = rng.integers(0, vocabulary, draw(shapes(1, 2)))
    return Call((normal(rng, vocabulary, draw(sizes)),), {"tokens": tokens})


@st.composite
def loss_calls(draw: st.DrawFn, head: bool) -> Call:
    rng, count, vocabulary, width = draw(generators), draw(sizes), draw(st.sampled_from((2, 3, 7, 19))), draw(sizes)
    labels = rng.integers(0, vocabulary, count)
    weights = positive(rng, count) / count
    if head:
        inputs: tuple[Any, ...] = (normal(rng, count, width), normal(rng, vocabulary, width))
    else:
        inputs = (3 * normal(rng, count, vocabulary),)
    return Call(inputs, {"labels": labels, "weights": weights})


# --- LoRA -------------------------------------------------------------------------------------------------------------


def low_rank(x, lora_A, lora_B, *, scale):
    return ops.mul(linear(linear(x, lora_A), lora_B), scale)


def lora_linear(x, weight, bias, lora_A, lora_B, *, scale):
    """x (W + s B A)ᵀ + b: through the product that training never forms."""
    effective = ops.add(weight, ops.mul(ops.matmul(lora_B, lora_A), scale))
    return linear(x, effective, bias)


@st.composite
def lora_calls(draw: st.DrawFn, base: bool) -> Call:
    """Ranks from 1 to more than either width; scales of either sign; B zero, as at the start of training."""
    rng = draw(generators)
    leading, inside, outside = draw(shapes(1, 2)), draw(sizes), draw(sizes)
    rank = draw(st.sampled_from((1, 2, 4, 11)))
    x, lora_A, lora_B = normal(rng, *leading, inside), normal(rng, rank, inside), normal(rng, outside, rank)
    if draw(st.integers(0, 4)) == 0:
        lora_B *= 0
    options = {"scale": draw(st.sampled_from((1.0, 2.0, 0.125, -0.5)))}
    if not base:
        return Call((x, lora_A, lora_B), options)
    bias = normal(rng, outside) if draw(st.booleans()) else None
    return Call((x, normal(rng, outside, inside), bias, lora_A, lora_B), options)


def lora_linears(x, *layers, scales):
    results = []
    for (weight, bias, lora_A, lora_B), scale in zip(batched(layers, 4), scales, strict=True):
        if lora_A is None:
            results.append(linear(x, weight, bias))
        else:
            results.append(lora_linear(x, weight, bias, lora_A, lora_B, scale=scale))
    return tuple(results)


def lora_rows(x, weight, bias, *factors, scales, owners):
    rows = []
    for row, owner in enumerate(owners):
        own = ops.getitem(x, index=(slice(row, row + 1),))
        if owner is None:
            rows.append(linear(own, weight, bias))
        else:
            lora_A, lora_B = factors[2 * owner : 2 * owner + 2]
            rows.append(lora_linear(own, weight, bias, lora_A, lora_B, scale=scales[owner]))
    return ops.concatenate(*rows, axis=0)


@st.composite
def rows_calls(draw: st.DrawFn) -> Call:
    """One to six rows, each under one of up to three adapters or none."""
    rng, inside, outside = draw(generators), draw(sizes), draw(sizes)
    ranks = draw(st.lists(st.sampled_from((1, 2, 4)), max_size=3))
    owner = st.sampled_from([None, *range(len(ranks))])
    others = draw(st.lists(owner, min_size=0 if ranks else 1, max_size=3))
    owners = tuple(draw(st.permutations([*range(len(ranks)), *others])))
    x = normal(rng, len(owners), *draw(st.sampled_from(((), (1,), (3,)))), inside)
    bias = normal(rng, outside) if draw(st.booleans()) else None
    factors = [array for rank in ranks for array in (normal(rng, rank, inside), normal(rng, outside, rank))]
    scales = tuple(draw(st.sampled_from((1.0, 2.0, -0.5))) for _ in ranks)
    return Call((x, normal(rng, outside, inside), bias, *factors), {"scales": scales, "owners": owners})


def batched(values: tuple[Any, ...], count: int) -> list[tuple[Any, ...]]:
    return [values[start : start + count] for start in range(0, len(values), count)]


@st.composite
def group_calls(draw: st.DrawFn) -> Call:
    """One to three layers that read the same x, of their own widths and ranks, some without an adapter or a bias."""
    first = draw(lora_calls(base=True))
    x, rng = first.inputs[0], draw(generators)
    layers, scales = [*first.inputs[1:]], [first.options["scale"]]
    for _ in range(draw(st.integers(0, 2))):
        outside, rank = draw(sizes), draw(st.sampled_from((1, 2, 4)))
        bias = normal(rng, outside) if draw(st.booleans()) else None
        factors = [normal(rng, rank, x.shape[-1]), normal(rng, outside, rank)] if draw(st.booleans()) else [None, None]
        layers += [normal(rng, outside, x.shape[-1]), bias, *factors]
        scales.append(draw(st.sampled_from((1.0, -0.5))))
    return Call((x, *layers), {"scales": tuple(scales)})


def with_magnitude(z, magnitude, bias, *, norm):
    y = ops.mul(z, ops.div(magnitude, norm))
    return y if bias is None else ops.add(y, bias)


@st.composite
def magnitude_calls(draw: st.DrawFn) -> Call:
    """Norms apart from the magnitudes, of either sign, so that neither can stand for the other."""
    rng, leading, width = draw(generators), draw(shapes(1, 2)), draw(sizes)
    bias = normal(rng, width) if draw(st.booleans()) else None
    return Call((normal(rng, *leading, width), normal(rng, width), bias), {"norm": positive(rng, width)})


def dropout(x, *, probability, seed):
    xp = array_module(x.data)
    kept = xp.random.default_rng(seed).random(x.shape, dtype="float32") >= probability
    return ops.mul(x, kept / (1 - probability))


@st.composite
def dropout_calls(draw: st.DrawFn) -> Call:
    options = {"probability": draw(st.sampled_from((0.0, 0.1, 0.5))), "seed": draw(st.integers(0, 2**40))}
    return Call((normal(draw(generators), *draw(shapes())),), options)


CASES = {
    "silu": Case(**unary(wide, composition=silu)),
    "silu_mul": Case(pair_calls(wide), lambda gate, up: ops.mul(silu(gate), up)),
    "gelu_tanh": Case(**unary(moderate, composition=gelu_tanh)),
    "rms_norm": Case(norm_calls(1, least=1), rms_norm, float32=1e-4),
    "layer_norm": Case(norm_calls(2, least=4), layer_norm, float32=1e-4),
    "add_rms_norm": Case(residual_calls(1, least=2), partial(with_residual, rms_norm), float32=1e-4),
    "add_layer_norm": Case(residual_calls(2, least=4), partial(with_residual, layer_norm), float32=1e-4),
    "attention": Case(attention_calls(), attention),
    "rotary": Case(rotary_calls(), rotary),
    "embedding": Case(embedding_calls(), embedding),
    "cross_entropy": Case(loss_calls(head=False), cross_entropy),
    "linear_cross_entropy": Case(loss_calls(head=True), linear_cross_entropy, setting=small_chunks),
    "lora_linear": Case(lora_calls(base=True), lora_linear, frozen=(1,)),
    "lora_linears": Case(group_calls(), lora_linears, frozen=(1, 5, 9)),
    "lora_rows": Case(rows_calls(), lora_rows, frozen=(1,)),
    "low_rank": Case(lora_calls(base=False), low_rank),
    "with_magnitude": Case(magnitude_calls(), with_magnitude),
    "dropout": Case(dropout_calls(), dropout),
}
