"""One more token for each of a few sequences: the calls of NumPy that it takes, in buffers made once, and nothing else.

A pass over one token reads every weight for two operations on each value, so it is bound by memory; what Python does
between the products comes on top. Here that is a few dozen calls a block. The products use the BLAS's own threads,
which wait for the next one without going to sleep.

The maths is that of ops/ and models/parts.py, without a tape. models/decoding.py says which networks it is for.
Axes: B sequences, D model width, H query heads, K key-value heads, d head width, F MLP width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

THREADED_ENTRIES = 460_800  # of a matrix; OpenBLAS multiplies a smaller one with a vector on one thread


@dataclass(frozen=True)
class Update:
    """factor · (x Aᵀ) Bᵀ, with Aᵀ (in, R) in order in memory, for which products of a few rows are fastest.

    parts: (columns of x Aᵀ, columns of y, Bᵀ of those) for each layer that y has the results of, Bᵀ in order, too.
    factor: (1 or B, R), one for each sequence or for all.
    """

    turned_A: np.ndarray
    parts: tuple[tuple[slice, slice, np.ndarray], ...]
    factor: np.ndarray

    def add_to(self, x: np.ndarray, y: np.ndarray) -> None:
        """y (B, out) += the update of x (B, in)."""
        u = np.matmul(x, self.turned_A)
        u *= self.factor
        for of_u, of_y, turned_B in self.parts:
            y[:, of_y] += np.matmul(u[:, of_u], turned_B)


def low_rank_update(terms: Sequence[tuple[np.ndarray, np.ndarray, float | np.ndarray]]) -> Update:
    """Σ factor · (x Aᵀ) Bᵀ over the terms A (r, in), B (out, r), factor (a number or (B, 1)) of one layer."""
    turned_A = np.ascontiguousarray(np.concatenate([lora_A for lora_A, *_ in terms]).T)
    turned_B = np.ascontiguousarray(np.concatenate([lora_B for _, lora_B, _ in terms], axis=1).T)
    factors = [np.repeat(np.atleast_2d(factor), len(lora_A), axis=1) for lora_A, _, factor in terms]
    return Update(turned_A, ((slice(None), slice(None), turned_B),), side_by_side(factors).astype(turned_A.dtype))


def side_by_side(factors: Sequence[np.ndarray]) -> np.ndarray:
    """Factors (1 or B, R) of several updates as those of one."""
    sequences = max(map(len, factors))
    return np.concatenate([np.broadcast_to(factor, (sequences, factor.shape[1])) for factor in factors], axis=1)


@dataclass(frozen=True)
class Projection:
    """y = x Wᵀ + b + the update. W (out, in) may lie in several matrices, one under the other."""

    weights: tuple[np.ndarray, ...]
    bias: np.ndarray | None = None
    update: Update | None = None

    def into(self, x: np.ndarray, y: np.ndarray) -> None:
        """x (B, in) -> y (B, out)."""
        end = 0
        for weight in self.weights:
            begin, end = end, end + len(weight)
            np.matmul(x, weight.T, out=y[:, begin:end])
        if self.update is not None:
            self.update.add_to(x, y)
        if self.bias is not None:
            y += self.bias


def together(projections: Sequence[Projection]) -> Projection:
    """Layers that read the same x as one: y has their results side by side."""
    weights = [weight for projection in projections for weight in projection.weights]
    outside = [sum(map(len, projection.weights)) for projection in projections]
    edges = np.cumsum([0, *outside])
    dtype = weights[0].dtype
    if min(weight.size for weight in weights) < THREADED_ENTRIES <= sum(weight.size for weight in weights):
        weights = [np.concatenate(weights)]
    bias = update = None
    if any(projection.bias is not None for projection in projections):
        parts = zip(projections, outside, strict=True)
        bias = np.concatenate([np.zeros(count, dtype) if part.bias is None else part.bias for part, count in parts])
    spans = [slice(*span) for span in pairwise(edges)]
    updates = [(part.update, span) for part, span in zip(projections, spans, strict=True) if part.update is not None]
    if updates:
        turned_A = np.concatenate([each.turned_A for each, _ in updates], axis=1)
        of_u = pairwise(np.cumsum([0, *(each.turned_A.shape[1] for each, _ in updates)]))
        own = [(slice(*mine), span, each.parts[0][2]) for mine, (each, span) in zip(of_u, updates, strict=True)]
        update = Update(turned_A, tuple(own), side_by_side([each.factor for each, _ in updates]))
    return Projection(tuple(weights), bias, update)


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the last axis."""

    weight: np.ndarray
    eps: float

    def into(self, x: np.ndarray, y: np.ndarray) -> None:
        inverse = np.vecdot(x, x)[..., None]
        inverse /= x.shape[-1]
        inverse += self.eps
        np.sqrt(inverse, out=inverse)
        np.divide(x, inverse, out=y)
        y *= self.weight


@dataclass(frozen=True)
class Block:
    """The arrays of a decoder block; q_norm and k_norm are over a head. window: how far back a query sees, or None."""

    input_norm: Norm
    qkv: Projection
    q_norm: Norm | None
    k_norm: Norm | None
    o: Projection
    mlp_norm: Norm
    gate_up: Projection
    down: Projection
    heads: int
    kv_heads: int
    width: int
    scale: float
    window: int | None


class Decoder:
    """Blocks, final norm and head, for `sequences` sequences; `step` takes one token further."""

    def __init__(self, blocks: Sequence[Block], final_norm: Norm, head: Projection, sequences: int) -> None:
        self.blocks, self.final_norm, self.head, self.sequences = blocks, final_norm, head, sequences
        first, dtype = blocks[0], final_norm.weight.dtype
        rotated = (first.heads + first.kv_heads) * first.width

        def buffer(*shape: int) -> np.ndarray:
            return np.empty((sequences, *shape), dtype)

        self.normed, self.added = buffer(len(final_norm.weight)), buffer(len(final_norm.weight))
        self.qkv, self.swapped = buffer(rotated + first.kv_heads * first.width), buffer(rotated)
        self.qk, self.v = self.qkv[:, :rotated], self.qkv[:, rotated:]
        self.mixed = buffer(first.heads * first.width)
        inner = first.down.weights[0].shape[1]
        self.gate_up, self.hidden = buffer(2 * inner), buffer(inner)
        self.gate, self.up = self.gate_up[:, :inner], self.gate_up[:, inner:]

    def step(
        self,
        x: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        keys: Sequence[np.ndarray],
        values: Sequence[np.ndarray],
        length: int,
        hidden: np.ndarray | None,
    ) -> np.ndarray:
        """The logits (B, V) after the tokens that are embedded in x (B, D), which is written to.

        cos, sin (B or 1, d/2): of the tokens' positions. keys, values: each layer's cache (B, capacity, K, d), which
        holds `length` positions and gets the next. hidden (B, length + 1): −∞ where a position is not to be seen, else
        0; None where all are.
        """
        half = cos.shape[-1]
        cosines = np.concatenate([cos, cos], axis=-1)[:, None]  # (B or 1, 1, d)
        sines = np.stack([-sin, sin], axis=-2)[:, None]  # (B or 1, 1, 2, d/2)
        with np.errstate(over="ignore"):  # of e⁻ˣ in the sigmoid: infinity gives the right 0
            for layer, block in enumerate(self.blocks):
                block.input_norm.into(x, self.normed)
                self._project_qkv(block, cosines, sines, half)
                self._attend(block, keys[layer], values[layer], length, hidden)
                block.o.into(self.mixed, self.added)
                x += self.added
                block.mlp_norm.into(x, self.normed)
                block.gate_up.into(self.normed, self.gate_up)
                np.negative(self.gate, out=self.hidden)
                np.exp(self.hidden, out=self.hidden)
                self.hidden += 1
                np.divide(self.gate, self.hidden, out=self.hidden)
                self.hidden *= self.up
                block.down.into(self.hidden, self.added)
                x += self.added
        self.final_norm.into(x, self.normed)
        logits = np.empty((len(x), len(self.head.weights[0])), x.dtype)
        self.head.into(self.normed, logits)
        return logits

    def _project_qkv(self, block: Block, cosines: np.ndarray, sines: np.ndarray, half: int) -> None:
        """q, turned and scaled, beside k, turned, into self.qk; v into self.v."""
        queries = block.heads * block.width
        block.qkv.into(self.normed, self.qkv)
        heads = self.qk.reshape(self.sequences, -1, block.width)  # (B, H + K, d)
        if block.q_norm is not None and block.k_norm is not None:
            block.q_norm.into(heads[:, : block.heads], heads[:, : block.heads])
            block.k_norm.into(heads[:, block.heads :], heads[:, block.heads :])
        swapped = self.swapped.reshape(self.sequences, -1, 2, half)
        np.multiply(heads.reshape(swapped.shape)[:, :, ::-1], sines, out=swapped)
        heads *= cosines
        self.qk += self.swapped
        self.qk[:, :queries] *= block.scale

    def _attend(
        self, block: Block, keys: np.ndarray, values: np.ndarray, length: int, hidden: np.ndarray | None
    ) -> None:
        """The attention of the new position over all that the cache then holds, into self.mixed."""
        shape = (self.sequences, block.kv_heads, -1, block.width)
        queries = block.heads * block.width
        keys[:, length] = self.qk[:, queries:].reshape(self.sequences, block.kv_heads, block.width)
        values[:, length] = self.v.reshape(self.sequences, block.kv_heads, block.width)
        seen = slice(0 if block.window is None else max(0, length + 1 - block.window), length + 1)
        scores = np.matmul(self.qk[:, :queries].reshape(shape), keys[:, seen].transpose(0, 2, 3, 1))  # (B, K, H / K, n)
        if hidden is not None:
            scores += hidden[:, None, None, seen]
        scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= np.add.reduce(scores, axis=-1, keepdims=True)
        np.matmul(scores, values[:, seen].transpose(0, 2, 1, 3), out=self.mixed.reshape(shape))
