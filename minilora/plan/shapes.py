"""Arrays that have a shape and no values, and the ledger that knows how many bytes of such arrays are alive.

The engine's own code (network, tape, checkpoint) runs on them as it runs on NumPy's: a `ShapeArray` goes where an array
goes, and lives as long as the array would. What a primitive makes of them is said in rules.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..models import CausalLM, family_of
from ..nn import Weights


class Ledger:
    """Bytes alive now, and the most that the process held at any time.

    There are three kinds of memory. The *heap*: an array's bytes are given back when it is gone. The *pool*: buffers
    that kernels reuse and never give back, so the process holds as much as was ever in use at once (kernels/cpu/
    memory.py; CuPy's pool). *Scratch*: a buffer by name, as large as the largest that was ever asked for.
    """

    def __init__(self) -> None:
        self.heap = self.pool = self.pool_held = self.peak = 0
        self.scratch: dict[str, int] = {}

    @property
    def alive(self) -> int:
        """Bytes of the arrays that are alive now."""
        return self.heap + self.pool

    @property
    def held(self) -> int:
        """Bytes that the process holds now, free buffers and scratch with it."""
        return self.heap + self.pool_held + sum(self.scratch.values())

    def take(self, nbytes: int, pooled: bool) -> None:
        if pooled:
            self.pool += nbytes
            self.pool_held = max(self.pool_held, self.pool)
        else:
            self.heap += nbytes
        self.passing(0)

    def give_back(self, nbytes: int, pooled: bool) -> None:
        if pooled:
            self.pool -= nbytes
        else:
            self.heap -= nbytes

    def passing(self, nbytes: int) -> None:
        """Heap arrays that come and go while nothing else changes."""
        self.peak = max(self.peak, self.held + nbytes)

    def need_scratch(self, name: str, nbytes: int) -> None:
        self.scratch[name] = max(nbytes, self.scratch.get(name, 0))
        self.passing(0)


class _Block:
    """The memory of one array and all its views: counted until the last of them is gone."""

    __slots__ = ("ledger", "nbytes", "pooled")

    def __init__(self, ledger: Ledger, nbytes: int, pooled: bool) -> None:
        self.ledger, self.nbytes, self.pooled = ledger, nbytes, pooled
        ledger.take(nbytes, pooled)

    def __del__(self) -> None:
        self.ledger.give_back(self.nbytes, self.pooled)


class ShapeArray:
    """A shape and a dtype in the place of an array. Views share their base's memory, as NumPy's do.

    recipe: the arrays that it can be made from again; a closure may keep these instead (kernels/cpu/memory.py). NumPy's
    own functions refuse it: what has no rule is an error, not a wrong number.
    """

    __array_ufunc__ = None

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, block: _Block | None = None, base: ShapeArray | None = None
    ) -> None:
        self.shape, self.dtype, self.block, self.base = tuple(shape), np.dtype(dtype), block, base
        self.recipe: tuple[ShapeArray, ...] = ()

    @classmethod
    def taken(
        cls, ledger: Ledger, shape: tuple[int, ...], dtype: Any, pooled: bool = False, touched: int | None = None
    ) -> ShapeArray:
        """An array of its own. touched: the bytes that are written, where that is less than all of a zeroed array."""
        array = cls(shape, dtype)
        array.block = _Block(ledger, array.nbytes if touched is None else min(touched, array.nbytes), pooled)
        return array

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> ShapeArray:
        return self.transpose(None)

    def _view(self, function: Any) -> ShapeArray:
        """The view that NumPy would make: `function` is asked with an array of this shape that has one byte."""
        shape = function(np.broadcast_to(np.empty((), np.bool_), self.shape)).shape
        return ShapeArray(shape, self.dtype, self.block, base=self)

    def reshape(self, *shape: Any) -> ShapeArray:
        return self._view(lambda array: array.reshape(*shape))

    def transpose(self, axes: Any) -> ShapeArray:
        return self._view(lambda array: array.transpose(axes))

    def __getitem__(self, index: Any) -> ShapeArray:
        return self._view(lambda array: array[index])

    def __array__(self, *args: Any, **options: Any) -> None:
        raise TypeError("a ShapeArray has no values: the primitive that was called has no rule in plan/rules.py")

    def __len__(self) -> int:
        return self.shape[0]

    def astype(self, dtype: Any, copy: bool = True) -> ShapeArray:
        if not copy and self.dtype == dtype:
            return self
        if self.block is None:
            return ShapeArray(self.shape, dtype)  # a copy of a parameter is another one
        return self._new(self.shape, dtype)

    def __add__(self, other: ShapeArray) -> ShapeArray:
        return self._new(np.broadcast_shapes(self.shape, other.shape), np.result_type(self.dtype, other.dtype))

    def _new(self, shape: tuple[int, ...], dtype: Any) -> ShapeArray:
        assert self.block is not None, "arithmetic on a parameter outside a primitive"
        return ShapeArray.taken(self.block.ledger, shape, dtype)


def shape_network(config: dict[str, Any], held: Any = np.float32, computes: Any = np.float32) -> CausalLM:
    """The network of a config.json's contents, built by its family's own code, with weights that are shapes of dtype
    `held`.

    computes: the dtype of its activations. Raises MiniloraError for a config that is not supported.
    """
    family = family_of(config)
    weights = Weights(lambda name, shape: ShapeArray(shape, held))
    return family.network(family.read_config(config), weights, np.dtype(computes))
