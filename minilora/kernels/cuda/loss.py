"""Cross-entropy through the head, a chunk of tokens at a time. What it computes: ops/loss.py; the kernel: loss.cu."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ... import ops
from ...backend import Array
from .gemm import gemm
from .source import C_NAMES, function

CHUNK_ENTRIES = 1 << 25  # logits held at a time: 128 MiB in float32
THREADS = 1024
TILE = 128  # rows of a product that a multiprocessor computes together


def applies(x: Array, weight: Any, *, labels: Array, weights: Array) -> bool:
    return (
        isinstance(x, cupy.ndarray)
        and isinstance(weight, cupy.ndarray)
        and x.dtype == weight.dtype
        and x.dtype.name in C_NAMES
        and x.size > 0
        and labels.dtype == np.int64
    )


def rows_at_a_time(count: int, vocabulary: int) -> int:
    """Rows of a chunk: few chunks of at most CHUNK_ENTRIES logits, of about one size, in whole tiles of a product.

    (Cut at CHUNK_ENTRIES, 4096 rows of SmolLM2's logits end in a chunk of four rows, which reads all of the head too.)
    """
    most = max(1, CHUNK_ENTRIES // vocabulary)
    most -= most % TILE if most > TILE else 0
    chunks = -(-count // most)
    return min(count, most, -(-count // chunks // TILE) * TILE)


@ops.linear_cross_entropy.kernel("cuda", applies)
def linear_cross_entropy(x: Array, weight: Array, *, labels: Array, weights: Array, needs: tuple[bool, bool]):
    count, vocabulary = len(x), len(weight)
    chunk = rows_at_a_time(count, vocabulary)
    losses = cupy.empty(count, np.float32)
    weights = weights.astype(np.float32, copy=False)
    dx = cupy.empty_like(x) if needs[0] else None
    dweight = cupy.zeros(weight.shape, np.float32) if needs[1] else None
    stride = -(-vocabulary // 8) * 8  # from row to row of the logits
    even = vocabulary - vocabulary % 8 or vocabulary
    parts = [slice(0, even), slice(even, vocabulary)][
        : 2 if even < vocabulary else 1
    ]  # cuBLAS is slow at a width that 8 does not divide
    logits = cupy.empty((chunk, stride), np.float32)
    dlogits: Any = cupy.empty((chunk, stride), x.dtype) if any(needs) else None
    kernel = function("loss", "cross_entropy", x.dtype.name)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        rows = part.stop - start
        for words in parts:
            gemm(x[part], weight[words].T, logits[:rows, words])
        gradient = np.uint64(0) if dlogits is None else dlogits
        arguments = (
            logits,
            labels[part],
            weights[part],
            losses[part],
            gradient,
            np.int32(vocabulary),
            np.int32(stride),
        )
        kernel((rows,), (THREADS,), arguments)
        if dx is not None:
            for words in parts:
                gemm(dlogits[:rows, words], weight[words], dx[part], beta=float(words.start > 0))
        if dweight is not None:
            gemm(dlogits[:rows, :vocabulary].T, x[part], dweight, beta=1.0)

    def vjp(dloss):
        return (None if dx is None else dx * dloss.astype(dx.dtype)), (None if dweight is None else dweight * dloss)

    return losses.sum(), vjp
