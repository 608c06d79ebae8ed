"""The finite-difference checker: right gradients pass, wrong ones are caught at any magnitude, and it never guesses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora import backend, ops
from minilora.comparison import GradientError
from minilora.errors import MiniloraError
from minilora.gradcheck import dot_product_check, gradcheck, gradcheck_model, gradcheck_parameters
from minilora.tensor import Primitive, Tensor
from tests import tiny
from tests.cases.models import build

FUNCTIONS = {
    "exp": ops.exp,
    "tanh": ops.tanh,
    "silu": ops.silu,
    "gelu": ops.gelu_tanh,
    "norm": lambda x: x / (x * x).sum(axis=-1, keepdims=True) ** 0.5,
    "softmax": lambda x: ops.exp(x) / ops.exp(x).sum(axis=-1, keepdims=True),
    "log": lambda x: ops.log(x * x + 1e-3),
    "quotient": lambda x: x / (x * x + 1.0),
    "power": lambda x: (x * x + 0.1) ** 1.7,
    "relu": lambda x: ops.maximum(x, 0.0),
    "scalar": lambda x: ops.log(ops.exp(x).sum()),
}


def wrong(definition):
    """A primitive outside the registry: what is planted here is nobody else's."""
    return Primitive(definition)


def scaled_gradient(factor, only=None):
    """y = tanh(x) whose gradient is off by a factor, everywhere or in one entry."""

    def planted(x):
        y = backend.array_module(x).tanh(x)

        def vjp(dy):
            dx = dy * (1 - y * y)
            if only is None:
                return dx * factor
            dx[only] *= factor
            return dx

        return y, vjp

    return wrong(planted)


def normal(device, *shape, seed=0):
    return backend.to_device(np.random.default_rng(seed).standard_normal(shape), device)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-8, 1), spread=st.floats(0, 4))
def test_right_gradients_pass_at_every_scale(name, device, seed, exponent, spread):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 4)) * 10.0**exponent * 10.0 ** -rng.uniform(0, spread, (3, 4))
    try:
        report = gradcheck(FUNCTIONS[name], [backend.to_device(x, device)], seed=seed)
    except GradientError as error:
        report = error.report  # nothing could be decided, say
    assert not report.wrong
    assert report.checked + report.zero + report.inconclusive == 12


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, 0.0, 1 + 1e-5, math.nan])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_a_wrong_factor_is_caught_at_every_magnitude(device, factor, magnitude):
    x = normal(device, 2, 3)
    planted = scaled_gradient(factor)
    with pytest.raises(GradientError):
        gradcheck(lambda x: planted(x) * magnitude, [x])
    with pytest.raises(GradientError):
        gradcheck(lambda x: planted(x / magnitude), [x * magnitude])


@pytest.mark.parametrize("index", [(0, 0), (1, 2), (3, 4)])
def test_one_wrong_entry_is_named(device, index):
    with pytest.raises(GradientError) as caught:
        gradcheck(scaled_gradient(2.0, only=index), [normal(device, 4, 5)], names=["gate"])
    finding = caught.value.finding
    assert (finding.input, finding.index) == ("gate", index)
    assert finding.analytic == pytest.approx(2 * finding.numeric)
    assert finding.error == pytest.approx(0.5)
    for part in ("planted", "input gate", f"entry {index}", "analytic", "numeric"):
        assert part in str(caught.value)


def test_random_directions_catch_one_wrong_entry_of_a_large_input(device):
    planted = scaled_gradient(2.0, only=(17, 23))
    with pytest.raises(GradientError, match="along a direction"):
        gradcheck(planted, [normal(device, 60, 60)], entries=0, directions=1)


def test_a_sample_of_entries_catches_a_wrong_column(device):
    planted = scaled_gradient(-1.0, only=(slice(None), 3))
    with pytest.raises(GradientError, match="entry"):
        gradcheck(planted, [normal(device, 40, 8)], entries=40, directions=0)


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0])  # right or wrong: it cannot be told
@pytest.mark.parametrize("magnitude", [1e-20, 3e-14])  # far below one bit of the value, and near it
def test_a_gradient_below_the_noise_floor_is_inconclusive_and_never_passed(device, factor, magnitude):
    planted = scaled_gradient(factor)
    with pytest.raises(GradientError, match="could not be checked") as caught:
        gradcheck(lambda x: planted(x) * magnitude + 1.0, [normal(device, 2, 3)], directions=0)
    assert caught.value.report.inconclusive + caught.value.report.zero == 6
    assert caught.value.report.checked == 0
    assert caught.value.finding is None


def test_inconclusive_entries_are_counted_beside_those_that_were_checked(device):
    weight = backend.to_device(np.array([1.0, 1.0, 1e-18]), device)
    report = gradcheck(lambda x: (ops.tanh(x) * weight).sum(), [normal(device, 3)])
    assert (report.checked, report.inconclusive) == (2, 1)


def test_entries_below_the_floor_are_caught_together_along_a_direction(device):
    def planted(x):
        return x * 1.0, lambda dy: -dy

    # f = 1e4 + Σ 1e-9 x over 2,500 entries: each lies below the floor, their sum along the signs above it
    tail = wrong(planted)
    x = abs(normal(device, 50, 50))
    with pytest.raises(GradientError, match="along a direction"):
        gradcheck(lambda x: (tail(x) * 1e-9).sum() + 1e4, [x], entries=2500, directions=0)
    report = gradcheck(lambda x: (x * 1e-9).sum() + 1e4, [x], entries=2500, directions=0)
    assert report.inconclusive > 2000
    assert report.directions_checked == 1


def test_masked_entries_are_zero_and_neither_checked_nor_inconclusive(device):
    mask = backend.to_device(np.array([True, False, True, False]), device)
    report = gradcheck(lambda x: ops.where(mask, x * x, 0.0), [normal(device, 3, 4)])
    assert (report.checked, report.zero, report.inconclusive) == (6, 6, 0)


def test_a_gradient_where_the_function_is_flat_is_wrong(device):
    def planted(x):
        return x * 0.0, lambda dy: dy

    with pytest.raises(GradientError):
        gradcheck(wrong(planted), [normal(device, 3)])


def test_an_infinite_gradient_is_wrong_even_where_no_difference_can_be_taken(device):
    x = backend.to_device(np.array([0.0, 1.0]), device)  # the square root ends at zero
    with np.errstate(divide="ignore"), pytest.raises(GradientError, match=r"entry \(0,\): analytic inf"):
        gradcheck(lambda x: Primitive(ops.sqrt.definition)(x), [x], directions=0)


def test_an_entry_of_a_smooth_function_takes_three_pairs_of_evaluations(device):
    calls = []

    def counted(x):
        calls.append(1)
        return ops.tanh(x)

    costs = []
    for entries in (0, 20):
        calls.clear()
        gradcheck(counted, [normal(device, 20)], entries=entries, directions=1)
        costs.append(len(calls))
    assert (costs[1] - costs[0]) / 20 <= 6.5


def test_a_missing_gradient_is_wrong(device):
    def planted(a, b):
        return a * b, lambda dy: (dy * b, None)

    with pytest.raises(GradientError, match="input b"):
        gradcheck(wrong(planted), [normal(device, 3), normal(device, 3, seed=1)])


def test_kinks_are_inconclusive_and_right_beside_them(device):
    def relu(x):
        return x * (x > 0), lambda dy: dy * (x > 0)

    x = backend.to_device(np.array([0.0, 1e-3, -1e-4, 1.0]), device)
    report = gradcheck(wrong(relu), [x], directions=0)
    assert (report.checked, report.zero, report.inconclusive) == (2, 1, 1)
    with pytest.raises(GradientError):
        gradcheck(lambda x: scaled_gradient(2.0)(wrong(relu)(x)), [x])


def test_a_function_that_overwrites_its_input_is_refused(device):
    def planted(x):
        y = x * x
        x *= 1.0000001
        return y, lambda dy: 2 * dy * x

    with pytest.raises(GradientError, match="changes its input x in place"):
        gradcheck(lambda x: wrong(planted)(x), [normal(device, 3)])


def test_a_vjp_that_overwrites_the_incoming_gradient_is_refused(device):
    def planted(x):
        def vjp(dy):
            dy *= 2 * x
            return dy

        return x * x, vjp

    with pytest.raises(GradientError, match="writes into the gradient"):
        gradcheck(wrong(planted), [normal(device, 3)])


def test_a_result_in_less_than_float64_is_refused_and_float32_inside_shows_as_noise(device):
    narrow, wide = np.dtype("float32"), np.dtype("float64")
    with pytest.raises(GradientError, match="float32"):
        gradcheck(lambda x: ops.astype(x, dtype=narrow), [normal(device, 3)])
    x = normal(device, 3, 4)
    inside = gradcheck(lambda x: ops.astype(ops.exp(ops.astype(x, dtype=narrow)), dtype=wide), [x])
    assert inside.noise > 1e-9
    assert gradcheck(ops.exp, [x]).noise < 1e-14


def test_the_noise_of_a_single_number_is_measured_too(device):
    report = gradcheck(lambda x: (x * 1e-6 + 1.0) - 1.0, [normal(device)])
    assert 1e-11 < report.noise < 1e-9


def test_a_function_that_is_not_deterministic_is_bad_input(device):
    rng = np.random.default_rng(0)
    with pytest.raises(MiniloraError, match="fix the seed"):
        gradcheck(lambda x: x * rng.standard_normal(), [normal(device, 3)])


def test_values_that_depend_on_recording_are_refused(device):
    def planted(x, *, needs):
        return x * (2.0 if needs[0] else 2.1), lambda dy: 2 * dy

    with pytest.raises(GradientError, match="no_grad"):
        gradcheck(wrong(planted), [normal(device, 3)])


def test_bad_inputs_are_named(device):
    x = normal(device, 3)
    with pytest.raises(MiniloraError, match="input x is float32, expected float64"):
        gradcheck(ops.exp, [x.astype("float32")])
    with pytest.raises(MiniloraError, match="no input can be checked"):
        gradcheck(ops.exp, [Tensor(x)])
    with pytest.raises(MiniloraError, match="expected a leaf"):
        gradcheck(ops.exp, [ops.exp(Tensor(x, requires_grad=True))])
    with pytest.raises(MiniloraError, match="returns Tensors"):
        gradcheck(lambda x: x.data, [x])
    if device == "cpu":
        x.flags.writeable = False
        with pytest.raises(MiniloraError, match="read-only"):
            gradcheck(ops.exp, [x])


def test_inputs_and_their_gradients_are_as_before(device):
    x = Tensor(normal(device, 3, 4), requires_grad=True)
    x.grad = x.data * 0 + 7
    before = x.data.copy()
    gradcheck(lambda x: ops.exp(x).sum(), [x])
    gradcheck_parameters(lambda: ops.exp(x).sum(), {"x": x})
    with pytest.raises(GradientError):
        gradcheck(scaled_gradient(2.0), [x])
    assert (x.data == before).all()
    assert (x.grad == 7).all()


def test_strided_empty_and_scalar_inputs_and_tuples_of_outputs(device):
    a = normal(device, 6, 8)[::2, ::-3]
    b = normal(device, 4, 3, seed=1).T
    assert gradcheck(lambda a, b: (a * b[:, :3], ops.exp(a)), [a, b]).checked == 18
    assert gradcheck(ops.exp, [normal(device, 0, 3)]).checked == 0
    assert gradcheck(ops.exp, [normal(device)]).checked == gradcheck(ops.exp, [np.float64(0.3)]).checked == 1

    def planted(x):
        return (x * 1, x * x), lambda da, db: da + x * db

    with pytest.raises(GradientError):
        gradcheck(wrong(planted), [a])


def test_functions_that_return_views_of_their_inputs_are_checked(device):
    for view in (ops.transpose, lambda x: x, lambda x: ops.reshape(x, shape=(2, 6)), lambda x: x[1:]):
        assert gradcheck(view, [normal(device, 3, 4)]).checked >= 8
        with pytest.raises(GradientError):
            gradcheck(lambda x, view=view: scaled_gradient(2.0)(view(x)), [normal(device, 3, 4)])


def test_constants_are_passed_on_and_not_checked(device):
    constant = Tensor(normal(device, 3))
    report = gradcheck(lambda a, b, c: a * b * c, [normal(device, 3, seed=1), constant, 2.0])
    assert report.checked == 3


def test_the_adjoint_test_passes_right_and_catches_wrong_vjps(device):
    x = normal(device, 3, 4)
    assert dot_product_check(ops.gelu_tanh, [x]) < 1e-9
    matrix = Tensor(normal(device, 4, 2, seed=1))
    assert dot_product_check(ops.matmul, [x, matrix], jvp=ops.matmul) < 1e-14
    with pytest.raises(GradientError, match="adjoint"):
        dot_product_check(scaled_gradient(1 + 1e-6), [x])

    def nonlinear(x):  # right for one sign of the incoming gradient only
        return x * 1.0, lambda dy: abs(dy)

    with pytest.raises(GradientError, match="adjoint"):
        dot_product_check(wrong(nonlinear), [abs(x)])


def test_parameters_are_checked_in_groups_and_only_the_wrong_group_is_blamed(device):
    names = ("layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b")
    parameters = {name: Tensor(normal(device, 3, 3, seed=i), requires_grad=True) for i, name in enumerate(names)}
    planted = scaled_gradient(2.0)

    def loss():
        h = ops.matmul(parameters["layers.0.a"], ops.tanh(parameters["layers.0.b"]))
        return (ops.matmul(h, planted(parameters["layers.1.a"])) * parameters["layers.1.b"]).sum()

    groups = {"0": names[:2], "1": names[2:]}
    seen = {}
    reports = gradcheck_parameters(loss, parameters, groups=groups, entries=18, progress=seen.__setitem__)
    assert seen == reports
    assert not reports["0"].wrong
    assert reports["0"].checked == 18
    assert reports["0"].directions_checked == 1
    assert {finding.input for finding in reports["1"].wrong} == {"layers.1.a", "layers.1.a, layers.1.b"}
    reports["0"].raise_if_wrong()
    with pytest.raises(GradientError, match=r"layers\.1\.a"):
        reports["1"].raise_if_wrong()


@pytest.mark.parametrize("start", ["B is zero", "trained, with dropout"])
def test_a_model_is_checked_block_by_block_and_left_as_it_was(device, start):
    config = ml.LoraConfig(r=2, alpha=4, target_modules=["q_proj", "lm_head"], dropout=0.5 if "dropout" in start else 0)
    network = build("llama", {"a": config, "b": config}, device)
    if start == "B is zero":
        network.add_adapter("a0", config)
    name = "a0" if start == "B is zero" else "a"
    network.set_adapter("b")
    before = {key: tensor.data.copy() for key, tensor in network.adapter_parameters(name).items()}
    reports = gradcheck_model(network, tiny.tokens(2, 5), adapter=name, entries=4)
    assert set(reports) == {"model.layers.0", "model.layers.1", "lm_head"}
    for report in reports.values():
        report.raise_if_wrong()
        assert (report.checked, report.directions_checked) == (4, 1)
        assert report.error < 1e-8
    assert network.active_adapters == {"b": 1.0}
    assert all(bool((tensor.data == before[key]).all()) for key, tensor in network.adapter_parameters(name).items())
    assert all(layer.dropout == config.dropout for layer in network._adapters.layers(name).values())


def test_a_wrong_gradient_in_one_block_is_blamed_on_that_block(device):
    network = build("llama", {"a": ml.LoraConfig(r=2, alpha=4, target_modules=["q_proj"])}, device)
    linear = network.network.model.layers[1].self_attn.q_proj
    slot = linear.adapter

    def doubled(y):
        return y * 1.0, lambda dy: 2 * dy

    def wrong_slot(layer, x):
        return wrong(doubled)(slot(layer, x.detach())) + (slot(layer, x) - slot(layer, x).detach()) * 0.0

    wrong_slot.layers = slot.layers
    wrong_slot.plain = lambda: None  # it takes more than a product with A and B
    linear.adapter = wrong_slot
    reports = gradcheck_model(network, tiny.tokens(2, 5), adapter="a", entries=2)
    assert reports["model.layers.1"].wrong
    with pytest.raises(GradientError, match=r"model\.layers\.1"):
        reports["model.layers.1"].raise_if_wrong()


def test_a_float32_model_is_refused(device):
    with pytest.raises(MiniloraError, match="dtype='float64'"):
        gradcheck_model(tiny.model("float32").to(device), tiny.tokens(1, 4), adapter="a")
