"""Adam and AdamW, clipping and schedules, against the papers' formulas written out in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

import minilora as ml
from minilora.backend import device_of, to_device
from minilora.errors import MiniloraError


def parameter(values, dtype="float64", device="cpu"):
    return ml.Tensor(to_device(np.array(values, dtype), device), requires_grad=True)


def set_gradient(tensor, values):
    tensor.grad = None if values is None else to_device(np.array(values, tensor.dtype), tensor.device)


def written_out(w, gradients, rates, *, betas, eps, decay=0.0, l2=0.0):
    """One number after Adam's steps (Kingma & Ba 2015, algorithm 1), decay as Loshchilov & Hutter 2019, algorithm 2."""
    m = v = 0.0
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        g = gradient + l2 * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - lr * decay * w - lr * m_hat / (math.sqrt(v_hat) + eps)
    return w


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-6)])
@pytest.mark.parametrize(
    ("algorithm", "weight_decay", "formula"),
    [(ml.AdamW, 0.1, {"decay": 0.1}), (ml.AdamW, 0.0, {}), (ml.Adam, 0.1, {"l2": 0.1}), (ml.Adam, 0.0, {})],
)
def test_fifty_steps_follow_the_formula(algorithm, weight_decay, formula, dtype, tolerance, device):
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=6), random.normal(size=(50, 6)) * 10.0 ** random.integers(-4, 2, (50, 6))
    gradients = gradients.astype(dtype).astype(float)
    rates = [0.02 / (1 + step / 10) for step in range(50)]
    w = parameter(start, dtype, device)
    optimiser = algorithm([w], betas=(0.8, 0.95), eps=1e-4, weight_decay=weight_decay)
    for gradient, lr in zip(gradients, rates, strict=True):
        optimiser.lr = lr
        set_gradient(w, gradient)
        optimiser.step()
    expected = [
        written_out(value, column, rates, betas=(0.8, 0.95), eps=1e-4, **formula)
        for value, column in zip(start.astype(dtype).astype(float), gradients.T, strict=True)
    ]
    assert w.numpy() == pytest.approx(np.array(expected), rel=tolerance, abs=tolerance)


def test_the_defaults_are_those_of_torch():
    w = parameter([1.0])
    optimiser = ml.AdamW([w])
    assert (optimiser.lr, optimiser.betas, optimiser.eps, optimiser.weight_decay) == (1e-3, (0.9, 0.999), 1e-8, 0.01)
    set_gradient(w, [2.0])
    optimiser.step()
    assert w.data[0] == pytest.approx(1 - 1e-3 * 0.01 - 1e-3, rel=1e-9)  # the first step is lr · sign(g), whatever |g|


def test_a_step_changes_the_arrays_in_place_and_keeps_their_dtype(device):
    w = parameter([1.0, 2.0], "float32", device)
    array = w.data
    set_gradient(w, [0.5, -0.5])
    ml.AdamW([w], lr=0.1).step()
    assert w.data is array
    assert array.dtype == np.float32
    assert w.numpy()[0] < 1.0 < 2.0 < w.numpy()[1] + 0.01


def test_a_number_is_trained_like_an_array():
    """Even one that NumPy handed out as a scalar, which cannot be changed in place."""
    w = ml.Tensor(np.float64(1.0), requires_grad=True)
    optimiser = ml.AdamW([w], lr=0.1, weight_decay=0.0)
    (w * w).backward()
    optimiser.step()
    assert float(w) == pytest.approx(0.9)


def test_each_parameter_counts_its_own_steps():
    """A Tensor without a gradient is left alone, and its next step is corrected as its second, not as its third."""
    both, seldom = parameter([1.0]), parameter([1.0])
    optimiser = ml.AdamW({"both": both, "seldom": seldom}, lr=0.01, weight_decay=0.5)
    for step in range(3):
        set_gradient(both, [0.1 * (step + 1)])
        set_gradient(seldom, None if step == 1 else [0.1 * (step + 1)])
        before = seldom.numpy().copy()
        optimiser.step()
        assert (step == 1) == np.array_equal(before, seldom.numpy())
    assert optimiser.steps == {"both": 3, "seldom": 2}
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.5}
    assert both.data[0] == pytest.approx(written_out(1.0, [0.1, 0.2, 0.3], [0.01] * 3, **settings), rel=1e-12)
    assert seldom.data[0] == pytest.approx(written_out(1.0, [0.1, 0.3], [0.01] * 2, **settings), rel=1e-12)


def test_only_trained_parameters_have_state(device):
    trained, frozen = parameter(np.ones(7), "float32", device), ml.Tensor(np.ones(100))
    optimiser = ml.AdamW({"trained": trained, "frozen": frozen})
    assert list(optimiser.parameters) == ["trained"]
    assert optimiser.state_bytes() == 0  # none before the first step
    set_gradient(trained, np.ones(7))
    optimiser.step()
    assert optimiser.state_bytes() == 2 * 7 * 4
    assert frozen.data.sum() == 100


def test_zero_grad_forgets_every_gradient():
    w = parameter([1.0])
    set_gradient(w, [1.0])
    ml.AdamW([w]).zero_grad()
    assert w.grad is None


@pytest.mark.parametrize(
    "settings",
    [
        *({"lr": -1.0}, {"lr": math.nan}, {"eps": 0.0}, {"eps": math.nan}, {"weight_decay": -0.1}),
        *({"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"betas": (0.9,)}),
    ],
)
@pytest.mark.parametrize("algorithm", [ml.AdamW, ml.Adam])
def test_settings_out_of_range_are_named(algorithm, settings):
    with pytest.raises(MiniloraError, match="outside"):
        algorithm([parameter([1.0])], **settings)


def test_no_trained_parameter_is_an_error():
    with pytest.raises(MiniloraError, match="no trained parameter"):
        ml.AdamW([ml.Tensor(np.ones(2))])


# --- state ------------------------------------------------------------------------------------------------------------


def steps(optimiser, tensors, numbers):
    for number in numbers:
        for index, tensor in enumerate(tensors.values()):
            random = np.random.default_rng(10 * number + index)
            set_gradient(tensor, None if (number + index) % 3 == 0 else random.normal(size=tensor.shape))
        optimiser.step()


@pytest.mark.parametrize("algorithm", [ml.AdamW, ml.Adam])
def test_a_run_resumed_from_its_state_is_the_same_run(algorithm, device):
    def fresh(values=None):
        values = values or {"a": np.ones((2, 3)), "b": np.ones(4)}
        return {name: parameter(array, "float32", device) for name, array in values.items()}

    whole = fresh()
    steps(algorithm(whole, lr=0.1, weight_decay=0.1), whole, range(10))

    first = fresh()
    optimiser = algorithm(first, lr=0.1, weight_decay=0.1)
    steps(optimiser, first, range(4))
    state = optimiser.state()
    kept = {name: tensor.numpy().copy() for name, tensor in first.items()}
    second = fresh(kept)
    resumed = algorithm(second, lr=0.1, weight_decay=0.1)
    resumed.load_state(state)
    steps(optimiser, first, range(4, 6))  # going on with the first leaves the second alone
    steps(resumed, second, range(4, 10))
    for name, tensor in whole.items():
        assert np.array_equal(tensor.numpy(), second[name].numpy())


def test_a_state_of_other_parameters_is_refused():
    w = parameter([1.0, 2.0])
    optimiser = ml.AdamW({"w": w})
    set_gradient(w, [1.0, 1.0])
    optimiser.step()
    state = optimiser.state()
    with pytest.raises(MiniloraError, match="other parameters"):
        ml.AdamW({"v": parameter([1.0, 2.0])}).load_state(state)
    with pytest.raises(MiniloraError, match=r"w has shape \(2,\), expected \(3,\)"):
        ml.AdamW({"w": parameter([1.0, 2.0, 3.0])}).load_state(state)


# --- clipping ---------------------------------------------------------------------------------------------------------


def test_gradients_over_the_norm_are_scaled_down_to_it(device):
    tensors = [parameter(np.zeros(2), device=device), parameter(np.zeros(1), device=device), parameter([0.0])]
    set_gradient(tensors[0], [3.0, 0.0])
    set_gradient(tensors[1], [-4.0])
    assert float(ml.clip_grad_norm(tensors, 1.0)) == pytest.approx(5.0, rel=1e-14)  # of all together, before clipping
    assert tensors[0].grad.tolist() == pytest.approx([0.6, 0.0], rel=1e-6)
    assert tensors[1].grad.tolist() == pytest.approx([-0.8], rel=1e-6)
    assert tensors[2].grad is None


def test_gradients_under_the_norm_keep_their_bits():
    w = parameter([0.1, 0.7], "float32")
    set_gradient(w, [0.3, 0.4])
    kept = w.grad.copy()
    assert float(ml.clip_grad_norm([w], 0.51)) == pytest.approx(0.5, rel=1e-6)
    assert np.array_equal(w.grad, kept)
    assert w.grad.dtype == np.float32


def test_the_norm_of_float32_gradients_does_not_lose_the_small_ones_beside_a_large_one():
    """Sums are taken in float64: beside 1e8, float32 does not notice a thousand squares of 1e-6."""
    w = parameter(np.zeros(1001), "float32")
    set_gradient(w, [1e4, *[1e-3] * 1000])
    assert float(ml.clip_grad_norm([w], math.inf)) == pytest.approx(math.sqrt(1e8 + 1e-3), rel=1e-13)


# --- schedules --------------------------------------------------------------------------------------------------------


def test_warm_up_rises_in_equal_parts_and_starts_above_zero():
    factor = ml.schedule("constant", steps=10, warmup=4)
    assert [factor(step) for step in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_linear_falls_by_the_same_amount_every_step():
    factor = ml.schedule("linear", steps=6, warmup=2)
    expected = [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [factor(step) for step in range(8)] == pytest.approx(expected)


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor():
    factor = ml.schedule("cosine", steps=8, floor=0.1)
    values = [factor(step) for step in range(9)]
    assert values[0] == 1.0
    assert values[4] == pytest.approx(0.55)
    assert values[8] == pytest.approx(0.1)
    assert values[2] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert values == sorted(values, reverse=True)


def test_constant_stays():
    assert {ml.schedule("constant", steps=5)(step) for step in range(20)} == {1.0}


@pytest.mark.parametrize("arguments", [("exponential", 5), ("linear", -1), ("linear", 5, -1), ("cosine", 5, 0, 1.5)])
def test_a_schedule_that_does_not_exist_is_an_error(arguments):
    with pytest.raises(MiniloraError):
        ml.schedule(*arguments)


def test_moments_follow_their_parameter_to_another_device(device):
    parameter = ml.Tensor(np.ones(3), requires_grad=True)
    optimiser = ml.AdamW([parameter], lr=0.1)
    for place in ("cpu", device):
        parameter.data = to_device(parameter.data, place)
        parameter.grad = to_device(np.ones(3), place)
        optimiser.step()
    assert all(device_of(moment) == parameter.device for moment in optimiser.moments["0"])
    assert optimiser.steps["0"] == 2


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_that_is_no_limit_is_named_and_turns_no_gradient_round(max_norm):
    w = parameter([3.0, 4.0])
    set_gradient(w, [3.0, 4.0])
    with pytest.raises(MiniloraError, match=r"max_norm is .*, expected a number above 0"):
        ml.clip_grad_norm([w], max_norm)
    assert w.grad.tolist() == [3.0, 4.0]
