"""One launch over all adapters: AdamW, the gradients' norm, clipping, and rounding A and B for a pass.

What they compute: optim.py. The kernels and their roofline: lists.cu.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...backend import Array
from ...execution import many_arrays, pass_contexts
from .source import THREADS, function

PIECE = 4096  # values that a block works on


class Lists:
    """Where the pieces of some float32 arrays lie, for a launch over all of them."""

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
        self.layouts: dict[tuple[Any, ...], Array] = {}

    def of(self, arrays: Sequence[Array]) -> Lists:
        key = (arrays[0].device.id, *(array.size for array in arrays))
        return self._kept(self.lists, key, lambda: Lists(key[1:]))

    def at(self, arrays: Sequence[Array]) -> Array:
        """The arrays' addresses, on the device."""
        key = (arrays[0].device.id, *(array.data.ptr for array in arrays))
        return self._kept(self.addresses, key, lambda: cupy.asarray(np.array(key[1:], np.uint64)))

    def rows(self, arrays: Sequence[Array]) -> Array:
        """Each array's width and its distance from row to row, on the device."""
        key = (arrays[0].device.id, *(row_layout(array) for array in arrays))
        return self._kept(self.layouts, key, lambda: cupy.asarray(np.array(key[1:], np.int32).reshape(-1, 2)))

    def _kept(self, held: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
        """held[key], made where it is missing; the oldest of MOST makes room."""
        if key not in held:
            while len(held) >= self.MOST:
                del held[next(iter(held))]
            held[key] = make()
        return held[key]


_tables = Tables()


def row_layout(array: Array) -> tuple[int, int]:
    """The width and the distance from row to row, in values, of an array that is contiguous or a part of columns."""
    width = array.shape[-1] if array.ndim else 1
    return width, (array.strides[0] // array.itemsize if array.ndim == 2 else width)


def fused(*arrays: Array, parts: bool = False) -> bool:
    """Whether these can be in a list: float32 and contiguous; with `parts`, matrices may be columns of wider ones."""
    return all(
        isinstance(array, cupy.ndarray)
        and array.dtype == np.float32
        and (array.flags.c_contiguous or (parts and array.ndim == 2 and array.strides[1] == array.itemsize))
        for array in arrays
    )


def adamw(
    ws: list[Array], gs: list[Array], ms: list[Array], vs: list[Array], rates: np.ndarray, betas: tuple[float, float],
    eps: float, weight_decay: float, l2: float,
) -> None:  # fmt: skip
    """AdamW over all arrays in place; rates (count, 3): lr, lr / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ) of each. Of the arrays
    only the gradients may be parts of wider ones.
    """
    numbers = (np.float32(value) for value in (*betas, eps, weight_decay, l2))
    w, g, m, v = (_tables.at(arrays) for arrays in (ws, gs, ms, vs))
    _tables.of(ws).launch("adamw", w, g, _tables.rows(gs), m, v, cupy.asarray(rates.astype(np.float32)), *numbers)


def norm(gs: list[Array]) -> Array:
    """√(Σ g²) over all arrays, a 0-d float64 array."""
    lists, result = _tables.of(gs), cupy.zeros((), np.float64)
    partial = cupy.empty(max(1, lists.count), np.float64)
    lists.launch("squares", _tables.at(gs), _tables.rows(gs), partial)
    if lists.count:
        function("lists", "root_of_sum", "float32", PIECE=PIECE)((1,), (256,), (partial, np.int32(lists.count), result))
    return result


def clip(gs: list[Array], norm: Array, most: float) -> None:
    """Every g times min(1, most / (norm + 1e-6)), in place."""
    _tables.of(gs).launch("clip", _tables.at(gs), _tables.rows(gs), norm, np.float64(most))


# --- adapters rounded for a pass ------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """A and B of layers that read the same input, in the activations' dtype: A one under the other, (R, in), and B as
    the blocks of a (Σ out, R) matrix that is zero elsewhere; R: the sum of the ranks.
    """

    lora_A: Array
    lora_B: Array


class Rounded(NamedTuple):
    """Copies of some arrays in another dtype, kept from pass to pass."""

    parts: dict[int, Array]  # by the address of the original
    stacks: dict[tuple[int, ...], Stack]  # by the addresses of the As and Bs in them
    lists: Lists
    sources: Array
    targets: Array
    rows: Array


class Pass:
    """A network's adapters in the activations' dtype, good for one forward pass: all are rounded in one launch."""

    def __init__(self) -> None:
        self.known: dict[int, weakref.ref] = {}  # arrays that its passes have used, by address
        self.groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # As and Bs that were stacked; layers' sizes
        self.buffers: dict[tuple[Any, ...], Rounded] = {}
        self.rounded: dict[tuple[int, str], Array] | None = None  # None: outside a pass
        self.stacks: dict[tuple[int, ...], Stack] = {}

    def knows(self, array: Array) -> bool:
        """Whether it is this array that is known under its address: a factor that a pass computes (PiSSA's) is gone
        soon, and the next one may lie where it lay.
        """
        reference = self.known.get(array.data.ptr)
        return reference is not None and reference() is array

    def _alive(self) -> dict[int, Array]:
        """The known arrays that are still there, by address; the others, and their groups, are forgotten."""
        here = cupy.cuda.Device().id
        alive: dict[int, Array] = {}
        for address, reference in list(self.known.items()):
            array = reference()
            if array is None or array.data.ptr != address:
                del self.known[address]
            elif array.device.id == here and array.flags.c_contiguous:
                alive[address] = array
        self.groups = {key: sizes for key, sizes in self.groups.items() if all(address in alive for address in key)}
        return alive

    def _key(self, alive: dict[int, Array], dtype: np.dtype) -> tuple[Any, ...]:
        shapes = ((address, array.shape) for address, array in alive.items())
        return (cupy.cuda.Device().id, dtype.name, tuple(self.groups), *shapes)

    def is_settled(self, dtype: np.dtype) -> bool:
        """Whether the next pass finds the buffers that it rounds into, rather than make them."""
        alive = self._alive()
        return not alive or self._key(alive, dtype) in self.buffers

    def round_all(self, dtype: np.dtype) -> None:
        """Round every known array that is alive, into the buffers that they have."""
        assert self.rounded is not None
        if not (alive := self._alive()):
            return
        key = self._key(alive, dtype)
        if key not in self.buffers:
            self.buffers = {other: buffer for other, buffer in self.buffers.items() if other[:2] != key[:2]}
            with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):  # it outlives a recorded step
                self.buffers[key] = self._room(alive, dtype)
        buffer = self.buffers[key]
        buffer.lists.launch("narrow_all", buffer.sources, buffer.targets, buffer.rows, dtype=dtype.name)
        self.stacks = buffer.stacks
        for address, part in buffer.parts.items():
            self.rounded[address, dtype.name] = part

    def _room(self, arrays: dict[int, Array], dtype: np.dtype) -> Rounded:
        parts: dict[int, Array] = {}
        stacks = {}
        for key, sizes in self.groups.items():
            As, Bs = [arrays[address] for address in key[::2]], [arrays[address] for address in key[1::2]]
            stacks[key] = stack = stacked(As, Bs, sizes, dtype)
            for array, part in zip((*As, *Bs), parts_of(stack, sizes), strict=True):
                parts[array.data.ptr] = part
        for address, array in arrays.items():
            if address not in parts:
                parts[address] = cupy.empty(array.shape, dtype)
        targets = cupy.asarray(np.array([parts[address].data.ptr for address in arrays], np.uint64))
        rows = cupy.asarray(np.array([row_layout(parts[address]) for address in arrays], np.int32))
        sources = cupy.asarray(np.array(list(arrays), np.uint64))
        return Rounded(parts, stacks, Lists([array.size for array in arrays.values()]), sources, targets, rows)


def parts_of(stack: Stack, sizes: Sequence[tuple[int, int]]) -> list[Array]:
    """The As, then the Bs within a stack; sizes: (out, rank) of every layer, rank 0 for one without an adapter."""
    ranks, outs = np.cumsum([0, *(rank for _, rank in sizes)]), np.cumsum([0, *(out for out, _ in sizes)])
    As, Bs = [], []
    for index, (_, rank) in enumerate(sizes):
        if rank:
            columns = slice(ranks[index], ranks[index + 1])
            As.append(stack.lora_A[columns])
            Bs.append(stack.lora_B[outs[index] : outs[index + 1], columns])
    return As + Bs


def stacked(As: Sequence[Array], Bs: Sequence[Array], sizes: Sequence[tuple[int, int]], dtype: np.dtype) -> Stack:
    """The stack of these As and Bs, rounded to the dtype."""
    total, outs = sum(len(A) for A in As), sum(out for out, _ in sizes)
    stack = Stack(cupy.empty((total, As[0].shape[1]), dtype), cupy.zeros((outs, total), dtype))
    for array, part in zip((*As, *Bs), parts_of(stack, sizes), strict=True):
        part[...] = array.astype(dtype)
    return stack


_passes: weakref.WeakKeyDictionary[Any, Pass] = weakref.WeakKeyDictionary()  # by network
_current: list[Pass] = []  # the pass that is going on is the last


def pass_of(network: Any) -> Pass:
    """What is kept from pass to pass for this network."""
    return _passes.setdefault(network, Pass())


@contextmanager
def one_pass(network: Any) -> Iterator[None]:
    """Inside, no adapter of the network changes: each is rounded once."""
    going_on = pass_of(network)
    before, going_on.rounded, going_on.stacks = going_on.rounded, {}, {}
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
    if (address, dtype.name) not in rounded or not going_on.knows(array):
        going_on.known[address] = weakref.ref(array)
        rounded[address, dtype.name] = array.astype(dtype)
    return rounded[address, dtype.name]


def narrowed_stack(
    As: Sequence[Array], Bs: Sequence[Array], sizes: Sequence[tuple[int, int]], dtype: np.dtype
) -> Stack:
    """The As and Bs of layers that read the same input, as `narrowed` has each, in one stack."""
    if not _current or not fused(*As, *Bs) or As[0].dtype == dtype:
        return stacked(As, Bs, sizes, dtype)
    going_on = _current[-1]
    assert going_on.rounded is not None
    if not going_on.rounded:
        going_on.round_all(dtype)
    key = tuple(array.data.ptr for pair in zip(As, Bs, strict=True) for array in pair)
    found = going_on.stacks.get(key)
    if found is not None and found.lora_A.dtype == dtype and all(map(going_on.knows, (*As, *Bs))):
        return found
    going_on.known |= {array.data.ptr: weakref.ref(array) for array in (*As, *Bs)}
    going_on.groups[key] = list(sizes)
    return stacked(As, Bs, sizes, dtype)


many_arrays.append(sys.modules[__name__])
