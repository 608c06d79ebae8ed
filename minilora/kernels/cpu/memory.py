"""Memory for results: large arrays are taken from buffers whose last user is gone, and cheap ones are made again.

A fresh array of some megabytes costs more than a pass over it, because the system hands out its pages one by one and
zeroed. `empty` reuses buffers instead. `remember` and `keep` let a layer's backward pass have its input again, a few
rows at a time, where that input is a norm's or an activation's output: it need not be held from forward to backward.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from .threads import scratch

SMALLEST = 1 << 18  # bytes: smaller arrays come from NumPy's own allocator
CLASSES = 8  # sizes of buffers between one power of two and the next


class Buffers:
    """Buffers by size. One is free when nothing but this object refers to it: no array lies in it any more.

    The buffers together are never larger than what was in use at one time, and the one that is asked for.
    """

    def __init__(self) -> None:
        self.by_size: dict[int, list[np.ndarray]] = {}
        self.most_used = 0

    def take(self, nbytes: int) -> np.ndarray:
        """A buffer of at least `nbytes` bytes that nothing refers to."""
        step = 1 << max(0, nbytes.bit_length() - 1 - CLASSES.bit_length() + 1)
        size = -(-nbytes // step) * step
        held = self.by_size.setdefault(size, [])
        for index in range(len(held)):
            if sys.getrefcount(held[index]) == FREE:
                return held[index]
        self._make_room(size)
        held.append(np.empty(size, np.uint8))
        return held[-1]

    def _make_room(self, size: int) -> None:
        """Forget free buffers of other sizes, if with a new one there would be more than was ever in use."""
        used = 0
        free: list[tuple[int, int]] = []
        for each, held in self.by_size.items():
            for index in range(len(held)):
                if sys.getrefcount(held[index]) == FREE:
                    free.append((each, index))
                else:
                    used += each
        self.most_used = max(self.most_used, used + size)
        total = used + size + sum(each for each, _ in free)
        for each, index in sorted(free, reverse=True):  # within a size the last first: indices stay right
            if total <= self.most_used:
                break
            del self.by_size[each][index]
            total -= each


def _count_when_free() -> int:
    held = [np.empty(1, np.uint8)]
    return sys.getrefcount(held[0])


FREE = _count_when_free()
_buffers = Buffers()


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As numpy.empty, from a reused buffer where the array is large."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < SMALLEST:
        return np.empty(shape, dtype)
    return _buffers.take(nbytes)[:nbytes].view(dtype).reshape(shape)


def empty_like(array: np.ndarray) -> np.ndarray:
    return empty(array.shape, array.dtype)


# --- making again instead of keeping ----------------------------------------------------------------------------------

Recipe = Callable[[int, int, np.ndarray], None]  # (start, stop, out): write rows start … stop of the (N, width) array


class Kept:
    """What a closure holds to have the rows of an array x (..., width) later: x = left · rows · right.

    left (N, 1) and right (width,) are None for 1: a product with x scales its other operand and its result instead.
    """

    def __init__(self, rows: Callable[[int, int], np.ndarray], left: Any = None, right: Any = None) -> None:
        self.rows, self.left, self.right = rows, left, right


_known: dict[int, tuple[weakref.ref, Kept]] = {}


def remember(array: np.ndarray, recipe: Recipe) -> None:
    """Say how `array` is made, until it is gone."""
    width, dtype = array.shape[-1], array.dtype

    def remade(start: int, stop: int) -> np.ndarray:
        out = scratch("remade", (stop - start, width), dtype)
        recipe(start, stop, out)
        return out

    _remember(array, Kept(remade))


def remember_scaled(array: np.ndarray, base: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Say that `array` is left · base · right, for base (N, width), left (N, 1), right (width,), until it is gone."""
    _remember(array, Kept(lambda start, stop: base[start:stop], left, right))


def _remember(array: np.ndarray, kept: Kept) -> None:
    key = id(array)
    _known[key] = weakref.ref(array, lambda _: _known.pop(key, None)), kept


def keep(array: np.ndarray) -> Kept:
    """What to hold instead of an array (..., width): how it is made, or its rows themselves."""
    known = _known.get(id(array))
    if known is not None and known[0]() is array:
        return known[1]
    rows = array.reshape(-1, array.shape[-1])
    return Kept(lambda start, stop: rows[start:stop])
