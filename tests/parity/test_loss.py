"""The loss against transformers: the shift, ignored labels, the mean over label tokens, and packed sequences."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from tests import tiny
from tests.parity.reference import reference_model, token_losses, torch

pytestmark = pytest.mark.parity


@pytest.fixture
def pair(checkpoint, float64_transformers):
    """One tiny float64 Llama, here and in transformers."""
    path = checkpoint(tiny.llama())
    return ml.load_model(path), reference_model(path)


def theirs(model, tokens, labels):
    with torch.no_grad():
        return float(model(torch.from_numpy(tokens), labels=torch.from_numpy(labels), use_cache=False).loss)


def test_the_loss_is_the_shifted_mean_over_label_tokens(pair):
    ours, reference = pair
    tokens, labels = tiny.labelled(3, 9)
    assert float(ours.loss(tokens, labels)) == pytest.approx(theirs(reference, tokens, labels), rel=1e-12)
    assert float(ours.loss(tokens)) == pytest.approx(theirs(reference, tokens, tokens), rel=1e-12)


def test_only_labels_count_and_not_what_they_label(pair):
    """Labels may differ from the tokens, and the first one is never predicted."""
    ours, reference = pair
    tokens = tiny.tokens(2, 8, seed=1)
    labels = tiny.tokens(2, 8, seed=2)
    labels[0, 3:6] = labels[1, 0] = -100
    assert float(ours.loss(tokens, labels)) == pytest.approx(theirs(reference, tokens, labels), rel=1e-12)
    assert ours.label_count(tokens, labels) == 2 * 7 - 3


def test_a_given_normaliser_divides_the_sum(pair):
    ours, reference = pair
    tokens, labels = tiny.labelled(3, 9)
    with torch.no_grad():
        total = float(token_losses(reference, tokens, labels))
    assert float(ours.loss(tokens, labels, normaliser=40)) == pytest.approx(total / 40, rel=1e-12)


def test_packed_sequences_have_the_loss_of_separate_ones(pair):
    """Three sequences in two rows, padding in front of, between and after them, against one pass for each."""
    ours, reference = pair
    sequences = [tiny.tokens(1, length, seed=length) for length in (5, 4, 7)]
    tokens, segments = np.zeros((2, 12), int), np.zeros((2, 12), int)
    for number, (row, start, sequence) in enumerate(zip((0, 0, 1), (1, 7, 3), sequences, strict=True), 1):
        tokens[row, start : start + sequence.size] = sequence
        segments[row, start : start + sequence.size] = number
    with torch.no_grad():
        total = sum(float(token_losses(reference, sequence, sequence)) for sequence in sequences)
    assert float(ours.loss(tokens, segments=segments)) == pytest.approx(total / (4 + 3 + 6), rel=1e-12)


def test_float32_losses_agree_to_float32_precision(checkpoint):
    path = checkpoint(tiny.llama(), "float32")
    tokens, labels = tiny.labelled(3, 9)
    expected = theirs(reference_model(path, "float32"), tokens, labels)
    assert float(ml.load_model(path).loss(tokens, labels)) == pytest.approx(expected, rel=2e-6)
