"""Primitives that move values about and change none: each vjp is the same move backwards."""

from __future__ import annotations

from typing import Any

from ..backend import Array, array_module, cast
from ..tensor import Tensor, primitive
from .arithmetic import unbroadcast


@primitive
def reshape(x: Array, *, shape: tuple[int, ...]):
    """y = x with another shape, in row-major order;  dx = dy with x's shape."""
    before = x.shape

    def vjp(dy):
        return dy.reshape(before)

    return x.reshape(shape), vjp


@primitive
def transpose(x: Array, *, axes: tuple[int, ...] | None = None):
    """y = x with its axes in another order (reversed for None);  dx = dy with the inverse order."""
    order = tuple(range(x.ndim))[::-1] if axes is None else tuple(axis % x.ndim for axis in axes)
    inverse = tuple(sorted(range(len(order)), key=order.__getitem__))

    def vjp(dy):
        return dy.transpose(inverse)

    return x.transpose(order), vjp


@primitive
def getitem(x: Array, *, index: Any):
    """y = x[index] for slices, integers and integer or Boolean arrays;  dx has dy at index, added up where repeated."""
    xp, shape, dtype = array_module(x), x.shape, x.dtype

    def vjp(dy):
        dx = xp.zeros(shape, dtype)
        parts = index if isinstance(index, tuple) else (index,)
        if all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
            dx[index] = dy  # no entry is taken twice
        else:
            xp.add.at(dx, index, dy)
        return dx

    return x[index], vjp


@primitive
def unstack(x: Array, *, axis: int):
    """y_0, y_1 … = x[0], x[1] … along an axis, as views;  dx = the gradients stacked again."""
    xp = array_module(x)
    parts = tuple(x[(slice(None),) * (axis % x.ndim) + (index,)] for index in range(x.shape[axis]))

    def vjp(*dys):
        return xp.stack(dys, axis=axis)

    return parts, vjp


@primitive
def select_rows(x: Array, *, index: Array):
    """y = x[index] along the first axis, for distinct integers;  dx = dy at those rows, zero elsewhere."""
    xp, shape = array_module(x), x.shape

    def vjp(dy):
        dx = xp.zeros(shape, dy.dtype)
        dx[index] = dy
        return dx

    return x[index], vjp


@primitive
def add_rows(x: Array, rows: Array, *, index: Array):
    """y = x with rows added at x[index], for distinct integers;  dx = dy, drows = dy[index]."""
    y = x.copy()
    y[index] += rows

    def vjp(dy):
        return dy, dy[index]

    return y, vjp


@primitive
def concatenate(*parts: Array, axis: int = 0):
    """y = the parts, one after the other along `axis`;  each part's gradient is its slice of dy."""
    xp = array_module(*parts)
    ends, end = [], 0
    for part in parts:
        end += part.shape[axis]
        ends.append(end)

    def vjp(dy):
        return tuple(xp.split(dy, ends[:-1], axis=axis))

    return xp.concatenate(parts, axis=axis), vjp


@primitive
def broadcast_to(x: Array, *, shape: tuple[int, ...]):
    """y = x repeated to `shape`;  dx = dy summed over the repeated axes."""
    before = x.shape

    def vjp(dy):
        return unbroadcast(dy, before)

    return array_module(x).broadcast_to(x, shape), vjp


@primitive
def astype(x: Array, *, dtype: Any):
    """y = x in another float dtype;  dx = dy in x's dtype."""
    before = x.dtype

    def vjp(dy):
        return cast(dy, before)

    return cast(x, dtype), vjp


def _bind_operators() -> None:
    """Give Tensor indexing, reshape, transpose and T."""

    def method_reshape(self: Tensor, *shape: Any) -> Tensor:
        return reshape(self, shape=tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    def method_transpose(self: Tensor, *axes: int) -> Tensor:
        return transpose(self, axes=axes or None)

    methods = {
        "__getitem__": lambda self, index: getitem(self, index=index),
        "reshape": method_reshape,
        "transpose": method_transpose,
        "T": property(lambda self: transpose(self)),
    }
    for name, method in methods.items():
        setattr(Tensor, name, method)


_bind_operators()
