"""Causal attention a block of queries at a time: no (T, S) matrix is held, and keys after the block are never touched.

A block is some queries of all G heads that share a key-value head, stacked to (t G, d) against (n, d) keys: two
products, without repeating k or v; several key-value heads go into one call. Axes as in ops/attention.py: B batch,
T queries, S keys, H heads, K key-value heads, G = H / K, d head width.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np

from ... import ops
from ...backend import Array
from .elementwise import computes
from .memory import empty
from .threads import run_all, scratch, thread_count

BLOCK_ROWS = 192  # queries times heads of a block
LEAST_STEP, MOST_STEP = 32, 128  # queries of a block, whatever the number of heads
BLOCK_ENTRIES = 1 << 18  # scores of a block, all its key-value heads together


class Blocks:
    """How one call is cut up: queries `step` at a time, key-value heads `together` at a time; and a block's scores."""

    def __init__(self, q: np.ndarray, k: np.ndarray, scale: float, segments: Array | None, window: int | None) -> None:
        self.q, self.k, self.segments, self.window = q, k, segments, window
        self.scale = q.dtype.type(scale)
        self.batch, self.queries, heads, self.width = q.shape
        self.keys, self.kv_heads = k.shape[1:3]
        self.group = heads // self.kv_heads
        self.earlier = self.keys - self.queries  # keys from a cache, before the first query
        self.step = min(max(BLOCK_ROWS // self.group, LEAST_STEP), MOST_STEP, self.queries)
        entries = self.step * self.group * self.keys
        self.together = max(1, min(self.kv_heads, BLOCK_ENTRIES // entries))
        self.later = hidden(np.arange(self.step)[:, None] < np.arange(self.step), q.dtype)

    def starts(self) -> range:
        return range(0, self.queries, self.step)

    def kv_parts(self) -> list[slice]:
        """The key-value heads, `together` at a time."""
        return [slice(first, first + self.together) for first in range(0, self.kv_heads, self.together)]

    def of_queries(self, x: np.ndarray, row: int, part: slice, start: int) -> np.ndarray:
        """The block's part of x (B, T, H, d), as a view (P, t, G, d) with P key-value heads."""
        block = x[row, start : start + self.step].reshape(-1, self.kv_heads, self.group, x.shape[-1])
        return block[:, part].transpose(1, 0, 2, 3)

    def of_keys(self, x: np.ndarray, row: int, part: slice, keys: slice) -> np.ndarray:
        """The block's part of x (B, S, K, d), as a view (P, n, d)."""
        return x[row, keys, part].transpose(1, 0, 2)

    def gathered(self, x: np.ndarray, name: str) -> np.ndarray:
        """A (P, t, G, d) view copied together as (P, t G, d), in scratch."""
        result = scratch(name, x.shape, x.dtype)
        result[...] = x
        return result.reshape(len(x), -1, self.width)

    def key_range(self, row: int, start: int) -> slice:
        """The keys that some query of the block may see."""
        first = self.earlier + start
        stop = min(first + self.step, self.keys)
        low = 0 if self.window is None else max(0, first - self.window + 1)
        if self.segments is not None:
            own = np.isin(self.segments[row, low:stop], self.segments[row, first:stop])
            low += int(own.argmax())
        return slice(low, stop)

    def scores(self, row: int, part: slice, start: int, keys: slice) -> tuple[np.ndarray, np.ndarray]:
        """scale · q kᵀ with −∞ where a key is not seen, (P, t G, n), and scale · q, (P, t G, d)."""
        q = self.gathered(self.of_queries(self.q, row, part, start), "q")
        q *= self.scale
        k = self.of_keys(self.k, row, part, keys)
        s = scratch("scores", (*q.shape[:2], k.shape[1]), q.dtype)
        np.matmul(q, k.transpose(0, 2, 1), out=s)
        by_query = s.reshape(len(s), -1, self.group, k.shape[1])
        if self.segments is None and self.window is None:
            late = by_query.shape[1]  # only among the block's own positions is some key later than a query
            if late > 1:
                by_query[..., k.shape[1] - late :] += self.later[:late, :, :late]
        else:
            by_query += self.unseen(row, start, keys)
        return s, q

    def unseen(self, row: int, start: int, keys: slice) -> np.ndarray:
        """−∞ where a query of the block does not see a key, else 0: (t, 1, n)."""
        position = np.arange(self.earlier + start, min(self.earlier + start + self.step, self.keys))
        distance = position[:, None] - np.arange(keys.start, keys.stop)
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.segments is not None:
            seen &= self.segments[row, position][:, None] == self.segments[row, keys]
        return hidden(~seen, self.q.dtype)


def hidden(mask: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What is added to scores: −∞ where the (t, n) mask holds, 0 elsewhere, (t, 1, n)."""
    return np.where(mask, dtype.type(-np.inf), dtype.type(0))[:, None]


def row_sums(x: np.ndarray) -> np.ndarray:
    """Σ over the last axis, which stays: as a product with ones, several times faster than NumPy's sum."""
    return np.matmul(x, np.ones((x.shape[-1], 1), x.dtype))


def applies(q: Array, k: Array, v: Array, **options: object) -> bool:
    return computes(q, k, v) and q.size > 0


@ops.attention.kernel("cpu", applies)
def attention(q: Array, k: Array, v: Array, *, scale: float, segments: Array | None = None, window: int | None = None):
    blocks = Blocks(q, k, scale, segments, window)
    rows, parts, starts = range(blocks.batch), blocks.kv_parts(), blocks.starts()
    o = empty(q.shape, q.dtype)
    logsumexp = np.empty((blocks.batch, blocks.kv_heads, blocks.queries, blocks.group), q.dtype)

    def forward(start: int, row: int, part: slice) -> None:
        keys = blocks.key_range(row, start)
        s, _ = blocks.scores(row, part, start, keys)
        top = s.max(axis=-1, keepdims=True)
        s -= top
        np.exp(s, out=s)
        total = row_sums(s)  # (P, t G, 1)
        target = blocks.of_queries(o, row, part, start)
        mixed = scratch("o", (*s.shape[:2], blocks.width), s.dtype)
        np.matmul(s, blocks.of_keys(v, row, part, keys), out=mixed)
        np.divide(mixed.reshape(target.shape), total.reshape(*target.shape[:3], 1), out=target)
        np.log(total, out=total)
        total += top
        logsumexp[row, part, start : start + blocks.step] = total.reshape(target.shape[:3])

    run_all([partial(forward, *task) for task in product(reversed(starts), rows, parts)])  # the longest first

    def vjp(do):
        dq = empty(q.shape, q.dtype)
        # A task takes every nth block of queries of its row and heads, and adds up its own dk and dv.
        splits = min(len(starts), max(1, -(-2 * thread_count() // (len(rows) * len(parts)))))
        dk, dv = (empty((splits, *k.shape), k.dtype) for _ in range(2))

        def backward(row: int, part: slice, split: int) -> None:
            heads = len(range(*part.indices(blocks.kv_heads)))
            sum_dk, sum_dv = (scratch(name, (heads, blocks.keys, blocks.width), k.dtype) for name in ("dk", "dv"))
            sum_dk[...] = 0
            sum_dv[...] = 0
            for start in starts[split::splits]:
                keys = blocks.key_range(row, start)
                p, qb = blocks.scores(row, part, start, keys)
                p -= logsumexp[row, part, start : start + blocks.step].reshape(heads, -1, 1)
                np.exp(p, out=p)
                do_view = blocks.of_queries(do, row, part, start)
                dob = blocks.gathered(do_view, "do")
                delta = np.vecdot(dob.reshape(do_view.shape), blocks.of_queries(o, row, part, start))
                term = scratch("term", (heads, keys.stop - keys.start, blocks.width), p.dtype)
                sum_dv[:, keys] += np.matmul(p.transpose(0, 2, 1), dob, out=term)
                ds = scratch("dscores", p.shape, p.dtype)
                np.matmul(dob, blocks.of_keys(v, row, part, keys).transpose(0, 2, 1), out=ds)
                ds -= delta.reshape(heads, -1, 1)
                ds *= p
                sum_dk[:, keys] += np.matmul(ds.transpose(0, 2, 1), qb, out=term)
                np.matmul(ds, blocks.of_keys(k, row, part, keys), out=dob)
                np.multiply(dob.reshape(do_view.shape), blocks.scale, out=blocks.of_queries(dq, row, part, start))
            blocks.of_keys(dk[split], row, part, slice(None))[...] = sum_dk
            blocks.of_keys(dv[split], row, part, slice(None))[...] = sum_dv

        run_all([partial(backward, *task) for task in product(rows, parts, range(splits))])
        if splits > 1:
            return dq, dk.sum(axis=0), dv.sum(axis=0)
        return dq, dk[0], dv[0]

    return o, vjp
