"""Cross-entropy with the head, tiles of the vocabulary at a time: no row of logits is ever held whole.

As attention does over keys, the softmax runs over tiles with a running maximum m, sum Σ and accumulator (Milakov &
Gimelshein 2018, "Online normalizer calculation for softmax"): for a tile z = x W_tileᵀ of the logits,
    m' = max(m, max z);  Σ ← Σ e^(m − m') + Σ_v e^(z − m');  acc ← acc e^(m − m') + e^(z − m') W_tile
and in the end  loss = ln Σ + m − z_label,  dx = weight · (acc / Σ − W_label).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import ops
from ...backend import Array, cast
from .elementwise import BLOCK_ENTRIES, computes
from .linear import LEAST_ROWS, MOST_ROWS, dense
from .threads import parallel_rows, scratch

TILE = 4096  # entries of the vocabulary at a time


def applies(x: Array, weight: Any, *, labels: Array, weights: Array) -> bool:
    return computes(x) and x.size > 0 and (dense(weight) or isinstance(weight, ops.CompressedWeight))


@ops.linear_cross_entropy.kernel("cpu", applies)
def linear_cross_entropy(x: Array, weight: Any, *, labels: Array, weights: Array, needs: tuple[bool, bool]):
    if needs[1]:  # training the head: dW needs the whole softmax first
        return ops.linear_cross_entropy.definition(x, weight, labels=labels, weights=weights, needs=needs)
    count, width = x.shape
    losses = np.empty(count, x.dtype)
    dx = np.empty(x.shape, x.dtype) if needs[0] else None

    def run(a: int, b: int) -> None:
        rows, xb = b - a, x[a:b]
        top = np.full((rows, 1), -np.inf, x.dtype)
        total = np.zeros((rows, 1), x.dtype)
        accumulator = dx[a:b] if dx is not None else None
        if accumulator is not None:
            accumulator[...] = 0
        for start in range(0, len(weight), TILE):
            tile = cast(weight[start : start + TILE], x.dtype)
            z = np.matmul(xb, tile.T, out=scratch("logits", (rows, len(tile)), x.dtype))
            before, top = top, np.empty_like(top)
            sums = np.empty_like(top)
            step = max(1, BLOCK_ENTRIES // len(tile))
            for first in range(0, rows, step):
                part = slice(first, first + step)
                e = z[part]
                np.maximum(e.max(axis=1, keepdims=True), before[part], out=top[part])
                e -= top[part]
                np.exp(e, out=e)
                e.sum(axis=1, keepdims=True, out=sums[part])
            decay = np.exp(before - top)
            total *= decay
            total += sums
            if accumulator is not None:
                accumulator *= decay
                accumulator += np.matmul(z, tile, out=scratch("term", (rows, width), x.dtype))
        at_label = cast(weight[labels[a:b]], x.dtype)
        losses[a:b] = (np.log(total) + top)[:, 0] - np.vecdot(xb, at_label)
        if accumulator is not None:
            accumulator /= total
            accumulator -= at_label
            accumulator *= weights[a:b, None]

    parallel_rows(run, count, MOST_ROWS, LEAST_ROWS)

    def vjp(dloss):
        return (None if dx is None else dx * dloss.astype(dx.dtype)), None

    return (losses * weights).sum().astype(x.dtype), vjp
