"""One launch over all adapters: AdamW, the gradients' norm, clipping, and rounding A and B for a pass.

What they compute: optim.py. The kernels and their roofline: lists.cu.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...backend import Array, pass_contexts
from ...optim import many_arrays
from .source import THREADS, function

PIECE = 4096  # values that a block works on


class Lists:
    """Where the pieces of some arrays lie, for a launch over all of them. Arrays are float32 and contiguous."""

    def __init__(self, sizes: Sequence[int]) -> None:
        pieces = [(number, start) for number, size in enumerate(sizes) for start in range(0, size, PIECE)]
        self.count = len(pieces)
        self.pieces = cupy.asarray(np.array(pieces, np.int64).reshape(-1, 2))
        self.sizes = cupy.asarray(np.array(sizes, np.int64))

    def launch(self, name: str, *arguments: Any, dtype: str = "float32") -> None:
        if self.count:
            kernel = function("lists", name, dtype, PIECE=PIECE)
            kernel((self.count,), (THREADS,), (self.pieces, self.sizes, *arguments))


class Tables:
    """Lists by their arrays' sizes, and addresses on the device by their values: both are the same every step."""

    MOST = 64

    def __init__(self) -> None:
        self.lists: dict[tuple[int, ...], Lists] = {}
        self.addresses: dict[tuple[int, ...], Array] = {}

    def of(self, arrays: Sequence[Array]) -> Lists:
        key = (arrays[0].device.id, *(array.size for array in arrays))
        if key not in self.lists:
            self.lists[key] = Lists(key[1:])
        return self.lists[key]

    def at(self, arrays: Sequence[Array]) -> Array:
        """The arrays' addresses, on the device."""
        key = (arrays[0].device.id, *(array.data.ptr for array in arrays))
        if key not in self.addresses:
            while len(self.addresses) >= self.MOST:
                del self.addresses[next(iter(self.addresses))]
            self.addresses[key] = cupy.asarray(np.array(key[1:], np.uint64))
        return self.addresses[key]


_tables = Tables()


def fused(*arrays: Array) -> bool:
    """Whether these can be in a list."""
    return all(
        isinstance(array, cupy.ndarray) and array.dtype == np.float32 and array.flags.c_contiguous for array in arrays
    )


def adamw(
    ws: list[Array], gs: list[Array], ms: list[Array], vs: list[Array], rates: np.ndarray, betas: tuple[float, float],
    eps: float, weight_decay: float, l2: float,
) -> None:  # fmt: skip
    """AdamW over all arrays in place; rates (count, 3): lr, lr / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ) of each."""
    numbers = (np.float32(value) for value in (*betas, eps, weight_decay, l2))
    addresses = (_tables.at(arrays) for arrays in (ws, gs, ms, vs))
    _tables.of(ws).launch("adamw", *addresses, cupy.asarray(rates.astype(np.float32)), *numbers)


def norm(gs: list[Array]) -> Array:
    """√(Σ g²) over all arrays, a 0-d float64 array."""
    lists, result = _tables.of(gs), cupy.zeros((), np.float64)
    partial = cupy.empty(max(1, lists.count), np.float64)
    lists.launch("squares", _tables.at(gs), partial)
    if lists.count:
        function("lists", "root_of_sum", "float32", PIECE=PIECE)((1,), (256,), (partial, np.int32(lists.count), result))
    return result


def clip(gs: list[Array], norm: Array, most: float) -> None:
    """Every g times min(1, most / (norm + 1e-6)), in place."""
    _tables.of(gs).launch("clip", _tables.at(gs), norm, np.float64(most))


# --- adapters rounded for a pass ------------------------------------------------------------------------------------


class Rounded(NamedTuple):
    """Copies of some arrays in another dtype: parts of one buffer, kept from pass to pass."""

    parts: dict[int, Array]  # by the address of the original
    lists: Lists
    sources: Array
    targets: Array


class Pass:
    """A network's adapters in the activations' dtype, good for one forward pass: all are rounded in one launch."""

    def __init__(self) -> None:
        self.known: dict[int, weakref.ref] = {}  # arrays that its passes have used, by address
        self.buffers: dict[tuple[Any, ...], Rounded] = {}
        self.rounded: dict[tuple[int, str], Array] | None = None  # None: outside a pass

    def round_all(self, dtype: np.dtype) -> None:
        """Round every known array that is alive, into the buffer that they have."""
        assert self.rounded is not None
        here = cupy.cuda.Device().id
        alive: dict[int, Array] = {}
        for address, reference in list(self.known.items()):
            array = reference()
            if array is None or array.data.ptr != address:
                del self.known[address]
            elif array.device.id == here:
                alive[address] = array
        if not alive:
            return
        key = (here, dtype.name, *((address, array.shape) for address, array in alive.items()))
        if key not in self.buffers:
            self.buffers = {other: buffer for other, buffer in self.buffers.items() if other[:2] != key[:2]}
            with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):  # it outlives a captured step
                self.buffers[key] = self._room(alive, dtype)
        buffer = self.buffers[key]
        buffer.lists.launch("narrow_all", buffer.sources, buffer.targets, dtype=dtype.name)
        for address, part in buffer.parts.items():
            self.rounded[address, dtype.name] = part

    def _room(self, arrays: dict[int, Array], dtype: np.dtype) -> Rounded:
        sizes = [array.size for array in arrays.values()]
        starts = np.cumsum([0, *(-(-size // 8) * 8 for size in sizes)])  # at 16-byte boundaries
        buffer = cupy.empty(int(starts[-1]), dtype)
        parts = {
            address: cupy.ndarray(array.shape, dtype, buffer.data + int(start) * dtype.itemsize)
            for (address, array), start in zip(arrays.items(), starts[:-1], strict=True)
        }
        targets = cupy.asarray(np.array([part.data.ptr for part in parts.values()], np.uint64))
        return Rounded(parts, Lists(sizes), cupy.asarray(np.array(list(arrays), np.uint64)), targets)


_passes: weakref.WeakKeyDictionary[Any, Pass] = weakref.WeakKeyDictionary()  # by network
_current: list[Pass] = []  # the pass that is going on is the last


def pass_of(network: Any) -> Pass:
    """What is kept from pass to pass for this network."""
    return _passes.setdefault(network, Pass())


@contextmanager
def one_pass(network: Any) -> Iterator[None]:
    """Inside, no adapter of the network changes: each is rounded once."""
    going_on = pass_of(network)
    before, going_on.rounded = going_on.rounded, {}
    _current.append(going_on)
    try:
        yield
    finally:
        _current.pop()
        going_on.rounded = before


pass_contexts.append(one_pass)


def narrowed(array: Array, dtype: np.dtype) -> Array:
    """A float32 array rounded to the activations' dtype; inside a pass the same result for the same array.

    A pass rounds what earlier passes used in one launch, and what is new to it by itself.
    """
    if array.dtype == dtype:
        return array
    if not _current or not fused(array):
        return array.astype(dtype)
    going_on, address = _current[-1], array.data.ptr
    rounded = going_on.rounded
    assert rounded is not None
    if not rounded:
        going_on.round_all(dtype)
    if (address, dtype.name) not in rounded:
        going_on.known[address] = weakref.ref(array)
        rounded[address, dtype.name] = array.astype(dtype)
    return rounded[address, dtype.name]


many_arrays.append(sys.modules[__name__])
