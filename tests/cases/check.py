"""What is asked of every primitive, on one call of it. `check_primitive` is the list."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minilora import ops
from minilora.backend import FLOAT_DTYPES, array_module, device_of, dtype_of, to_device
from minilora.comparison import GradientError
from minilora.gradcheck import dot_product_check, gradcheck
from minilora.tensor import PRIMITIVES, Primitive, Tensor, backward, definitions_only

from .case import Call, Case

FORWARD = 1e-12  # relative error in norm that float64 may have against the composition
BACKWARD = 1e-11
DIFFERENCES = 1e-7  # and against finite differences
NOISE = 1e-10  # rounding noise of the primitive: float32 inside would bring 1e-8 or more


Recorder = Callable[[str, float], None]


def check_primitive(
    name: str, case: Case, call: Call, device: str, record: Recorder = lambda against, error: None
) -> None:
    """Everything that is asked of a primitive, on one call; an AssertionError says what does not hold.

    The triple check: its value and its vjp are those of the composition, and of finite differences. Then: the vjp is
    the adjoint for any cotangent; strides change nothing; float32 agrees with float64 and stays float32; exactly the
    inputs that need a gradient get one; the device is kept. It is the definition in ops/ that is checked; kernels are
    held to it by `check_kernels`.

    record: told of the errors that were seen, against "composition", "differences" and "float32".
    """
    with case.setting(), definitions_only():
        call = on_device(call, device)
        values, gradients, cotangents = run(PRIMITIVES[name], call)
        record("composition", _same_as_composition(name, case, call, values, gradients, cotangents))
        record("differences", _same_as_differences(name, case, call))
        same_for_any_strides(PRIMITIVES[name], call, values, gradients, cotangents)
        record("float32", _narrower(name, case, call, cotangents))
        only_what_needs_it(PRIMITIVES[name], call, gradients, cotangents)
        assert all(
            device_of(array) == device_of(values[0]) for array in (*values, *(g for g in gradients if g is not None))
        )
        assert device_of(values[0]).startswith(device.partition(":")[0])


# --- running a call ---------------------------------------------------------------------------------------------------


def on_device(value: Any, device: str) -> Any:
    """A Call, or anything in one, with its arrays on the device."""
    if isinstance(value, Call):
        return Call(
            tuple(on_device(item, device) for item in value.inputs),
            {key: on_device(item, device) for key, item in value.options.items()},
        )
    if isinstance(value, tuple):
        return tuple(on_device(item, device) for item in value)
    if isinstance(value, np.generic) and device != "cpu":
        return to_device(np.asarray(value), device)  # CuPy has no scalars: a 0-d array stands for one
    return to_device(value, device) if isinstance(value, np.ndarray) else value


def is_float_array(value: Any) -> bool:
    return hasattr(value, "strides") and value.dtype.kind == "f"


def run(
    function: Callable[..., Any],
    call: Call,
    cotangents: Sequence[Any] | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """The values of function(call), the gradient of each input (None where there is none), and the cotangents used.

    needs: which inputs require a gradient; all floating arrays by default. cotangents: random ones by default.
    """
    wanted = [is_float_array(value) if needs is None else needs[i] for i, value in enumerate(call.inputs)]
    inputs = [
        Tensor(value, requires_grad=want) if is_float_array(value) else value
        for value, want in zip(call.inputs, wanted, strict=True)
    ]
    result = function(*inputs, **call.options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    values = [output.data for output in outputs]
    if cotangents is None:
        rng = np.random.default_rng(7)
        cotangents = [array_module(v).asarray(rng.standard_normal(v.shape).astype(v.dtype)) for v in values]
    if any(output.requires_grad for output in outputs):
        backward(outputs, list(cotangents))
    return values, [getattr(value, "grad", None) for value in inputs], list(cotangents)


def assert_close(found: Sequence[Any], expected: Sequence[Any], bound: float, what: str, scale: float = 0.0) -> float:
    """‖found − expected‖ ≤ bound · max(‖expected‖, scale) for each pair; None only where None is expected.

    scale: what a result that cancels to nearly nothing is measured against. Returns the largest ratio.
    """
    worst = 0.0
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), f"{what} {index}: {'no' if a is None else 'an unexpected'} gradient"
        if a is not None:
            assert a.shape == b.shape, f"{what} {index} has shape {a.shape}, expected {b.shape}"
            error = norm(a.astype(np.float64) - b.astype(np.float64)) / max(norm(b), scale, 1e-300)
            assert error <= bound, f"{what} {index} is off by {error:.2g} in relative norm, expected {bound:.0e}"
            worst = max(worst, error)
    return worst


def norm(*arrays: Any) -> float:
    return math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays))


# --- the demands ------------------------------------------------------------------------------------------------------


def _same_as_composition(
    name: str, case: Case, call: Call, values: list[Any], gradients: list[Any], cotangents: list[Any]
) -> float:
    expected, expected_gradients, _ = run(case.composition, call, cotangents)
    forward = assert_close(values, expected, FORWARD, f"{name}'s value")
    trained = [None if i in case.frozen else gradient for i, gradient in enumerate(expected_gradients)]
    frozen = [gradient for i, gradient in enumerate(gradients) if i in case.frozen]
    assert all(gradient is None for gradient in frozen), f"{name} forms the gradient of a frozen input"
    scale = 0.1 * norm(*cotangents)
    return max(forward, assert_close(gradients, trained, BACKWARD, f"{name}'s gradient of input", scale))


def _same_as_differences(name: str, case: Case, call: Call) -> float:
    function = _bound(name, call)
    inputs = [
        Tensor(value.copy(), requires_grad=i not in case.frozen) if is_float_array(value) else value
        for i, value in enumerate(call.inputs)
    ]
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad and value.size]
    if not leaves or not np.prod(function(*inputs).shape):
        return 0.0
    try:
        report = gradcheck(function, inputs, entries=12)
    except GradientError as error:
        if error.report.wrong or error.report.inconclusive:
            raise
        return 0.0  # nothing moves: every entry is masked out
    assert report.noise < NOISE, f"{name} computes in less than float64: its rounding noise is {report.noise:.1g}"
    assert report.error < DIFFERENCES
    dot_product_check(function, inputs)
    return report.error


def _bound(name: str, call: Call) -> Callable[..., Any]:
    def function(*inputs: Any) -> Any:
        result = PRIMITIVES[name](*inputs, **call.options)
        if not isinstance(result, tuple):
            return result
        return ops.concatenate(*(ops.reshape(part, shape=(-1,)) for part in result), axis=0)

    function.__name__ = name
    return function


def strided(array: Any) -> Any:
    """The same values in a view with gaps and, from two axes on, with the last two axes swapped in memory."""
    xp = array_module(array)
    if array.ndim == 0:
        return array
    order = (*range(array.ndim - 2), array.ndim - 1, array.ndim - 2) if array.ndim > 1 else (0,)
    shape = [array.shape[axis] for axis in order]
    room = xp.full((*shape[:-1], 2 * shape[-1] + 1), 1e30, array.dtype)
    view = room[..., 1::2].transpose(order)
    view[...] = array
    return view


def same_for_any_strides(
    function: Primitive,
    call: Call,
    values: list[Any],
    gradients: list[Any],
    cotangents: list[Any],
    bound: float = BACKWARD,
) -> None:
    """Inputs and incoming gradients as views; and a sum's gradient, which arrives as one number repeated (stride 0)."""
    name, scale = function.name, 0.1 * norm(*cotangents)
    views = Call(tuple(strided(value) if is_float_array(value) else value for value in call.inputs), call.options)
    found, found_gradients, _ = run(function, views, [strided(array) for array in cotangents])
    assert_close(found, values, bound, f"{name}'s value for strided inputs")
    assert_close(found_gradients, gradients, bound, f"{name}'s gradient of strided input", scale)
    ones = [array_module(array).ones_like(array) for array in values]
    repeated = [array_module(array).broadcast_to(array[(0,) * array.ndim], array.shape) for array in ones if array.size]
    if len(repeated) == len(ones):
        _, expected, _ = run(function, call, ones)
        _, found_gradients, _ = run(function, call, repeated)
        assert_close(found_gradients, expected, bound, f"{name}'s gradient, for a repeated incoming one, of input", 0.1)


def _narrower(name: str, case: Case, call: Call, cotangents: list[Any]) -> float:
    """In float32 the value and gradients are float32, and those of float64 for the same inputs to rounding."""
    narrow = in_dtype(call, "float32")
    given = [array.astype(np.float32) for array in cotangents]
    found, found_gradients, _ = run(PRIMITIVES[name], narrow, given)
    for array in (*found, *(gradient for gradient in found_gradients if gradient is not None)):
        assert array.dtype == np.float32, f"{name} turns float32 into {array.dtype}"
    values, gradients, _ = run(PRIMITIVES[name], in_dtype(narrow, "float64"), [a.astype(np.float64) for a in given])
    scale = 0.1 * norm(*(value for value in call.inputs if is_float_array(value)))
    forward = assert_close(found, values, case.float32, f"{name}'s float32 value", scale)
    what = f"{name}'s float32 gradient of input"
    return max(forward, assert_close(found_gradients, gradients, case.float32, what, 0.1 * norm(*cotangents)))


def in_dtype(call: Call, dtype: str) -> Call:
    """The call with every floating array, and an option `dtype`, in that dtype."""
    target = dtype_of(dtype)

    def cast(value: Any) -> Any:
        floating = hasattr(value, "strides") and value.dtype.name in FLOAT_DTYPES
        return value.astype(target) if floating else value

    options = {key: target if key == "dtype" else cast(value) for key, value in call.options.items()}
    return Call(tuple(cast(value) for value in call.inputs), options)


def only_what_needs_it(
    function: Primitive, call: Call, gradients: list[Any], cotangents: list[Any], bound: float = BACKWARD
) -> None:
    """Every subset of the inputs: exactly those that require a gradient get one, the same as when all do."""
    name, scale = function.name, 0.1 * norm(*cotangents)
    candidates = [i for i, gradient in enumerate(gradients) if gradient is not None]
    for count in range(len(candidates) + 1):
        for chosen in itertools.combinations(candidates, count):
            needs = [i in chosen for i in range(len(call.inputs))]
            _, found, _ = run(function, call, cotangents, needs)
            expected = [gradient if i in chosen else None for i, gradient in enumerate(gradients)]
            assert_close(found, expected, bound, f"{name} with {chosen} trained: gradient of input", scale)
            if function.wants_needs and chosen:
                _gives_no_more(function, call, needs, cotangents)


def _gives_no_more(primitive: Primitive, call: Call, needs: Sequence[bool], cotangents: list[Any]) -> None:
    """One that is told what is needed computes nothing else."""
    function = primitive.implementation(call.inputs, call.options)
    _, vjp = function(*call.inputs, **call.options, needs=tuple(needs))
    results = vjp(*cotangents)
    given = [result is not None for result in (results if isinstance(results, tuple) else (results,))]
    assert given == list(needs), f"{primitive.name}'s vjp returns gradients of {given}, asked for {list(needs)}"
