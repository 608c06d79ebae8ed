"""General elementwise primitives and reductions, with NumPy's broadcasting: the small autograd everything can be
written in.

Notation in all of ops/: y is the value, dy = ∂L/∂y what arrives in backward, and the vjp returns ∂L/∂input for each
input.
"""

from __future__ import annotations

from typing import Any

from ..backend import Array, array_module
from ..tensor import Tensor, primitive


def unbroadcast(grad: Array, shape: tuple[int, ...]) -> Array:
    """Sum `grad` over the axes that broadcasting `shape` to grad.shape repeated: the transpose of broadcasting."""
    if grad.shape == shape:
        return grad
    added = grad.ndim - len(shape)
    repeated = tuple(
        axis for axis in range(grad.ndim) if axis < added or (shape[axis - added] == 1 and grad.shape[axis] != 1)
    )
    return grad.sum(axis=repeated, keepdims=True).reshape(shape)


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an array, or () for a Python number."""
    return getattr(value, "shape", ())


@primitive
def add(a: Array, b: Array, *, needs: tuple[bool, bool]):
    """y = a + b;  da = dy, db = dy, each summed over broadcast axes."""
    shape_a, shape_b = shape_of(a), shape_of(b)

    def vjp(dy):
        return (unbroadcast(dy, shape_a) if needs[0] else None), (unbroadcast(dy, shape_b) if needs[1] else None)

    return a + b, vjp


@primitive
def sub(a: Array, b: Array, *, needs: tuple[bool, bool]):
    """y = a − b;  da = dy, db = −dy, each summed over broadcast axes."""
    shape_a, shape_b = shape_of(a), shape_of(b)

    def vjp(dy):
        return (unbroadcast(dy, shape_a) if needs[0] else None), (unbroadcast(-dy, shape_b) if needs[1] else None)

    return a - b, vjp


@primitive
def mul(a: Array, b: Array, *, needs: tuple[bool, bool]):
    """y = a · b;  da = dy · b, db = dy · a, each summed over broadcast axes."""
    shape_a, shape_b = shape_of(a), shape_of(b)
    y = a * b
    a, b = (a if needs[1] else None), (b if needs[0] else None)  # a frozen factor's partner need not be kept

    def vjp(dy):
        da = unbroadcast(dy * b, shape_a) if needs[0] else None
        db = unbroadcast(dy * a, shape_b) if needs[1] else None
        return da, db

    return y, vjp


@primitive
def div(a: Array, b: Array, *, needs: tuple[bool, bool]):
    """y = a / b;  da = dy / b, db = −dy · y / b, each summed over broadcast axes."""
    shape_a, shape_b = shape_of(a), shape_of(b)
    y = a / b
    saved = y if needs[1] else None

    def vjp(dy):
        scaled = dy / b
        da = unbroadcast(scaled, shape_a) if needs[0] else None
        db = unbroadcast(-scaled * saved, shape_b) if needs[1] else None
        return da, db

    return y, vjp


@primitive
def neg(x: Array):
    """y = −x;  dx = −dy."""

    def vjp(dy):
        return -dy

    return -x, vjp


@primitive
def power(x: Array, *, exponent: float):
    """y = x^p for a constant p;  dx = dy · p x^(p−1), and 0 for p = 0 (also where x is 0)."""

    def vjp(dy):
        return dy * exponent * x ** (exponent - 1) if exponent != 0 else array_module(dy).zeros_like(dy)

    return x**exponent, vjp


@primitive
def exp(x: Array):
    """y = eˣ;  dx = dy · y."""
    y = array_module(x).exp(x)

    def vjp(dy):
        return dy * y

    return y, vjp


@primitive
def log(x: Array):
    """y = ln x;  dx = dy / x."""

    def vjp(dy):
        return dy / x

    return array_module(x).log(x), vjp


@primitive
def sqrt(x: Array):
    """y = √x;  dx = dy / (2y)."""
    y = array_module(x).sqrt(x)

    def vjp(dy):
        return dy / (2 * y)

    return y, vjp


@primitive
def tanh(x: Array):
    """y = tanh x;  dx = dy · (1 − y²)."""
    y = array_module(x).tanh(x)

    def vjp(dy):
        return dy * (1 - y * y)

    return y, vjp


@primitive
def maximum(a: Array, b: Array, *, needs: tuple[bool, bool]):
    """y = max(a, b);  dy goes to the larger; where equal, half to each (the mean of the subgradients' ends)."""
    xp = array_module(a, b)
    shape_a, shape_b = shape_of(a), shape_of(b)
    y = xp.maximum(a, b)
    share = (a > b) + 0.5 * (a == b)  # of dy that goes to a

    def vjp(dy):
        to_a = dy * share.astype(dy.dtype)
        return (unbroadcast(to_a, shape_a) if needs[0] else None), (
            unbroadcast(dy - to_a, shape_b) if needs[1] else None
        )

    return y, vjp


@primitive
def where(condition: Array, a: Array, b: Array, *, needs: tuple[bool, bool, bool]):
    """y = a where the condition holds, b elsewhere;  dy goes the same way. The condition is a Boolean array."""
    xp = array_module(condition, a, b)
    shape_a, shape_b = shape_of(a), shape_of(b)

    def vjp(dy):
        da = unbroadcast(xp.where(condition, dy, 0), shape_a) if needs[1] else None
        db = unbroadcast(xp.where(condition, 0, dy), shape_b) if needs[2] else None
        return None, da, db

    return xp.where(condition, a, b), vjp


@primitive
def sum(x: Array, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False):
    """y = Σ x over `axis` (all axes for None);  dx = dy, repeated along the summed axes."""
    xp, shape = array_module(x), x.shape
    y = x.sum(axis=axis, keepdims=True)
    shape_kept = y.shape
    if not keepdims:
        y = y.reshape(()) if axis is None else xp.squeeze(y, axis=axis)

    def vjp(dy):
        return xp.broadcast_to(dy.reshape(shape_kept), shape)

    return y, vjp


def mean(x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`: a sum divided by the number of entries that it takes in."""
    total = sum(x, axis=axis, keepdims=keepdims)
    return total * (max(total.size, 1) / max(x.size, 1))


def _bind_operators() -> None:
    """Give Tensor its operators, here where they are defined: tensor.py comes before every primitive."""
    methods = {
        "__add__": lambda self, other: add(self, other),
        "__radd__": lambda self, other: add(other, self),
        "__sub__": lambda self, other: sub(self, other),
        "__rsub__": lambda self, other: sub(other, self),
        "__mul__": lambda self, other: mul(self, other),
        "__rmul__": lambda self, other: mul(other, self),
        "__truediv__": lambda self, other: div(self, other),
        "__rtruediv__": lambda self, other: div(other, self),
        "__neg__": lambda self: neg(self),
        "__pow__": lambda self, exponent: power(self, exponent=exponent),
        "sum": lambda self, axis=None, keepdims=False: sum(self, axis=axis, keepdims=keepdims),
        "mean": mean,
    }
    for name, method in methods.items():
        setattr(Tensor, name, method)


_bind_operators()
