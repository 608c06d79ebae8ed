"""A linear layer whose batch rows have an adapter each: one pass over W, and each adapter's term where its rows are.

The rows of an adapter are not gathered: a row's tokens lie together, so its term is added in place.
Axes: B batch rows, T tokens of a row, N = B T, in and out the layer's widths, r an adapter's rank, R all ranks.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ... import ops
from ...backend import Array, cast
from ...ops.linalg import rows
from .elementwise import computes
from .linear import LEAST_ROWS, MOST_ROWS, add_product, linear_applies
from .memory import empty, keep
from .threads import row_blocks, run_all, scratch


def applies(x: Array, weight: Any, bias: Array | None, *factors: Array, scales: tuple, owners: tuple) -> bool:
    return linear_applies(x, weight, bias) and x.ndim >= 2 and computes(x, *factors)


class Spans:
    """Where each adapter's tokens lie: (first, after the last, adapter) for each run of rows that share one."""

    def __init__(self, owners: tuple[int | None, ...], tokens_of_row: int) -> None:
        self.all: list[tuple[int, int, int]] = []
        for row, owner in enumerate(owners):
            begin, end = row * tokens_of_row, (row + 1) * tokens_of_row
            if owner is None:
                continue
            if self.all and self.all[-1][1:] == (begin, owner):
                begin = self.all.pop()[0]
            self.all.append((begin, end, owner))

    def within(self, a: int, b: int) -> list[tuple[int, int, int]]:
        """The parts of the runs that lie in a … b."""
        return [(max(a, begin), min(b, end), owner) for begin, end, owner in self.all if begin < b and a < end]


@ops.lora_rows.kernel("cpu", applies)
def lora_rows(
    x: Array,
    weight: Any,
    bias: Array | None,
    *factors: Array,
    scales: tuple[float, ...],
    owners: tuple[int | None, ...],
    needs: tuple[bool, ...],
):
    shape_x, (outside, inside), dtype = x.shape, weight.shape, x.dtype
    tokens = rows(x)
    count = len(tokens)
    As, Bs = factors[::2], factors[1::2]
    scaled_Bs = [lora_B * dtype.type(scale) for lora_B, scale in zip(Bs, scales, strict=True)]
    ends = np.cumsum([0, *map(len, As)])
    columns = [slice(begin, end) for begin, end in pairwise(ends)]
    stacked_A: Any = np.concatenate(As) if As else None  # (R, in): u of all adapters reads x once
    spans = Spans(owners, count // len(owners))
    y = empty((count, outside), dtype)
    u = np.empty((count, ends[-1]), dtype)
    matrix = cast(weight, dtype)
    bias = None if bias is None else cast(bias, dtype)

    def forward(a: int, b: int) -> None:
        np.matmul(tokens[a:b], matrix.T, out=y[a:b])
        if As:
            np.matmul(tokens[a:b], stacked_A.T, out=u[a:b])
        for begin, end, owner in spans.within(a, b):
            add_product(u[begin:end, columns[owner]], scaled_Bs[owner].T, y[begin:end])
        if bias is not None:
            y[a:b] += bias

    blocks = row_blocks(count, MOST_ROWS, LEAST_ROWS)
    run_all([partial(forward, a, b) for a, b in blocks])
    needs_A, needs_B = needs[3::2], needs[4::2]
    kept_u: Any = u if any(needs_B) else None
    kept: Any = keep(x) if any(needs_A) else None

    def vjp(dy):
        g = rows(dy)
        dx: Any = empty((count, inside), dtype) if needs[0] else None
        wide: Any = cast(weight, dtype) if needs[0] else None
        gradients_A = [np.zeros(A.shape, dtype) if need else None for A, need in zip(As, needs_A, strict=True)]
        gradients_B = [np.zeros(B.shape[::-1], dtype) if need else None for B, need in zip(Bs, needs_B, strict=True)]
        parts: list[list[tuple[int, Any, Any]]] = [[] for _ in blocks]  # of each block: (adapter, of A, of B)

        def backward(number: int, a: int, b: int) -> None:
            if needs[0]:
                np.matmul(g[a:b], wide, out=dx[a:b])
            for begin, end, owner in spans.within(a, b):
                part_A = part_B = None
                v = np.matmul(g[begin:end], scaled_Bs[owner])
                if needs[0]:
                    term = scratch("term", (end - begin, inside), dtype)
                    dx[begin:end] += np.matmul(v, As[owner], out=term)
                if needs_A[owner]:
                    if kept.left is not None:
                        v *= kept.left[begin:end]
                    part_A = np.matmul(v.T, kept.rows(begin, end))
                if needs_B[owner]:
                    part_B = np.matmul(kept_u[begin:end, columns[owner]].T, g[begin:end])
                parts[number].append((owner, part_A, part_B))

        run_all([partial(backward, number, a, b) for number, (a, b) in enumerate(blocks)])
        for owner, part_A, part_B in (part for block in parts for part in block):  # always in the same order
            if part_A is not None:
                gradients_A[owner] += part_A
            if part_B is not None:
                gradients_B[owner] += part_B
        gradients: list[Any] = []
        for scale, of_A, of_B in zip(scales, gradients_A, gradients_B, strict=True):
            if of_A is not None and kept.right is not None:
                of_A *= kept.right
            gradients += [of_A, None if of_B is None else of_B.T * dtype.type(scale)]
        dbias = g.sum(axis=0) if needs[2] else None
        return (dx.reshape(shape_x) if needs[0] else None), None, dbias, *gradients

    return y.reshape(*shape_x[:-1], outside), vjp
