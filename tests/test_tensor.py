"""The tape: what is recorded, how backward walks and frees it, and what else a user of the autograd relies on."""

from __future__ import annotations

import gc
import sys
import weakref

import numpy as np
import pytest

import minilora as ml
from minilora import ops
from minilora.tensor import Primitive, Tensor, backward, definitions_only, observe


class Watched(np.ndarray):
    """An array that says when it is freed: a plain ndarray takes no weak reference."""


def leaf(*values, dtype="float64"):
    return Tensor(np.array(values, dtype), requires_grad=True)


def watched(values):
    return np.array(values, float).view(Watched)


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_nothing_is_recorded_without_a_trained_input():
    y = ops.exp(Tensor(np.ones(3)) * 2.0)
    assert y.source is None
    assert not y.requires_grad


def test_a_result_of_a_trained_input_needs_a_gradient():
    y = leaf(1.0) * 2.0
    assert y.requires_grad
    assert y.grad is None
    with pytest.raises(ValueError, match="leaves only"):
        y.requires_grad = False


def test_no_grad_records_nothing_and_ends_with_its_block():
    x = leaf(1.0)
    with ml.no_grad():
        assert not (x * x).requires_grad
        with ml.no_grad():
            pass
        assert not (x * x).requires_grad
    assert (x * x).requires_grad


def test_no_grad_ends_when_an_error_leaves_it():
    with pytest.raises(ZeroDivisionError), ml.no_grad():
        raise ZeroDivisionError
    assert (leaf(1.0) * 2.0).requires_grad


def test_a_detached_tensor_is_a_constant():
    x = leaf(3.0)
    (x * x.detach()).backward()
    assert x.grad.tolist() == [3.0]


def test_integers_cannot_require_a_gradient():
    with pytest.raises(TypeError, match="int64"):
        Tensor(np.arange(3), requires_grad=True)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_a_tensor_used_twice_gets_the_sum():
    x = leaf(2.0, 3.0)
    y = x * x + x * 5.0
    y.sum().backward()
    assert x.grad.tolist() == [9.0, 11.0]


def test_a_node_waits_for_every_gradient_of_its_result():
    """A diamond: the shared node runs once, after both of its users."""
    runs = []

    @Primitive
    def counted(x):
        def vjp(dy):
            runs.append(dy.copy())
            return dy

        return x + 0.0, vjp

    x = leaf(1.0)
    shared = counted(x)
    early = shared * 2.0
    late = ops.exp(ops.exp(early)) * 0.0 + shared * 3.0
    (late + early).backward()
    assert len(runs) == 1
    assert x.grad.tolist() == [5.0]


def test_further_backward_passes_add_up():
    x = leaf(2.0)
    for _ in range(3):
        (x * x).backward()
    assert x.grad.tolist() == [12.0]


def test_backward_takes_a_gradient_for_any_shape_and_one_for_a_scalar():
    x = leaf(1.0, 2.0)
    (x * 3.0).backward(np.array([1.0, 10.0]))
    assert x.grad.tolist() == [3.0, 30.0]
    with pytest.raises(ValueError, match=r"needs a scalar, found shape \(2,\)"):
        (x * 3.0).backward()


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (1, 3)])
def test_a_gradient_given_to_backward_has_the_shape_of_its_tensor(shape):
    """Broadcast, it would come out as another gradient, or as an error far from here."""
    y = Tensor(np.ones((2, 3)), requires_grad=True) * 2.0
    with pytest.raises(ValueError, match=r"a gradient of shape .* for a Tensor of shape \(2, 3\)"):
        y.backward(np.ones(shape))


def test_backward_on_a_leaf_gives_it_its_own_gradient():
    x, given = leaf(1.0), np.array([4.0])
    x.backward(given)
    assert x.grad.tolist() == [4.0]
    x.grad[0] = 7.0
    assert given[0] == 4.0


def test_backward_from_several_outputs_at_once():
    x = leaf(2.0)
    square, cube = x * x, x * x * x
    backward([square, cube], [np.array([1.0]), np.array([10.0])])
    assert x.grad.tolist() == [4.0 + 120.0]


@pytest.mark.parametrize(
    ("shape", "other"),
    [((3,), (2, 3)), ((1, 3), (2, 3)), ((2, 1), (1, 3)), ((), (2, 3)), ((1,), ()), ((2, 1, 1), (3, 1))],
)
@pytest.mark.parametrize("operator", ["add", "sub", "mul", "div", "maximum"])
def test_gradients_of_broadcast_inputs_have_their_shapes(operator, shape, other):
    random = np.random.default_rng(0)
    a, b = (Tensor(random.uniform(1, 2, size), requires_grad=True) for size in (shape, other))
    dy = random.normal(size=np.broadcast_shapes(shape, other))
    getattr(ops, operator)(a, b).backward(dy)
    full = [np.broadcast_to(x.data, dy.shape) for x in (a, b)]
    expected = {
        "add": (dy, dy),
        "sub": (dy, -dy),
        "mul": (dy * full[1], dy * full[0]),
        "div": (dy / full[1], -dy * full[0] / full[1] ** 2),
        "maximum": (dy * (full[0] > full[1]), dy * (full[0] < full[1])),
    }[operator]
    for x, whole in zip((a, b), expected, strict=True):
        assert x.grad.shape == x.shape
        added = tuple(range(dy.ndim - x.ndim))
        kept = tuple(axis for axis in range(dy.ndim) if axis not in added and x.shape[axis - len(added)] == 1)
        np.testing.assert_allclose(x.grad, whole.sum(axis=(*added, *kept)).reshape(x.shape), rtol=1e-12)


def test_a_gradient_of_the_wrong_shape_is_an_error():
    @Primitive
    def forgets_to_sum(x):
        def vjp(dy):
            return dy

        return x + np.zeros((2, 3)), vjp

    with pytest.raises(ValueError, match=r"shape \(2, 3\) for a Tensor of shape \(3,\)"):
        forgets_to_sum(Tensor(np.ones(3), requires_grad=True)).sum().backward()


def test_gradients_have_the_dtype_of_their_leaf():
    narrow, wide = leaf(1.0, dtype="float32"), leaf(2.0)
    (narrow * wide).backward()
    assert (narrow.grad.dtype, wide.grad.dtype) == (np.float32, np.float64)


# --- nobody's array is written to -------------------------------------------------------------------------------------


def test_a_gradient_is_an_array_of_its_own():
    """add hands the same dy to both, reshape and sum hand out views: each leaf has a copy that may be written to."""
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    given = np.ones(2)
    (x + y).backward(given)
    (x + y).reshape(2, 1).sum().backward()
    x.grad *= 100
    assert x.grad.tolist() == [200.0, 200.0]
    assert y.grad.tolist() == [2.0, 2.0]
    assert given.tolist() == [1.0, 1.0]


def test_one_result_for_two_inputs_is_not_shared_by_their_gradients():
    @Primitive
    def difference_from_itself(a, b):
        def vjp(dy):
            both = dy * 2
            return both, both

        return (a + b) * 2, vjp

    x, y = leaf(1.0), leaf(1.0)
    difference_from_itself(x, y).backward()
    x.grad += 1
    assert (x.grad.tolist(), y.grad.tolist()) == ([3.0], [2.0])


def test_adding_to_a_gradient_leaves_the_old_array_alone():
    x = leaf(1.0)
    (x * 2.0).backward()
    first = x.grad
    (x * 3.0).backward()
    assert first.tolist() == [2.0]
    assert x.grad.tolist() == [5.0]


# --- the tape is freed ------------------------------------------------------------------------------------------------


def test_backward_frees_each_node_as_soon_as_it_was_used():
    """When an early node's vjp runs, what the later ones kept is gone already."""
    alive: dict[str, list[bool]] = {}
    kept: dict[str, weakref.ref] = {}

    def stage(name):
        @Primitive
        def step(x):
            saved = watched([1.0, 2.0])
            kept[name] = weakref.ref(saved)

            def vjp(dy):
                alive[name] = [reference() is not None for reference in kept.values()]
                return dy * saved.view(np.ndarray)

            return x * 1.0, vjp

        return step

    y = leaf(1.0, 1.0)
    for name in "abc":
        y = stage(name)(y)
    gc.disable()  # by reference counts alone, at once
    try:
        y.sum().backward()
    finally:
        gc.enable()
    assert alive == {"c": [True, True, True], "b": [True, True, False], "a": [True, False, False]}
    assert all(reference() is None for reference in kept.values())


def test_a_result_that_is_kept_after_backward_keeps_nothing_below_it():
    array = watched([1.0])
    reference = weakref.ref(array)
    y = ops.exp(Tensor(array, requires_grad=True) * 2.0)
    del array
    y.backward()
    assert y.source is not None
    assert reference() is None


def test_a_dropped_result_frees_its_graph_without_backward():
    array = watched([1.0])
    reference = weakref.ref(array)
    y = Tensor(array) * leaf(2.0)  # mul keeps the frozen factor, for the other's gradient
    del array
    gc.disable()
    try:
        assert reference() is not None
        del y
        assert reference() is None
    finally:
        gc.enable()


def test_mul_does_not_keep_the_partner_of_a_frozen_factor():
    array = watched([1.0])
    reference = weakref.ref(array)
    x = Tensor(array, requires_grad=True)
    y = x * Tensor(np.array([2.0]))
    x.data = np.array([1.0])
    del array
    assert reference() is None
    y.backward()
    assert x.grad.tolist() == [2.0]


def test_a_second_backward_says_that_the_graph_is_gone():
    x = leaf(1.0)
    y = ops.exp(x)
    y.backward()
    with pytest.raises(RuntimeError, match=r"exp a second time.*forward pass again"):
        y.backward()
    shared = ops.tanh(x)
    (shared * 2.0).backward()
    with pytest.raises(RuntimeError, match="tanh a second time"):
        (shared * 3.0).backward()


# --- depth ------------------------------------------------------------------------------------------------------------

DEEP = 100_000


def test_backward_through_a_hundred_thousand_nodes_does_not_recurse():
    assert sys.getrecursionlimit() < DEEP
    x = leaf(1.0)
    y = x
    for _ in range(DEEP):
        y = y + 1.0
    y.backward()
    assert y.data.tolist() == [DEEP + 1.0]
    assert x.grad.tolist() == [1.0]


def test_a_hundred_thousand_nodes_can_be_dropped():
    array = watched([1.0])
    reference = weakref.ref(array)
    y = leaf(1.0) * Tensor(array)
    del array
    for _ in range(DEEP):
        y = y * 1.0
    assert reference() is not None
    del y
    assert reference() is None


# --- checkpoint -------------------------------------------------------------------------------------------------------


def curve(x, w):
    return ops.tanh(x * w + ops.exp(x * 0.1)) * w


def test_checkpoint_changes_no_bit_of_value_or_gradients():
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(3, 4)) for _ in range(2)]
    plain = [Tensor(array, requires_grad=True) for array in arrays]
    again = [Tensor(array, requires_grad=True) for array in arrays]
    dy = random.normal(size=(3, 4))
    y, z = curve(*plain), ml.checkpoint(curve, *again)
    assert np.array_equal(y.data, z.data)
    y.backward(dy)
    z.backward(dy)
    for a, b in zip(plain, again, strict=True):
        assert np.array_equal(a.grad, b.grad)


def test_checkpoint_gives_gradients_to_the_parameters_that_it_is_told_of():
    w = leaf(2.0)
    y = ml.checkpoint(lambda x: x * w, Tensor(np.array([3.0])), parameters=[w])
    assert y.requires_grad
    y.backward()
    assert w.grad.tolist() == [3.0]


def test_checkpoint_of_nothing_trained_records_nothing():
    assert not ml.checkpoint(lambda x: x * 2.0, Tensor(np.array([3.0]))).requires_grad


def test_checkpoint_runs_the_function_once_more_in_backward_and_keeps_nothing_until_then():
    recorded, kept = [], []

    def function(x):
        saved = watched([2.0])
        kept.append(weakref.ref(saved))
        y = x * Tensor(saved)
        recorded.append(y.requires_grad)
        return y

    x = leaf(3.0)
    y = ml.checkpoint(function, x)
    assert (recorded, kept[0]()) == ([False], None)
    y.backward()
    assert recorded == [False, True]
    assert x.grad.tolist() == [2.0]


def test_nested_checkpoints():
    runs = []

    def inner(x):
        runs.append("inner")
        return ops.tanh(x) * x

    def outer(x):
        runs.append("outer")
        return ml.checkpoint(inner, ops.exp(x)) * 2.0

    x, plain = leaf(0.3, -0.2), leaf(0.3, -0.2)
    ml.checkpoint(outer, x).sum().backward()
    (inner(ops.exp(plain)) * 2.0).sum().backward()
    assert np.array_equal(x.grad, plain.grad)
    assert runs[:5] == ["outer", "inner", "outer", "inner", "inner"]  # forward, again, and the inner one again in it


def test_backward_may_run_something_cheaper_with_the_same_gradients_in_a_checkpointed_functions_place():
    x = leaf(0.5)
    y = ml.checkpoint(lambda x: x * x + 1.0, x, again=lambda x: x * x)
    y.sum().backward()
    assert (y.item(), x.grad.item()) == (1.25, 1.0)


def test_checkpoint_inside_no_grad_is_a_plain_call():
    with ml.no_grad():
        assert not ml.checkpoint(lambda x: x * x, leaf(1.0)).requires_grad


# --- primitives -------------------------------------------------------------------------------------------------------


@Primitive
def sum_and_difference(a, b):
    def vjp(ds, dd):
        return ds + dd, ds - dd

    return (a + b, a - b), vjp


def test_a_primitive_may_have_several_results():
    a, b = leaf(3.0), leaf(1.0)
    total, difference = sum_and_difference(a, b)
    assert (total.data.tolist(), difference.data.tolist()) == ([4.0], [2.0])
    (total * 10.0 + difference).backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([11.0], [9.0])


def test_a_result_that_nobody_used_has_a_zero_gradient():
    a, b = leaf(3.0), leaf(1.0)
    _, difference = sum_and_difference(a, b)
    (difference * 5.0).backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([5.0], [-5.0])


def test_a_definition_is_told_which_inputs_need_a_gradient():
    seen = []

    @Primitive
    def asks(a, b, c, *, needs):
        seen.append(needs)

        def vjp(dy):
            return dy, None, None

        return a * 1.0, vjp

    asks(leaf(1.0), Tensor(np.ones(1)), 2.0)
    with ml.no_grad():
        asks(leaf(1.0), Tensor(np.ones(1)), None)
    assert seen == [(True, False, False), (False, False, False)]


def test_observers_see_every_call_and_whether_it_was_recorded():
    seen = []
    x = leaf(1.0)
    with observe(lambda name, outputs, recorded: seen.append((name, outputs[0].tolist(), recorded))):
        ops.mul(x, 2.0)
        with ml.no_grad():
            ops.neg(x)
    ops.mul(x, 3.0)
    assert seen == [("mul", [2.0], True), ("neg", [-1.0], False)]


def kernels():
    """A primitive with its definition and two kernels; each names itself in the value."""

    @Primitive
    def which(x):
        def vjp(dy):
            return dy * 1

        return x * 0 + 1, vjp

    @which.kernel("cpu")
    def faster(x):
        def vjp(dy):
            return dy * 2

        return x * 0 + 2, vjp

    @which.kernel("cpu", applies=lambda x: x.size > 2)
    def for_large(x):
        def vjp(dy):
            return dy * 3

        return x * 0 + 3, vjp

    @which.kernel("cuda")
    def elsewhere(x):
        raise AssertionError("a kernel for another device")

    return which


def test_the_last_kernel_that_applies_stands_in_for_the_definition():
    which = kernels()
    small, large = leaf(1.0), leaf(1.0, 1.0, 1.0)
    for x, expected in ((small, 2.0), (large, 3.0)):
        y = which(x)
        y.sum().backward()
        assert y.data[0] == x.grad[0] == expected


def test_definitions_only_turns_kernels_off():
    which = kernels()
    x = leaf(1.0, 1.0, 1.0)
    with definitions_only():
        y = which(x)
    y.sum().backward()
    assert y.data[0] == x.grad[0] == 1.0
    assert which(x).data[0] == 3.0


# --- conveniences -----------------------------------------------------------------------------------------------------


def test_operators_work_with_numbers_and_arrays_on_both_sides():
    x = leaf(2.0)
    sums = [(x + 1, 3), (1 + x, 3), (x - 1, 1), (1 - x, -1), (-x, -2)]
    products = [(x * 3, 6), (3 * x, 6), (x / 4, 0.5), (4 / x, 2), (x**3, 8)]
    for y, value in sums + products:
        assert y.data.tolist() == [value]
    matrix = Tensor(np.array([[1.0, 2.0]]))
    assert (matrix @ matrix.T).data.tolist() == [[5.0]]
    assert matrix[0, 1].data == 2.0
    assert matrix.reshape(2).mean().item() == 1.5
    assert matrix.transpose(1, 0).shape == (2, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_numpy_array_on_the_left_gives_one_tensor(side):
    """Not an array of Tensors, one for each entry."""
    array, x = np.array([1.0, 2.0]), leaf(3.0, 4.0)
    for y in (array + x, array * x, array - x, array / x) if side == "left" else (x + array, x * array):
        assert isinstance(y, Tensor)
        assert y.shape == (2,)
    product = np.ones((1, 2)) @ x.reshape(2, 1) if side == "left" else x.reshape(1, 2) @ np.ones((2, 1))
    assert isinstance(product, Tensor)
    assert product.data.tolist() == [[7.0]]


def test_an_array_of_no_axes_stays_a_tensor_with_a_value():
    x = Tensor(2.0, requires_grad=True)
    y = x * x
    assert (y.shape, y.ndim, y.size, float(y)) == ((), 0, 1, 4.0)
    y.backward()
    assert float(x.grad) == 4.0


def test_backward_from_nothing_that_is_trained_is_an_error():
    """It would leave every gradient None, and an optimiser that does nothing."""
    for result in (ml.Tensor(np.ones(3)).sum(), ml.Tensor(np.ones(()))):
        with pytest.raises(ValueError, match="computed from nothing that is trained"):
            result.backward()
    weight = ml.Tensor(np.ones(3), requires_grad=True)
    with ml.no_grad():
        loss = (weight * 2.0).sum()
    with pytest.raises(ValueError, match="or inside no_grad"):
        loss.backward()
    (weight * 2.0).sum().backward()
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]
