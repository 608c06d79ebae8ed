"""Activations and norms in row blocks that stay in a core's cache: several passes in place, one trip to memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import ops
from ...backend import Array, cast
from .memory import empty_like, remember, remember_scaled
from .threads import parallel_rows, scratch

BLOCK_ENTRIES = 1 << 18  # of one array in a block: smaller ones stay in a nearer cache, but threads meet more often
LEAST_ENTRIES = 1 << 14  # below it a second thread costs more than it saves


def computes(*arrays: Array) -> bool:
    """Whether these are NumPy arrays of one dtype, float32 or float64."""
    first = arrays[0]
    return (
        isinstance(first, np.ndarray)
        and first.dtype in (np.float32, np.float64)
        and all(isinstance(array, np.ndarray) and array.dtype == first.dtype for array in arrays)
    )


def flat(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each (..., width) array as (N, width)."""
    return tuple(array.reshape(-1, array.shape[-1]) for array in arrays)


def over_rows(fn, x: np.ndarray) -> None:
    """fn on row blocks of x (N, width) that fit the cache."""
    width = max(1, x.shape[-1])
    parallel_rows(fn, len(x), most=max(1, BLOCK_ENTRIES // width), least=max(1, LEAST_ENTRIES // width))


def has_rows(*arrays: Array) -> bool:
    """Whether row blocks make sense: floats of at least one axis."""
    return computes(*arrays) and arrays[0].ndim >= 1 and arrays[0].size > 0


def of_one_shape(*arrays: Array) -> bool:
    return has_rows(*arrays) and all(array.shape == arrays[0].shape for array in arrays)


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


def sigmoid_into(x: np.ndarray, out: np.ndarray) -> None:
    """out = 1 / (1 + e⁻ˣ). Where e⁻ˣ overflows to infinity the result is the right one, 0."""
    np.negative(x, out=out)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    np.reciprocal(out, out=out)


def silu_mul_into(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """out = gate / (1 + e⁻ᵍᵃᵗᵉ) · up."""
    np.negative(gate, out=out)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    np.divide(gate, out, out=out)
    out *= up


def silu_mul_rows(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """silu_mul_into for any number of rows, as many at a time as the cache holds."""
    step = max(1, BLOCK_ENTRIES // max(1, gate.shape[1]))
    for start in range(0, len(gate), step):
        part = slice(start, start + step)
        silu_mul_into(gate[part], up[part], out[part])


def silu_mul_vjp_into(gate: np.ndarray, up: np.ndarray, dh: np.ndarray, dgate: np.ndarray, dup: np.ndarray) -> None:
    """dup = dh · t and dgate = dh · up · σ (1 + gate − t) with t = gate σ; dup may be dh's own memory."""
    s = scratch("sigmoid", gate.shape, gate.dtype)
    t = scratch("silu", gate.shape, gate.dtype)
    sigmoid_into(gate, s)
    np.multiply(gate, s, out=t)
    np.multiply(dh, up, out=dgate)
    np.multiply(dh, t, out=dup)
    np.subtract(gate, t, out=t)
    t += 1
    t *= s
    dgate *= t


@ops.silu_mul.kernel("cpu", of_one_shape)
def silu_mul(gate: Array, up: Array):
    shape = gate.shape
    gate, up = flat(gate, up)
    h = empty_like(gate)
    over_rows(lambda a, b: silu_mul_into(gate[a:b], up[a:b], h[a:b]), gate)

    def vjp(dh):
        (dh,) = flat(dh)
        dgate, dup = empty_like(gate), empty_like(up)
        over_rows(lambda a, b: silu_mul_vjp_into(gate[a:b], up[a:b], dh[a:b], dgate[a:b], dup[a:b]), gate)
        return dgate.reshape(shape), dup.reshape(shape)

    result = h.reshape(shape)
    remember(result, lambda a, b, out: silu_mul_rows(gate[a:b], up[a:b], out))
    return result, vjp


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


def rms_norm_into(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, inverse: np.ndarray) -> None:
    """out = x / ρ · w, inverse (rows, 1) = 1 / ρ."""
    np.divide(np.vecdot(x, x)[:, None], x.shape[1], out=inverse)
    inverse += eps
    np.sqrt(inverse, out=inverse)
    np.reciprocal(inverse, out=inverse)
    np.multiply(x, inverse, out=out)
    out *= weight


def rms_norm_vjp_into(x: np.ndarray, weight: np.ndarray, inverse: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> None:
    """dx = (g − x · Σ(g x) / (D ρ²)) / ρ with g = dy · w; dx may be dy's own memory."""
    np.multiply(dy, weight, out=dx)
    coefficient = np.vecdot(dx, x)[:, None]
    coefficient *= inverse * inverse / x.shape[1]
    t = scratch("norm", x.shape, x.dtype)
    np.multiply(x, coefficient, out=t)
    dx -= t
    dx *= inverse


def norm_applies(x: Array, *parameters: Array, eps: float) -> bool:
    """The parameters may be held in a narrower dtype than x."""
    return has_rows(x) and all(isinstance(parameter, np.ndarray) for parameter in parameters)


def same_rows(x: Array, delta: Array | None) -> bool:
    return delta is None or of_one_shape(x, delta)


@ops.rms_norm.kernel("cpu", norm_applies)
def rms_norm(x: Array, weight: Array, *, eps: float, needs: tuple[bool, bool]):
    shape = x.shape
    (x,) = flat(x)
    weight = cast(weight, x.dtype)
    y, inverse = empty_like(x), np.empty((len(x), 1), x.dtype)
    over_rows(lambda a, b: rms_norm_into(x[a:b], weight, eps, y[a:b], inverse[a:b]), x)

    def vjp(dy):
        (dy,) = flat(dy)
        dx = dweight = None
        if needs[0]:
            dx = empty_like(x)
            over_rows(lambda a, b: rms_norm_vjp_into(x[a:b], weight, inverse[a:b], dy[a:b], dx[a:b]), x)
            dx = dx.reshape(shape)
        if needs[1]:
            dweight = (dy * (x * inverse)).sum(axis=0)
        return dx, dweight

    result = y.reshape(shape)
    remember_scaled(result, x, inverse, weight)
    return result, vjp


@ops.add_rms_norm.kernel("cpu", lambda x, delta, weight, **_: norm_applies(x, weight, eps=0) and same_rows(x, delta))
def add_rms_norm(x: Array, delta: Array | None, weight: Array, *, eps: float, needs: tuple[bool, bool, bool]):
    shape = x.shape
    (x,) = flat(x)
    weight = cast(weight, x.dtype)
    s = x if delta is None else empty_like(x)
    y, inverse = empty_like(x), np.empty((len(x), 1), x.dtype)
    delta = None if delta is None else flat(delta)[0]

    def forward(a: int, b: int) -> None:
        if delta is not None:
            np.add(x[a:b], delta[a:b], out=s[a:b])
        rms_norm_into(s[a:b], weight, eps, y[a:b], inverse[a:b])

    over_rows(forward, x)

    def vjp(ds, dy):
        ds, dy = flat(ds, dy)
        dx: Any = None
        dweight = None
        if needs[0] or needs[1]:
            dx = empty_like(s)

            def backward(a: int, b: int) -> None:
                rms_norm_vjp_into(s[a:b], weight, inverse[a:b], dy[a:b], dx[a:b])
                dx[a:b] += ds[a:b]

            over_rows(backward, s)
            dx = dx.reshape(shape)
        if needs[2]:
            dweight = (dy * (s * inverse)).sum(axis=0)
        return (dx if needs[0] else None), (dx if needs[1] else None), dweight

    result = y.reshape(shape)
    remember_scaled(result, s, inverse, weight)
    return (s.reshape(shape), result), vjp


# --- the residual stream ----------------------------------------------------------------------------------------------


def large(a: Array, b: Array) -> bool:
    return of_one_shape(a, b) and a.size >= 2 * LEAST_ENTRIES


@ops.add.kernel("cpu", large)
def add(a: Array, b: Array, *, needs: tuple[bool, bool]):
    shape = a.shape
    a, b = flat(a, b)
    y = empty_like(a)
    over_rows(lambda start, stop: np.add(a[start:stop], b[start:stop], out=y[start:stop]), y)

    def vjp(dy):
        return (dy if needs[0] else None), (dy if needs[1] else None)

    return y.reshape(shape), vjp
