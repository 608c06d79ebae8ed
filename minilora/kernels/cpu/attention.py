"""Causal attention a block of queries at a time: no (T, S) matrix is held, and keys after the block are never touched.

A block is STEP queries of the heads of one key-value head, or of several where their scores fit together; k and v are
not repeated. What backward needs of the softmax is made again from q, k and the log-sum-exp of each row; its row term
Σ_j P_ij dP_ij as well, so that o is not kept. Axes as in ops/attention.py: B batch, T queries, S keys, H heads,
K key-value heads, G = H / K, d head width; of a block: P key-value heads, t queries, n keys.
"""

from __future__ import annotations

from functools import partial
from itertools import product as each_of

import numpy as np

from ... import ops
from ...backend import Array
from .elementwise import computes
from .memory import empty
from .small import product
from .threads import run_all, scratch, thread_count

STEP = 64  # queries of a block
BLOCK_ENTRIES = 1 << 18  # scores of a block, all its heads together


class Blocks:
    """How one call is cut up: queries `step` at a time, key-value heads `together` at a time; and a block's scores."""

    def __init__(self, q: np.ndarray, k: np.ndarray, scale: float, segments: Array | None, window: int | None) -> None:
        self.q, self.k, self.segments, self.window = q, k, segments, window
        self.scale = q.dtype.type(scale)
        self.batch, self.queries, heads, self.width = q.shape
        self.keys, self.kv_heads = k.shape[1:3]
        self.group = heads // self.kv_heads
        self.earlier = self.keys - self.queries  # keys from a cache, before the first query
        self.step = min(STEP, self.queries)
        self.together = max(1, min(self.kv_heads, BLOCK_ENTRIES // (self.step * self.group * self.keys)))
        self.later = hidden(np.arange(self.step)[:, None] < np.arange(self.step), q.dtype)

    def starts(self) -> range:
        return range(0, self.queries, self.step)

    def kv_parts(self) -> list[slice]:
        """The key-value heads, `together` at a time."""
        return [slice(first, first + self.together) for first in range(0, self.kv_heads, self.together)]

    def of_queries(self, x: np.ndarray, row: int, part: slice, start: int) -> np.ndarray:
        """The block's part of x (B, T, H, d), as a view (P, G, t, d)."""
        block = x[row, start : start + self.step].reshape(-1, self.kv_heads, self.group, x.shape[-1])
        return block[:, part].transpose(1, 2, 0, 3)

    def of_keys(self, x: np.ndarray, row: int, part: slice, keys: slice = slice(None)) -> np.ndarray:
        """The block's part of x (B, S, K, d), as a view (P, n, d)."""
        return x[row, keys, part].transpose(1, 0, 2)

    def key_range(self, row: int, start: int) -> slice:
        """The keys that some query of the block may see."""
        first = self.earlier + start
        stop = min(first + self.step, self.keys)
        low = 0 if self.window is None else max(0, first - self.window + 1)
        if self.segments is not None:
            own = np.isin(self.segments[row, low:stop], self.segments[row, first:stop])
            low += int(own.argmax())
        return slice(low, stop)

    def scores(self, row: int, start: int, keys: slice, q: np.ndarray, scaled_k: np.ndarray) -> np.ndarray:
        """q kᵀ with −∞ where a key is not seen: q (P, G, t, d), scale · kᵀ (P, d, n) -> (P, G, t, n) in scratch."""
        s = scratch("scores", (*q.shape[:3], scaled_k.shape[-1]), q.dtype)
        product(q, scaled_k[:, None], s)
        if self.segments is None and self.window is None:
            late = s.shape[2]  # only among the block's own positions is some key later than a query
            if late > 1:
                s[..., s.shape[3] - late :] += self.later[:late, :late]
        else:
            s += self.unseen(row, start, keys)
        return s

    def unseen(self, row: int, start: int, keys: slice) -> np.ndarray:
        """−∞ where a query of the block does not see a key, else 0: (t, n)."""
        position = np.arange(self.earlier + start, min(self.earlier + start + self.step, self.keys))
        distance = position[:, None] - np.arange(keys.start, keys.stop)
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.segments is not None:
            seen &= self.segments[row, position][:, None] == self.segments[row, keys]
        return hidden(~seen, self.q.dtype)


def hidden(mask: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What is added to scores: −∞ where the (t, n) mask holds, 0 elsewhere."""
    return np.where(mask, dtype.type(-np.inf), dtype.type(0))


def copied(x: np.ndarray, name: str, factor: np.ndarray | None = None) -> np.ndarray:
    """x, or factor · x, with its entries in order, in scratch."""
    result = scratch(name, x.shape, x.dtype)
    if factor is None:
        result[...] = x
    else:
        np.multiply(x, factor, out=result)
    return result


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
    logsumexp = np.empty((blocks.batch, blocks.kv_heads, blocks.group, blocks.queries, 1), q.dtype)

    def forward(start: int, row: int, part: slice) -> None:
        keys = blocks.key_range(row, start)
        scaled_k = copied(blocks.of_keys(k, row, part, keys).swapaxes(1, 2), "scaled k", blocks.scale)
        s = blocks.scores(row, start, keys, blocks.of_queries(q, row, part, start), scaled_k)
        top = s.max(axis=-1, keepdims=True)
        s -= top
        np.exp(s, out=s)
        total = row_sums(s)  # (P, G, t, 1)
        mixed = product(s, blocks.of_keys(v, row, part, keys)[:, None], blocks.of_queries(o, row, part, start))
        mixed /= total
        np.log(total, out=total)
        total += top
        logsumexp[row, part, :, start : start + blocks.step] = total

    run_all([partial(forward, *task) for task in each_of(reversed(starts), rows, parts)])  # the longest first

    def vjp(do):
        dq = empty(q.shape, q.dtype)
        # A task takes every nth block of queries of its row and heads, and adds up its own dk and dv.
        splits = min(len(starts), max(1, -(-2 * thread_count() // (len(rows) * len(parts)))))
        dk, dv = (empty((splits, *k.shape), k.dtype) for _ in range(2))

        def backward(row: int, part: slice, split: int) -> None:
            k_rows = copied(blocks.of_keys(k, row, part), "k", blocks.scale)  # (P, S, d), scaled
            scaled_k = copied(k_rows.swapaxes(1, 2), "scaled k")
            turned_v = copied(blocks.of_keys(v, row, part).swapaxes(1, 2), "v")
            sum_dk, sum_dv = (scratch(name, k_rows.shape, k.dtype) for name in ("dk", "dv"))
            sum_dk[...] = 0
            sum_dv[...] = 0
            for start in starts[split::splits]:
                keys = blocks.key_range(row, start)
                qb, dob = (blocks.of_queries(x, row, part, start) for x in (q, do))
                p = blocks.scores(row, start, keys, qb, scaled_k[..., keys])
                p -= logsumexp[row, part, :, start : start + blocks.step]
                np.exp(p, out=p)
                ds = product(dob, turned_v[:, None, :, keys], scratch("dscores", p.shape, p.dtype))
                term = scratch("term", (len(p), p.shape[-1], blocks.width), p.dtype)
                # Over all queries of a group at once: (P, n, G t) (P, G t, d).
                sum_dv[:, keys] += product(by_key(p), stacked(copied(dob, "do")), term)
                ds -= np.vecdot(p, ds)[..., None]
                ds *= p
                sum_dk[:, keys] += product(by_key(ds), stacked(copied(qb, "q")), term)
                product(ds, k_rows[:, None, keys], blocks.of_queries(dq, row, part, start))
            np.multiply(sum_dk, blocks.scale, out=blocks.of_keys(dk[split], row, part))
            blocks.of_keys(dv[split], row, part)[...] = sum_dv

        run_all([partial(backward, *task) for task in each_of(rows, parts, range(splits))])
        if splits > 1:
            return dq, dk.sum(axis=0), dv.sum(axis=0)
        return dq, dk[0], dv[0]

    return o, vjp


def stacked(x: np.ndarray) -> np.ndarray:
    """(P, G, t, ·) -> (P, G t, ·)."""
    return x.reshape(len(x), -1, x.shape[-1])


def by_key(x: np.ndarray) -> np.ndarray:
    """(P, G, t, n) -> (P, n, G t)."""
    return stacked(x).swapaxes(1, 2)
