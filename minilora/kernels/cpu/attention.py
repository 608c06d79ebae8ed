"""Causal attention a block of queries at a time: no (T, S) matrix is held, and keys after the block are never touched.

A block is some queries of all G heads that share a key-value head, stacked: (t G, d) against (n, d) keys, two
products without repeating k or v. Axes as in ops/attention.py: B batch, T queries, S keys, H heads, K key-value heads,
G = H / K.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np

from ... import ops
from ...backend import Array
from .elementwise import computes
from .threads import run_all, scratch, thread_count

BLOCK_ROWS = 192  # queries times heads of a block
LEAST_STEP, MOST_STEP = 32, 128  # queries of a block, whatever the number of heads


class Blocks:
    """The blocks of one call: which queries, which keys they see, and their scores."""

    def __init__(self, q: np.ndarray, k: np.ndarray, scale: float, segments: Array | None, window: int | None) -> None:
        self.q, self.k, self.scale, self.segments, self.window = q, k, scale, segments, window
        self.batch, self.queries, heads, self.width = q.shape
        self.keys, self.kv_heads = k.shape[1:3]
        self.group = heads // self.kv_heads
        self.earlier = self.keys - self.queries  # keys from a cache, before the first query
        self.step = min(max(BLOCK_ROWS // self.group, LEAST_STEP), MOST_STEP)

    def starts(self) -> range:
        return range(0, self.queries, self.step)

    def heads(self, kv_head: int) -> slice:
        return slice(kv_head * self.group, (kv_head + 1) * self.group)

    def rows(self, x: np.ndarray, row: int, kv_head: int, start: int, name: str, factor: float = 1.0) -> np.ndarray:
        """The block's part of x (B, T, H, d), times factor, as (t G, d) in scratch."""
        part = x[row, start : start + self.step, self.heads(kv_head)]
        result = scratch(name, part.shape, part.dtype)
        np.multiply(part, part.dtype.type(factor), out=result)
        return result.reshape(-1, self.width)

    def key_range(self, row: int, start: int) -> slice:
        """The keys that some query of the block may see."""
        first = self.earlier + start
        stop = min(first + self.step, self.keys)
        low = 0 if self.window is None else max(0, first - self.window + 1)
        if self.segments is not None:
            own = np.isin(self.segments[row, low:stop], self.segments[row, first:stop])
            low += int(own.argmax())
        return slice(low, stop)

    def scores(self, row: int, kv_head: int, start: int, keys: slice) -> tuple[np.ndarray, np.ndarray]:
        """scale · q kᵀ with −∞ where a key is not seen, (t G, n), and the scaled q (t G, d)."""
        q = self.rows(self.q, row, kv_head, start, "q", self.scale)
        count = keys.stop - keys.start
        s = scratch("scores", (len(q), count), q.dtype)
        np.matmul(q, self.k[row, keys, kv_head].T, out=s)
        by_query = s.reshape(-1, self.group, count)
        if self.segments is None and self.window is None:
            late = len(by_query)  # only among the block's own positions is some key later than a query
            by_query[:, :, count - late :] += later_keys(late, s.dtype)
        else:
            by_query += self.hidden(row, start, keys, s.dtype)
        return s, q

    def hidden(self, row: int, start: int, keys: slice, dtype: np.dtype) -> np.ndarray:
        """−∞ where a query does not see a key, else 0: (t, 1, n)."""
        position = np.arange(self.earlier + start, min(self.earlier + start + self.step, self.keys))
        distance = position[:, None] - np.arange(keys.start, keys.stop)
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.segments is not None:
            seen &= self.segments[row, position][:, None] == self.segments[row, keys]
        return np.where(seen, dtype.type(0), dtype.type(-np.inf))[:, None]


def later_keys(count: int, dtype: np.dtype) -> np.ndarray:
    """−∞ above the diagonal, 0 elsewhere: (count, 1, count)."""
    position = np.arange(count)
    return np.where(position[:, None] >= position, dtype.type(0), dtype.type(-np.inf))[:, None]


def applies(q: Array, k: Array, v: Array, **options: object) -> bool:
    return computes(q, k, v) and q.size > 0


@ops.attention.kernel("cpu", applies)
def attention(q: Array, k: Array, v: Array, *, scale: float, segments: Array | None = None, window: int | None = None):
    blocks = Blocks(q, k, scale, segments, window)
    batch, queries, _, width = q.shape
    o = np.empty(q.shape, q.dtype)
    logsumexp = np.empty((batch, blocks.kv_heads, queries, blocks.group), q.dtype)

    def forward(row: int, kv_head: int, start: int) -> None:
        keys = blocks.key_range(row, start)
        s, _ = blocks.scores(row, kv_head, start, keys)
        top = s.max(axis=1, keepdims=True)
        s -= top
        np.exp(s, out=s)
        total = s.sum(axis=1, keepdims=True)
        ob = scratch("o", (len(s), width), s.dtype)
        np.matmul(s, v[row, keys, kv_head], out=ob)
        target = o[row, start : start + blocks.step, blocks.heads(kv_head)]
        np.divide(ob.reshape(target.shape), total.reshape(*target.shape[:2], 1), out=target)
        np.log(total, out=total)
        total += top
        logsumexp[row, kv_head, start : start + blocks.step] = total.reshape(-1, blocks.group)

    run_blocks(blocks, forward)

    def vjp(do):
        dq = np.empty(q.shape, q.dtype)
        # A task is one row, one key-value head and every nth block of queries; each adds up its own dk and dv.
        splits = min(len(blocks.starts()), max(1, -(-4 * thread_count() // (batch * blocks.kv_heads))))
        dk, dv = (np.zeros((splits, *k.shape), k.dtype) for _ in range(2))

        def backward(row: int, kv_head: int, split: int) -> None:
            for start in blocks.starts()[split::splits]:
                keys = blocks.key_range(row, start)
                p, qb = blocks.scores(row, kv_head, start, keys)
                p -= logsumexp[row, kv_head, start : start + blocks.step].reshape(-1, 1)
                np.exp(p, out=p)
                dob = blocks.rows(do, row, kv_head, start, "do")
                own = o[row, start : start + blocks.step, blocks.heads(kv_head)]
                delta = np.vecdot(dob.reshape(own.shape), own).reshape(-1, 1)
                term = scratch("term", (keys.stop - keys.start, width), p.dtype)
                dv[split, row, keys, kv_head] += np.matmul(p.T, dob, out=term)
                ds = scratch("dscores", p.shape, p.dtype)
                np.matmul(dob, v[row, keys, kv_head].T, out=ds)
                ds -= delta
                ds *= p
                dk[split, row, keys, kv_head] += np.matmul(ds.T, qb, out=term)
                dqb = np.matmul(ds, k[row, keys, kv_head], out=dob)
                target = dq[row, start : start + blocks.step, blocks.heads(kv_head)]
                np.multiply(dqb.reshape(own.shape), q.dtype.type(scale), out=target)

        run_all([partial(backward, *task) for task in product(range(batch), range(blocks.kv_heads), range(splits))])
        if splits > 1:
            dk, dv = dk.sum(axis=0, keepdims=True), dv.sum(axis=0, keepdims=True)
        return dq, dk[0], dv[0]

    return o, vjp


def run_blocks(blocks: Blocks, fn) -> None:
    """fn(row, kv_head, start) for every block, the longest first."""
    tasks = [
        (row, head, start)
        for start in reversed(blocks.starts())
        for row in range(blocks.batch)
        for head in range(blocks.kv_heads)
    ]
    run_all([partial(fn, *task) for task in tasks])
