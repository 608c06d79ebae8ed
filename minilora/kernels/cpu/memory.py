"""Memory for results: large arrays are taken from buffers whose last user is gone, and cheap ones are made again.

A fresh array of some megabytes costs more than a pass over it, because the system hands out its pages one by one and
zeroed. `empty` reuses buffers instead. `remember` and `keep` let a layer's backward pass make its input again, a few
rows at a time, where that input is a norm's or an activation's output: it need not be held from forward to backward.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable

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
_recipes: dict[int, tuple[weakref.ref, Recipe]] = {}


def remember(array: np.ndarray, recipe: Recipe) -> None:
    """Say how `array` is made, until it is gone."""
    key = id(array)
    _recipes[key] = weakref.ref(array, lambda _: _recipes.pop(key, None)), recipe


def keep(array: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """What a closure holds to have rows start … stop of array (..., width) later: its recipe, or the array itself."""
    known = _recipes.get(id(array))
    if known is not None and known[0]() is array:
        recipe, width, dtype = known[1], array.shape[-1], array.dtype

        def remade(start: int, stop: int) -> np.ndarray:
            out = scratch("remade", (stop - start, width), dtype)
            recipe(start, stop, out)
            return out

        return remade
    rows = array.reshape(-1, array.shape[-1])
    return lambda start, stop: rows[start:stop]
