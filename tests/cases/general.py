"""Cases of the general primitives: arithmetic, matrix products, moving values about. Each is composed of others."""

from __future__ import annotations

import builtins
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minilora import ops
from minilora.backend import array_module
from minilora.tensor import Tensor

from .case import Call, Case, broadcasting, generators, nonzero, normal, positive, seeds, shapes, sizes


def unary(values: Any = normal, **case: Any) -> dict[str, Any]:
    return {"calls": st.builds(lambda rng, shape: Call((values(rng, *shape),)), generators, shapes()), **case}


@st.composite
def binary_calls(draw: st.DrawFn, left: Any = normal, right: Any = normal) -> Call:
    """Two arrays that broadcast together, or an array and a number on either side."""
    rng = draw(generators)
    first, second = draw(broadcasting())
    inputs: list[Any] = [left(rng, *first), right(rng, *second)]
    number = draw(st.sampled_from((None, None, None, 0, 1)))
    if number is not None:
        inputs[number] = float((left, right)[number](rng))
    return Call(tuple(inputs))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Two inputs as Tensors, a number made an array of the other's library."""
    xp = array_module(*(value.data for value in (a, b) if isinstance(value, Tensor)))
    first, second = (value if isinstance(value, Tensor) else Tensor(xp.asarray(float(value))) for value in (a, b))
    return first, second


def add(a, b):
    a, b = tensors(a, b)
    shape = np.broadcast_shapes(a.shape, b.shape)
    parts = [ops.broadcast_to(part, shape=(1, *shape)) for part in (a, b)]
    return ops.sum(ops.concatenate(*parts, axis=0), axis=0)


def mul(a, b):
    """a b = ((a + b)² − (a − b)²) / 4."""
    return ops.div(ops.sub(ops.power(ops.add(a, b), exponent=2), ops.power(ops.sub(a, b), exponent=2)), 4.0)


def exp(x):
    """eˣ = (1 + t) / (1 − t) with t = tanh(x / 2)."""
    t = ops.tanh(x * 0.5)
    return ops.div(ops.add(t, 1.0), ops.sub(1.0, t))


def log(x):
    """ln x = ∫₀¹ (x − 1) / (1 + t (x − 1)) dt by Gauss and Legendre's rule, exact to rounding for x in 0.4 … 2.5."""
    nodes, weights = (array_module(x.data).asarray(part) for part in np.polynomial.legendre.leggauss(40))
    u = ops.sub(ops.reshape(x, shape=(*x.shape, 1)), 1.0)
    return ops.sum(ops.mul(ops.div(u, ops.add(ops.mul(u, (nodes + 1) / 2), 1.0)), weights / 2), axis=-1)


def power(x, *, exponent):
    """x^p = e^(p ln x) for positive x; a product for the whole exponents, where x may be negative."""
    if exponent == int(exponent):
        result = x
        for _ in range(int(exponent) - 1):
            result = ops.mul(result, x)
        return result
    return ops.exp(ops.mul(ops.log(x), exponent))


def tanh(x):
    e = ops.exp(ops.mul(x, 2.0))
    return ops.div(ops.sub(e, 1.0), ops.add(e, 1.0))


def maximum(a, b):
    a, b = tensors(a, b)
    larger = a.data > b.data
    return ops.where(larger, a, b)


def where(condition, a, b):
    one = condition.astype(float)
    return ops.add(ops.mul(a, one), ops.mul(b, 1.0 - one))


def sum_by_matmul(x, *, axis=None, keepdims=False):
    """A sum as a product with a column of ones, the summed axes last."""
    axes = (
        tuple(range(x.ndim))
        if axis is None
        else tuple(i % x.ndim for i in ((axis,) if isinstance(axis, int) else axis))
    )
    kept = tuple(i for i in range(x.ndim) if i not in axes)
    count, shape = int(np.prod([x.shape[i] for i in axes])), tuple(x.shape[i] for i in kept)
    flat = ops.reshape(ops.transpose(x, axes=(*kept, *axes)), shape=(int(np.prod(shape)), count))
    total = ops.matmul(flat, array_module(x.data).ones((count, 1)))
    return ops.reshape(total, shape=tuple(1 if i in axes else n for i, n in enumerate(x.shape)) if keepdims else shape)


def far_apart(rng: np.random.Generator, *shape: int, offset: float = 0.0) -> np.ndarray:
    """Multiples of a half, shifted: two of these with offsets 0 and 0.25 are nowhere nearer than 0.25."""
    return np.asarray(rng.integers(-4, 5, shape) / 2 + offset)


@st.composite
def power_calls(draw: st.DrawFn) -> Call:
    exponent = draw(st.sampled_from((2, 3, 0.5, -1.5, 1.7)))
    values = nonzero if isinstance(exponent, int) else positive
    return Call((values(draw(generators), *draw(shapes())),), {"exponent": exponent})


@st.composite
def where_calls(draw: st.DrawFn) -> Call:
    rng = draw(generators)
    condition, a, b = draw(broadcasting(3))
    return Call((rng.random(condition) < 0.5, normal(rng, *a), normal(rng, *b)))


@st.composite
def sum_calls(draw: st.DrawFn) -> Call:
    shape = draw(shapes())
    axis = draw(st.sampled_from((None, *range(-len(shape), len(shape)), *((0, -1),) * (len(shape) > 1))))
    return Call((normal(draw(generators), *shape),), {"axis": axis, "keepdims": draw(st.booleans())})


# --- matrix products --------------------------------------------------------------------------------------------------


def matmul(a, b):
    """Σ_k a[…, n, k, 1] b[…, 1, k, m]."""
    a = ops.reshape(a, shape=(*a.shape, 1))
    b = ops.reshape(b, shape=(*b.shape[:-2], 1, *b.shape[-2:]))
    return ops.sum(ops.mul(a, b), axis=-2)


def linear(x, weight, bias=None):
    flat = ops.reshape(x, shape=(int(np.prod(x.shape[:-1])), x.shape[-1]))
    y = ops.matmul(flat, ops.transpose(weight))
    y = y if bias is None else ops.add(y, bias)
    return ops.reshape(y, shape=(*x.shape[:-1], weight.shape[0]))


@st.composite
def matmul_calls(draw: st.DrawFn) -> Call:
    rng = draw(generators)
    first, second = draw(broadcasting())
    n, k, m = draw(sizes), draw(sizes), draw(sizes)
    return Call((normal(rng, *first, n, k), normal(rng, *second, k, m)))


@st.composite
def linear_calls(draw: st.DrawFn) -> Call:
    rng = draw(generators)
    leading, width, out = draw(shapes(1, 2)), draw(sizes), draw(sizes)
    bias = draw(st.sampled_from(("given", "None", "left out")))
    last = {"given": (normal(rng, out),), "None": (None,), "left out": ()}[bias]
    return Call((normal(rng, *leading, width), normal(rng, out, width), *last))


# --- moving values ----------------------------------------------------------------------------------------------------


def taken(x: Tensor, places: np.ndarray) -> Tensor:
    """x's entries at flat positions `places`, through one product with a matrix of zeros and ones."""
    xp = array_module(x.data)
    one_hot = xp.zeros((places.size, x.size))
    one_hot[xp.arange(places.size), xp.asarray(places.reshape(-1))] = 1.0
    return ops.reshape(ops.matmul(one_hot, ops.reshape(x, shape=(x.size, 1))), shape=places.shape)


def positions(x: Tensor) -> np.ndarray:
    return np.arange(x.size).reshape(x.shape)


def on_host(index: Any) -> Any:
    """An index with its arrays as NumPy's."""
    if isinstance(index, tuple):
        return tuple(on_host(part) for part in index)
    return index.get() if hasattr(index, "get") else index


def reshape(x, *, shape):
    """Without a reshape: each value fetched by its coordinates."""
    xp = array_module(x.data)
    places = np.arange(x.size).reshape(shape)
    if x.ndim == 0:
        return ops.broadcast_to(x, shape=places.shape)
    return ops.getitem(x, index=tuple(xp.asarray(part) for part in np.unravel_index(places, x.shape)))


def concatenate(*parts, axis=0):
    """Each part put into zeros by a product with a slice of the unit matrix."""
    axis %= parts[0].ndim
    total = builtins.sum(part.shape[axis] for part in parts)
    unit = array_module(parts[0].data).eye(total)
    order = (*(i for i in range(parts[0].ndim) if i != axis), axis)
    leading = tuple(parts[0].shape[i] for i in order[:-1])
    result, start = None, 0
    for part in parts:
        length = part.shape[axis]
        flat = ops.reshape(ops.transpose(part, axes=order), shape=(int(np.prod(leading)), length))
        placed = ops.matmul(flat, unit[start : start + length])
        result, start = placed if result is None else ops.add(result, placed), start + length
    return ops.transpose(ops.reshape(result, shape=(*leading, total)), axes=tuple(int(i) for i in np.argsort(order)))


def add_rows(x, rows, *, index):
    """A product with columns of the unit matrix puts the rows where they belong."""
    width = int(np.prod(x.shape[1:]))
    placing = array_module(x.data).eye(x.shape[0])[:, index]
    return ops.add(x, ops.reshape(ops.matmul(placing, ops.reshape(rows, shape=(rows.shape[0], width))), shape=x.shape))


@st.composite
def getitem_calls(draw: st.DrawFn) -> Call:
    rng = draw(generators)
    shape = draw(shapes(1, 3, empty=False))
    kind = draw(st.sampled_from(("basic", "basic", "integers", "mask", "pairs", "rows")))
    index: Any
    if kind == "basic":
        parts: list[Any] = []
        for size in shape[: draw(st.integers(0, len(shape)))]:
            parts.append(
                draw(
                    st.one_of(
                        st.integers(-size, size - 1),
                        st.slices(size),
                        st.just(slice(None, None, -1)),
                        st.just(slice(0, 0)),
                    )
                )
            )
        if draw(st.booleans()):
            parts.insert(draw(st.integers(0, len(parts))), None)
        if draw(st.booleans()):
            parts.append(Ellipsis)
        index = tuple(parts) if len(parts) != 1 or draw(st.booleans()) else parts[0]
    elif kind == "integers":
        index = rng.integers(-shape[0], shape[0], draw(shapes(1, 2)))  # repeated ones add up
    elif kind == "mask":
        index = rng.random(shape) < 0.5
    elif kind == "pairs":
        index = tuple(rng.integers(0, size, 4) for size in shape)
    else:
        index = (slice(None), rng.integers(0, shape[1], 3)) if len(shape) > 1 else rng.integers(0, shape[0], 3)
    return Call((normal(rng, *shape),), {"index": index})


@st.composite
def reshape_calls(draw: st.DrawFn) -> Call:
    shape = draw(shapes(0, 3, empty=False))
    size = int(np.prod(shape))
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    first = draw(st.sampled_from(divisors))
    target = draw(st.sampled_from(((size,), (first, size // first), (1, first, size // first), (first, -1), (-1,))))
    return Call((normal(draw(generators), *shape),), {"shape": target})


@st.composite
def transpose_calls(draw: st.DrawFn) -> Call:
    shape = draw(shapes(most=4))
    axes = draw(
        st.one_of(
            st.none(), st.permutations(range(len(shape))).map(tuple), st.permutations(range(-len(shape), 0)).map(tuple)
        )
    )
    return Call((normal(draw(generators), *shape),), {"axes": axes})


@st.composite
def select_rows_calls(draw: st.DrawFn) -> Call:
    rng, shape = draw(generators), draw(shapes(1, 3, empty=False))
    index = rng.permutation(shape[0])[draw(st.integers(0, shape[0])) :]
    return Call((normal(rng, *shape),), {"index": index})


@st.composite
def add_rows_calls(draw: st.DrawFn) -> Call:
    call = draw(select_rows_calls())
    (x,), index = call.inputs, call.options["index"]
    return Call((x, normal(draw(generators), len(index), *x.shape[1:])), {"index": index})


@st.composite
def concatenate_calls(draw: st.DrawFn) -> Call:
    rng, shape = draw(generators), draw(shapes(1, 3))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        own = list(shape)
        own[axis] = draw(st.sampled_from((1, 2, 3, 0)))
        parts.append(normal(rng, *own))
    return Call(tuple(parts), {"axis": axis})


@st.composite
def unstack_calls(draw: st.DrawFn) -> Call:
    shape = draw(shapes(1, 3, empty=False))
    return Call((normal(draw(generators), *shape),), {"axis": draw(st.integers(-len(shape), len(shape) - 1))})


@st.composite
def broadcast_to_calls(draw: st.DrawFn) -> Call:
    (shape,) = draw(broadcasting(1))
    return Call((normal(draw(generators), *shape),), {"shape": draw(wider(shape))})


@st.composite
def wider(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that `shape` broadcasts to."""
    return (*draw(shapes(0, 2)), *(draw(sizes) if size == 1 else size for size in shape))


CASES = {
    "add": Case(binary_calls(), add),
    "sub": Case(binary_calls(), lambda a, b: ops.add(a, ops.mul(b, -1.0) if isinstance(b, Tensor) else -b)),
    "mul": Case(binary_calls(), mul),
    "div": Case(
        binary_calls(normal, nonzero),
        lambda a, b: ops.mul(a, ops.power(b, exponent=-1) if isinstance(b, Tensor) else 1 / b),
    ),
    "neg": Case(**unary(composition=lambda x: ops.mul(x, -1.0))),
    "power": Case(power_calls(), power),
    "exp": Case(**unary(composition=exp)),
    "log": Case(**unary(positive, composition=log)),
    "sqrt": Case(**unary(positive, composition=lambda x: ops.exp(ops.mul(ops.log(x), 0.5)))),
    "tanh": Case(**unary(composition=tanh)),
    "maximum": Case(binary_calls(far_apart, partial(far_apart, offset=0.25)), maximum),
    "where": Case(where_calls(), where),
    "sum": Case(sum_calls(), sum_by_matmul),
    "matmul": Case(matmul_calls(), matmul),
    "linear": Case(linear_calls(), linear),
    "reshape": Case(reshape_calls(), reshape),
    "transpose": Case(transpose_calls(), lambda x, *, axes: taken(x, positions(x).transpose(axes))),
    "getitem": Case(getitem_calls(), lambda x, *, index: taken(x, positions(x)[on_host(index)])),
    "unstack": Case(
        unstack_calls(),
        lambda x, *, axis: tuple(taken(x, positions(x).take(index, axis=axis)) for index in range(x.shape[axis])),
    ),
    "select_rows": Case(select_rows_calls(), lambda x, *, index: taken(x, positions(x)[on_host(index)])),
    "add_rows": Case(add_rows_calls(), add_rows),
    "concatenate": Case(concatenate_calls(), concatenate),
    "broadcast_to": Case(broadcast_to_calls(), lambda x, *, shape: ops.mul(x, array_module(x.data).ones(shape))),
    "astype": Case(
        st.builds(
            lambda seed, shape: Call((normal(np.random.default_rng(seed), *shape),), {"dtype": np.dtype("float64")}),
            seeds,
            shapes(),
        ),
        lambda x, *, dtype: ops.mul(x, array_module(x.data).ones((), dtype)),
    ),
}
