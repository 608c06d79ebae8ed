"""The laws that adapters obey, over architectures, targets, ranks and scales, in float64.

The projection law (gradients through W' = W + s B A project onto those of A and B) has two exceptions: dropout, where A
reads another input than W, and DoRA, where W' is rescaled by a norm of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.lora.layer import Selection
from minilora.optim import AdamW
from tests import tiny
from tests.cases.case import examples
from tests.cases.models import adapter_gradients, architectures, build, gradient, lora_configs, worst_difference

ROUNDING = 1e-12
seeds = st.integers(0, 2**16)


def logits(network: ml.Model, ids: np.ndarray) -> np.ndarray:
    return ml.to_numpy(network.logits(ids))


def deltas(network: ml.Model, name: str) -> dict[str, np.ndarray]:
    """ΔW of each layer, from s, B and A: s B A, of an embedding (V, D) its transpose."""
    found = {}
    for path, layer in network._adapters.layers(name).items():
        product = layer.scale * ml.to_numpy(layer.lora_B) @ ml.to_numpy(layer.lora_A)
        found[path] = product.T if path in ("model.embed_tokens", "transformer.wte", "transformer.wpe") else product
    return found


# --- the value --------------------------------------------------------------------------------------------------------


@given(architecture=architectures, config=lora_configs(), seed=seeds)
def test_a_new_adapter_changes_no_bit_of_the_logits(architecture, config, seed, device):
    network = build(architecture, {}, device, seed)
    ids = tiny.tokens(2, 6, seed)
    base = logits(network, ids)
    network.add_adapter("a", config, seed=seed)
    network.set_adapter("a")
    assert np.array_equal(logits(network, ids), base)


@given(architecture=architectures, config=lora_configs(), seed=seeds)
def test_merging_leaves_the_logits_and_unmerging_restores_every_bit(architecture, config, seed, device):
    network = build(architecture, {"a": config}, device, seed)
    ids = tiny.tokens(2, 6, seed)
    adapted, weights = logits(network, ids), bits(network)
    network.merge_adapter("a")
    assert network.active_adapters == {}
    assert bits(network) != weights
    assert tiny.relative_error(logits(network, ids), adapted) < ROUNDING
    network.unmerge_adapter()
    assert bits(network) == weights
    network.set_adapter("a")
    assert np.array_equal(logits(network, ids), adapted)


def bits(network: ml.Model) -> dict[str, bytes]:
    return {name: ml.to_numpy(parameter).tobytes() for name, parameter in network.network.named_parameters()}


@given(architecture=architectures, config=lora_configs(), seed=seeds, factor=st.sampled_from((-1.0, 0.5, 3.0)))
def test_the_update_is_proportional_to_alpha_and_has_at_most_rank_r(architecture, config, seed, factor, device):
    network = build(architecture, {"a": config}, device, seed)
    scaled = build(architecture, {"a": config}, device, seed)
    root = np.sqrt(config.r) if config.use_rslora else config.r
    for layer in network._adapters.layers("a").values():
        assert layer.scale == pytest.approx(config.alpha / root, rel=1e-15)
    for layer in scaled._adapters.layers("a").values():
        layer.scale = config.scale(config.r, config.alpha * factor)
    before, after = deltas(network, "a"), deltas(scaled, "a")
    for path, delta in merged_updates(network, "a").items():
        assert tiny.relative_error(delta, before[path]) < 1e-11  # W' − W loses bits of W
        assert tiny.relative_error(after[path], factor * before[path]) < ROUNDING
        assert np.linalg.matrix_rank(delta, tol=1e-9) <= config.r


def merged_updates(network: ml.Model, name: str) -> dict[str, np.ndarray]:
    """What merging adds to each weight."""
    modules = network._adapters.adaptable
    before = {path: np.array(ml.to_numpy(module.weight)) for path, module in modules.items()}
    network.merge_adapter(name)
    after = {path: np.array(ml.to_numpy(module.weight)) for path, module in modules.items()}
    network.unmerge_adapter()
    return {path: after[path] - before[path] for path in network._adapters.layers(name)}


@given(
    architecture=architectures,
    configs=st.tuples(lora_configs(), lora_configs()),
    weights=st.tuples(st.sampled_from((0.7, 1.0, -2.0)), st.sampled_from((0.3, 1.5))),
    seed=seeds,
)
def test_a_weighted_selection_is_the_weighted_sum_of_the_updates(architecture, configs, weights, seed, device):
    network = build(architecture, dict(zip("ab", configs, strict=True)), device, seed)
    ids = tiny.tokens(2, 5, seed)
    network.set_adapter(dict(zip("ab", weights, strict=True)))
    together = logits(network, ids)
    network.merge_adapter(dict(zip("ab", weights, strict=True)))
    assert tiny.relative_error(logits(network, ids), together) < ROUNDING


@given(
    architecture=architectures,
    configs=st.tuples(lora_configs(), lora_configs()),
    rows=st.lists(st.sampled_from(("a", "b", None)), min_size=1, max_size=4),
    seed=seeds,
)
def test_each_row_has_the_logits_of_its_own_adapter(architecture, configs, rows, seed, device):
    network = build(architecture, dict(zip("ab", configs, strict=True)), device, seed)
    ids = tiny.tokens(len(rows), 5, seed)
    network.set_adapter(rows=rows)
    mixed = logits(network, ids)
    for row, name in enumerate(rows):
        network.set_adapter(name)
        assert tiny.relative_error(mixed[row], logits(network, ids[row : row + 1])[0]) < ROUNDING


# --- gradients --------------------------------------------------------------------------------------------------------


@given(architecture=architectures, config=lora_configs(targets=False), seed=seeds)
def test_gradients_of_a_merged_weight_project_onto_those_of_A_and_B(architecture, config, seed, device):
    """dA = s Bᵀ dW and dB = s dW Aᵀ, with dW, which training never forms, from unfreezing the merged base."""
    network = build(architecture, {"a": config}, device, seed)
    batch = tiny.labelled(2, 6, seed)
    found = adapter_gradients(network, "a", *batch)
    network.merge_adapter("a")
    network.unfreeze([f"{path}.weight" for path in network._adapters.layers("a")])
    network.loss(*batch).backward()
    expected = {}
    for path, layer in network._adapters.layers("a").items():
        dW = gradient(network._adapters.linears[path].weight)
        A, B = ml.to_numpy(layer.lora_A), ml.to_numpy(layer.lora_B)
        expected[f"base_model.model.{path}.lora_A.weight"] = layer.scale * B.T @ dW
        expected[f"base_model.model.{path}.lora_B.weight"] = layer.scale * dW @ A.T
    assert worst_difference(found, expected) < 1e-11


@given(
    architecture=architectures,
    configs=st.tuples(lora_configs(), lora_configs()),
    rows=st.permutations(("a", "b", "b", None)).map(list),
    seed=seeds,
)
def test_adapters_trained_side_by_side_get_the_gradients_of_separate_passes(architecture, configs, rows, seed, device):
    network = build(architecture, dict(zip("ab", configs, strict=True)), device, seed)
    ids, labels = tiny.labelled(len(rows), 6, seed)
    network.set_adapter(rows=rows)
    network.loss(ids, labels).backward()
    together = {
        name: {key: gradient(tensor) for key, tensor in network.adapter_parameters(name).items()} for name in "ab"
    }
    for name in "ab":
        own = [row for row, owner in enumerate(rows) if owner == name]
        network.set_adapter(name)
        alone = adapter_gradients(network, name, ids[own], labels[own])
        assert worst_difference(together[name], alone) < ROUNDING


@given(
    architecture=architectures,
    configs=st.tuples(lora_configs(), lora_configs()),
    weights=st.tuples(st.sampled_from((0.7, 1.0, -2.0)), st.sampled_from((0.3, 1.5))),
    seed=seeds,
)
def test_each_adapter_of_a_weighted_sum_gets_the_projection_with_its_own_weight(
    architecture, configs, weights, seed, device
):
    same_targets = [dataclasses.replace(config, target_modules="all-linear") for config in configs]
    network = build(architecture, dict(zip("ab", same_targets, strict=True)), device, seed)
    batch = tiny.labelled(2, 5, seed)
    network.set_adapter(dict(zip("ab", weights, strict=True)))
    network.loss(*batch).backward()
    found = {name: {k: gradient(t) for k, t in network.adapter_parameters(name).items()} for name in "ab"}
    network.merge_adapter(dict(zip("ab", weights, strict=True)))
    network.unfreeze([f"{path}.weight" for path in network._adapters.layers("a")])
    network.loss(*batch).backward()
    for name, weight in zip("ab", weights, strict=True):
        expected = {}
        for path, layer in network._adapters.layers(name).items():
            dW = gradient(network._adapters.linears[path].weight)
            A, B, scale = ml.to_numpy(layer.lora_A), ml.to_numpy(layer.lora_B), weight * layer.scale
            expected[f"base_model.model.{path}.lora_A.weight"] = scale * B.T @ dW
            expected[f"base_model.model.{path}.lora_B.weight"] = scale * dW @ A.T
        assert worst_difference(found[name], expected) < 1e-11


def test_with_dropout_the_projection_law_does_not_hold_and_evaluation_has_none(device):
    config = ml.LoraConfig(r=3, alpha=6, dropout=0.5)
    network = build("llama", {"a": config}, device)
    batch = tiny.labelled(2, 6)
    with_dropout = adapter_gradients(network, "a", *batch)
    with ml.no_grad():
        first, second = float(network.loss(*batch)), float(network.loss(*batch))
    assert first == second
    for layer in network._adapters.layers("a").values():
        layer.dropout = 0.0
    assert float(network.loss(*batch)) == pytest.approx(first, rel=1e-14)
    assert worst_difference(with_dropout, adapter_gradients(network, "a", *batch)) > 1e-2


@examples(0.15)
@given(seed=seeds)
def test_gradients_under_dropout_are_those_of_the_masks_that_were_drawn(seed, device):
    """Finite differences with the pass's number, and so its masks, held fixed."""
    network = build("llama", {"a": ml.LoraConfig(r=2, alpha=4, dropout=0.4)}, device, seed)
    ids, labels = tiny.labelled(2, 5, seed)
    parameters = network.adapter_parameters("a")
    targets = np.where(labels[:, 1:] >= 0, labels[:, 1:], -100)
    targets = np.concatenate([targets, np.full((2, 1), -100)], axis=1)

    def loss():
        network.network.adapter_state.selection = Selection((("a", 1.0),), None, dropout_pass=seed)
        batch = network.network.loss_batch(ids, {"": targets}, np.where(targets >= 0, 0.1, 0.0))
        return network.network.loss_sums(batch.on(device))[""]

    reports = ml.gradcheck_parameters(loss, parameters, groups={"all": list(parameters)}, seed=seed)
    reports["all"].raise_if_wrong()
    assert reports["all"].directions_checked == 1


# --- batches ----------------------------------------------------------------------------------------------------------


@given(architecture=architectures, config=lora_configs(), seed=seeds, cut=st.sampled_from(((1, 3), (2, 2), (1, 1, 2))))
def test_accumulation_over_micro_batches_is_one_batch(architecture, config, seed, cut, device):
    network = build(architecture, {"a": config}, device, seed)
    ids, labels = tiny.labelled(4, 6, seed)  # rows with different counts of labels: a mean of means would differ
    parameters = network.adapter_parameters("a")
    step = ml.TrainStep(network, AdamW(parameters))
    whole_loss = float(ml.to_numpy(step.gradients([(ids, labels)])))
    whole = {key: gradient(tensor) for key, tensor in parameters.items()}
    ends = np.cumsum(cut)
    parts = [(ids[end - size : end], labels[end - size : end]) for size, end in zip(cut, ends, strict=True)]
    assert float(ml.to_numpy(step.gradients(parts))) == pytest.approx(whole_loss, rel=ROUNDING)
    assert worst_difference({key: gradient(tensor) for key, tensor in parameters.items()}, whole) < ROUNDING


@given(architecture=architectures, config=lora_configs(), seed=seeds, rows=st.booleans())
def test_checkpointing_changes_no_bit_of_a_gradient(architecture, config, seed, rows, device):
    config = dataclasses.replace(config, dropout=0.3 if seed % 2 else 0.0)
    batch = tiny.labelled(2, 6, seed)
    results = []
    for checkpoint in (False, True):
        network = build(architecture, {"a": config, "b": config}, device, seed)
        network.checkpoint = checkpoint
        if rows:
            network.set_adapter(rows=["b", "a"])
        loss = network.loss(*batch)
        loss.backward()
        grads = [gradient(tensor).tobytes() for tensor in network.adapter_parameters("a").values()]
        results.append((float(loss), grads))
    assert results[0] == results[1]


@given(architecture=architectures, config=lora_configs(), seed=seeds, checkpoint=st.booleans())
def test_gradients_belong_to_the_selection_of_the_forward_pass(architecture, config, seed, checkpoint, device):
    """Selecting another adapter between forward and backward changes nothing."""
    network = build(architecture, {"a": config, "b": config}, device, seed)
    network.checkpoint = checkpoint
    batch = tiny.labelled(2, 6, seed)
    expected = adapter_gradients(network, "a", *batch)
    for tensor in network.adapter_parameters("a").values():
        tensor.grad = None
    loss = network.loss(*batch)
    network.set_adapter("b")
    loss.backward()
    found = {key: gradient(tensor) for key, tensor in network.adapter_parameters("a").items()}
    assert worst_difference(found, expected) == 0
    assert all(tensor.grad is None for tensor in network.adapter_parameters("b").values())
