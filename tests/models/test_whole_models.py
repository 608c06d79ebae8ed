"""Whole networks: every gradient against finite differences, causality, padding and packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.models import FAMILIES
from tests import tiny
from tests.cases.case import examples
from tests.cases.models import (
    ARCHITECTURES,
    adapter_gradients,
    architectures,
    build,
    lora_configs,
    worst_difference,
)

ROUNDING = 1e-12
seeds = st.integers(0, 2**16)


def test_every_family_is_among_the_architectures():
    assert {config["model_type"] for config in ARCHITECTURES.values()} == set(FAMILIES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@examples(0.15)
@given(config=lora_configs(), seed=seeds, packed=st.booleans())
def test_gradients_of_adapters_are_finite_differences(architecture, config, seed, packed, device):
    network = build(architecture, {"a": config}, device, seed)
    ids, labels = tiny.labelled(2, 6, seed)
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]]) if packed else None
    parameters = network.adapter_parameters("a")
    groups = {"all": list(parameters)}
    reports = ml.gradcheck_parameters(
        lambda: network.loss(ids, labels, segments), parameters, groups=groups, entries=14, directions=2, seed=seed
    )
    reports["all"].raise_if_wrong()
    assert reports["all"].directions_checked == 2
    assert reports["all"].checked > 7
    assert reports["all"].error < 1e-7


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_moves_the_loss(architecture, device):
    network = build(architecture, {}, device)
    network.unfreeze(".*")
    network.loss(*tiny.labelled(2, 6)).backward()
    assert not [name for name, tensor in network.parameters().items() if tensor.grad is None or not tensor.grad.any()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_every_base_parameter_are_finite_differences(architecture, device):
    network = build(architecture, {}, device)
    network.unfreeze(".*")
    parameters = network.parameters()
    assert set(parameters) == {name for name, _ in network.network.named_parameters()}
    ids, labels = tiny.labelled(2, 6)
    reports = ml.gradcheck_parameters(lambda: network.loss(ids, labels), parameters, entries=2, directions=1)
    for report in reports.values():
        report.raise_if_wrong()
        assert report.directions_checked == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frozen_base_and_a_trained_one_are_checked_together(architecture, device):
    """Unfreezing the base changes no gradient of the adapter, and the base gets its own, under the adapter."""
    network = build(architecture, {"a": ml.LoraConfig(r=3, alpha=6)}, device)
    ids, labels = tiny.labelled(2, 6)
    frozen = adapter_gradients(network, "a", ids, labels)
    names = network.unfreeze(".*")
    assert worst_difference(adapter_gradients(network, "a", ids, labels), frozen) < ROUNDING
    parameters = {name: tensor for name, tensor in network.parameters().items() if name in names}
    reports = ml.gradcheck_parameters(lambda: network.loss(ids, labels), parameters, entries=0)
    for report in reports.values():
        report.raise_if_wrong()


@given(architecture=architectures, config=lora_configs(), seed=seeds, cut=st.integers(1, 6))
def test_a_later_token_has_exactly_no_influence_on_earlier_logits(architecture, config, seed, cut, device):
    network = build(architecture, {"a": config}, device, seed)
    ids = tiny.tokens(2, 7, seed)
    changed = ids.copy()
    changed[:, cut:] = tiny.tokens(2, 7, seed + 1)[:, cut:]
    before, after = (ml.to_numpy(network.logits(tokens)) for tokens in (ids, changed))
    assert np.array_equal(before[:, :cut], after[:, :cut])
    assert (changed == ids).all() or not np.array_equal(before[:, cut:], after[:, cut:])


@given(architecture=architectures, config=lora_configs(), seed=seeds, padding=st.integers(1, 4), marked=st.booleans())
def test_padding_changes_no_gradient_of_a_real_token(architecture, config, seed, padding, marked, device):
    """Padding behind the tokens, ignored by its labels or marked by segment 0."""
    network = build(architecture, {"a": config}, device, seed)
    ids, labels = tiny.labelled(2, 6, seed)
    expected = adapter_gradients(network, "a", ids, labels)
    padded = np.concatenate([ids, tiny.tokens(2, padding, seed + 1)], axis=1)
    ignored = np.concatenate([labels, np.full((2, padding), -100)], axis=1)
    segments = np.concatenate([np.ones((2, 6), int), np.zeros((2, padding), int)], axis=1)
    found = adapter_gradients(network, "a", padded, padded if marked else ignored, segments if marked else None)
    if marked:
        expected = adapter_gradients(network, "a", ids, ids)
    assert worst_difference(found, expected) < ROUNDING


@given(
    architecture=architectures,
    config=lora_configs(),
    seed=seeds,
    lengths=st.lists(st.integers(2, 5), min_size=2, max_size=3),
)
def test_packed_sequences_have_the_gradients_of_separate_ones(architecture, config, seed, lengths, device):
    network = build(architecture, {"a": config}, device, seed)
    sequences = [tiny.tokens(1, length, seed + i) for i, length in enumerate(lengths)]
    total = sum(lengths) - len(lengths)
    separate = None
    for sequence in sequences:
        part = adapter_gradients(network, "a", sequence, normaliser=total)
        separate = part if separate is None else {key: separate[key] + part[key] for key in part}
    packed = np.concatenate([*sequences, np.zeros((1, 2), int)], axis=1)
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, 2])[None]
    assert separate is not None
    assert worst_difference(adapter_gradients(network, "a", packed, segments=segments), separate) < ROUNDING


@given(architecture=architectures, config=lora_configs(), seed=seeds)
def test_the_order_of_rows_changes_no_gradient(architecture, config, seed, device):
    network = build(architecture, {"a": config}, device, seed)
    ids, labels = tiny.labelled(3, 6, seed)
    order = [2, 0, 1]
    found = adapter_gradients(network, "a", ids[order], labels[order])
    assert worst_difference(found, adapter_gradients(network, "a", ids, labels)) < ROUNDING
