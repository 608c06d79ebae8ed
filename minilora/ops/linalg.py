"""Matrix products: the general one with broadcasting, and the linear layer's y = x Wᵀ + b.

Axes: N tokens (all leading axes of x together), in and out the layer's widths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from ..backend import Array, array_module, cast
from ..backend import matmul as product
from ..errors import MiniloraError
from ..tensor import Tensor, primitive
from .arithmetic import unbroadcast


class CompressedWeight(ABC):
    """A frozen (out, in) matrix that is stored in another form than a plain array: it knows its own products."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of the values that it stands for
    storage: Array  # what it is held in, which says where it lies

    @abstractmethod
    def matmul(self, x: Array) -> Array:
        """x Wᵀ for x (N, in)."""

    @abstractmethod
    def matmul_t(self, g: Array) -> Array:
        """g W for g (N, out)."""

    @abstractmethod
    def dense(self) -> Array:
        """The (out, in) array itself."""

    def recoded(self, matrix: Array) -> CompressedWeight:
        """Another (out, in) array in the same form, rounded to what that can say; MiniloraError if there is no way."""
        raise MiniloraError(f"a {type(self).__name__} cannot be made of new values: dequantise it instead")

    def __getitem__(self, rows: Any) -> Array:
        """The rows at a slice or an array of integers."""
        return self.dense()[rows]

    def __len__(self) -> int:
        return self.shape[0]


def times_transposed(x: Array, weight: Any) -> Array:
    """x Wᵀ: (N, in), (out, in) -> (N, out). A weight of a narrower dtype than x is widened for the product."""
    if isinstance(weight, CompressedWeight):
        return weight.matmul(x)
    return product(x, cast(weight, x.dtype).T)


def times(g: Array, weight: Any) -> Array:
    """g W: (N, out), (out, in) -> (N, in)."""
    if isinstance(weight, CompressedWeight):
        return weight.matmul_t(g)
    return product(g, cast(weight, g.dtype))


def rows(x: Array) -> Array:
    """(..., width) -> (N, width): all leading axes as one, so that a product is one GEMM."""
    return x.reshape(-1, x.shape[-1])


def unread(shape: tuple[int, ...], like: Array) -> Array:
    """What stands for a value that nobody reads: zeros that take no memory, with the dtype and device of `like`."""
    xp = array_module(like)
    return xp.broadcast_to(xp.zeros((), like.dtype), shape)


@primitive
def matmul(a: Array, b: Array, *, needs: tuple[bool, bool]):
    """y = a b over the last two axes, broadcasting over the others;  da = dy bᵀ, db = aᵀ dy.

    (..., n, k), (..., k, m) -> (..., n, m); vectors are not taken: reshape them to matrices.
    """
    shape_a, shape_b = a.shape, b.shape
    y = product(a, b)
    a, b = (a if needs[1] else None), (b if needs[0] else None)

    def vjp(dy):
        da = unbroadcast(product(dy, b.swapaxes(-1, -2)), shape_a) if needs[0] else None
        db = unbroadcast(product(a.swapaxes(-1, -2), dy), shape_b) if needs[1] else None
        return da, db

    return y, vjp


@primitive
def linear(x: Array, weight: Any, bias: Array | None = None, *, value: bool = True, needs: tuple[bool, ...]):
    """y = x Wᵀ + b;  dx = dy W, dW = dyᵀ x, db = Σ dy over tokens: each only where it is needed.

    x (..., in), W (out, in) array or CompressedWeight, b (out,) or None -> y (..., out). With W frozen, x is not kept
    and no array of W's size is ever made. value: False where only the gradients are asked for; y is zero then.
    """
    needs_bias = len(needs) > 2 and needs[2]
    shape_x = x.shape
    shape_y = (*shape_x[:-1], weight.shape[0])
    if value:
        y = times_transposed(rows(x), weight)  # (N, out)
        if bias is not None:
            y += bias
        y = y.reshape(shape_y)
    else:
        y = unread(shape_y, x)
    x = x if needs[1] else None

    def vjp(dy):
        dy = rows(dy)
        dx = times(dy, weight).reshape(shape_x) if needs[0] else None
        dweight = product(dy.T, rows(x)) if needs[1] else None
        dbias = dy.sum(axis=0) if needs_bias else None
        return (dx, dweight, dbias)[: len(needs)]

    return y, vjp


def _bind_operators() -> None:
    """Give Tensor the operator @."""
    Tensor.__matmul__ = lambda self, other: matmul(self, other)  # type: ignore[method-assign]
    Tensor.__rmatmul__ = lambda self, other: matmul(other, self)  # type: ignore[method-assign]


_bind_operators()
