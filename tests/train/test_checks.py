"""The first step's gradients are looked at, and a NaN stops the run before it is applied, by name."""

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.nn import Module
from minilora.train.checks import check_first_gradients, first_non_finite, pairs_that_start_at_zero, some_names
from tests import tiny
from tests.train import made

GATE = "base_model.model.model.layers.1.mlp.gate_proj.lora_{}.weight"


def plant(monkeypatch, change):
    """Let `change(network parameters)` spoil the gradients of every step."""
    gradients = ml.TrainStep.gradients

    def spoiled(step, batches):
        loss = gradients(step, batches)
        change(step.optimiser.parameters)
        return loss

    monkeypatch.setattr(ml.TrainStep, "gradients", spoiled)


# --- the first step


def test_a_new_adapter_passes_the_check_of_its_first_gradients():
    network = made.model()
    pairs = pairs_that_start_at_zero(network.parameters())
    assert len(pairs) == 14
    network.loss(tiny.tokens()).backward()
    assert check_first_gradients(network.parameters(), pairs) == []


def test_a_gradient_of_lora_A_while_B_is_zero_stops_the_run_by_name(monkeypatch):
    def change(parameters):
        parameters[GATE.format("A")].grad[0, 0] = 1e-12

    plant(monkeypatch, change)
    network = made.model()
    before = made.values(network)
    with pytest.raises(MiniloraError, match=r"first gradient of .*layers\.1\.mlp\.gate_proj\.lora_A\.weight is 1e-12"):
        made.train(network, max_grad_norm=None)
    made.assert_same(made.values(network), before)


def test_a_gradient_of_lora_A_is_right_where_B_is_not_zero_and_after_the_first_step(monkeypatch):
    network = made.model()
    for tensor in network.parameters().values():
        tensor.data[...] = 0.1
    assert pairs_that_start_at_zero(network.parameters()) == []
    assert made.train(network, steps=2).steps == 2


def test_lora_B_without_a_gradient_is_reported_by_name_and_training_goes_on(monkeypatch, capsys):
    plant(monkeypatch, lambda parameters: parameters[GATE.format("B")].grad.fill(0))
    assert made.train(made.model(), steps=2).steps == 2
    warning = capsys.readouterr().err
    assert warning.count("warning") == 1
    assert "1 of 14 lora_B is all zero" in warning
    assert GATE.format("B") in warning


def test_an_adapter_that_starts_with_A_at_zero_too_is_reported_as_one_that_learns_nothing(capsys):
    made.train(made.model(init="zeros"), steps=1)
    assert "14 of 14 lora_B is all zero" in capsys.readouterr().err


def test_long_lists_of_names_are_cut():
    assert some_names(list("abcde")) == "a, b, c, d, e"
    assert some_names(list("abcdefg")) == "a, b, c, d, e and 2 more"


# --- the first non-finite tensor


def base(network, name):
    return dict(network.network.named_parameters())[name]


def spoil(tensor, value=np.nan):
    tensor.data = np.array(tensor.data)
    tensor.data.flat[5] = value


def test_a_nan_in_the_base_is_named(tmp_path):
    network = made.model()
    spoil(base(network, "model.layers.1.mlp.down_proj.weight"))
    before = made.values(network)
    with pytest.raises(
        MiniloraError,
        match=r"loss is nan in step 1, .*not applied.*: model\.layers\.1\.mlp\.down_proj\.weight "
        r"\(1 of 960 entries, the first is nan\) of the base",
    ):
        made.train(network, out=tmp_path / "run")
    made.assert_same(made.values(network), before)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_an_infinity_in_the_adapter_is_named():
    network = made.model()
    spoil(network.parameters()[GATE.format("A")], np.inf)
    with pytest.raises(MiniloraError, match=r"layers\.1\.mlp\.gate_proj\.lora_A\.weight .*inf\) of adapter 'a'"):
        made.train(network)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_activation_that_overflows_is_named_by_module_and_primitive(checkpoint):
    network = made.model()
    weight = base(network, "model.layers.1.self_attn.v_proj.weight")
    weight.data = np.full_like(weight.data, 3e38)
    plain_call = Module.__call__
    with pytest.raises(
        MiniloraError,
        match=r"the result of lora_linears in model\.layers\.1\.self_attn, shape \(4, \d+, 16\) \(",
    ):
        made.train(network, checkpoint=checkpoint)
    assert Module.__call__ is plain_call


def test_a_gradient_alone_is_named_the_last_layer_first(monkeypatch):
    names = [f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_B.weight" for layer in (0, 1)]

    def change(parameters):
        for name in names:
            parameters[name].grad[0, 0] = np.inf

    plant(monkeypatch, change)
    network = made.model()
    before = made.values(network)
    with pytest.raises(
        MiniloraError,
        match=r"its gradient not finite in step 1.*the gradient of .*layers\.1\.mlp\.up_proj\.lora_B.*inf",
    ):
        made.train(network)
    made.assert_same(made.values(network), before)


def test_what_was_saved_before_stays_and_is_told(monkeypatch, tmp_path):
    calls = iter(range(100))

    def change(parameters):
        if next(calls) >= 3:
            parameters[GATE.format("B")].grad[0, 0] = np.nan

    plant(monkeypatch, change)
    with pytest.raises(MiniloraError, match=r"in step 4, .*run holds what was saved after step 2"):
        made.train(made.model(), save_every=2, out=tmp_path / "run")
    loaded, two_steps = made.model(), made.model()
    loaded.load_adapter("b", tmp_path / "run")
    monkeypatch.undo()
    made.train(two_steps, steps=2, warmup=0, schedule="constant")
    assert made.values(loaded).keys() == made.values(two_steps).keys()
    assert all(np.isfinite(value).all() for value in made.values(loaded).values())


def test_an_update_that_overflows_is_never_saved(tmp_path):
    with pytest.raises(MiniloraError, match=r"step 1 made .*lora_..* not finite, so it is not saved: lower lr"):
        made.train(made.model(), steps=1, lr=1e39, out=tmp_path / "run")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_loss_that_is_finite_when_computed_again_says_so():
    network = made.model()
    assert first_non_finite(network, lambda: None).startswith("none when looked for again")


def test_the_replay_draws_the_dropout_masks_of_the_step_again(monkeypatch):
    network = made.model(dropout=0.5)
    seen = []
    gradients = ml.TrainStep.gradients

    def record(step, batches):
        loss = gradients(step, batches)
        seen.append(float(loss))
        for tensor in step.optimiser.parameters.values():
            tensor.grad[...] = np.nan
        return loss

    for tensor in network.parameters().values():
        tensor.data[...] = np.random.default_rng(0).normal(0, 0.3, tensor.shape)
    monkeypatch.setattr(ml.TrainStep, "gradients", record)
    with pytest.raises(MiniloraError):
        made.train(network)
    assert len(seen) == 2
    assert seen[0] == seen[1]
