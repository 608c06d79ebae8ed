"""Generation against transformers: greedy tokens, batches filled up on the left, temperature, top-k and top-p."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from minilora.generate import generate_batch, next_distribution
from tests import tiny
from tests.parity.reference import reference_model, torch, transformers

pytestmark = pytest.mark.parity

PROMPTS = [[5, 9, 1, 33, 7], [4, 8], [11, 3, 3, 60, 2, 19, 7, 7, 40]]


def test_greedy_completions_of_a_padded_batch_are_those_of_transformers(checkpoint):
    path = checkpoint(tiny.llama(eos_token_id=None))
    model, reference = ml.load_model(path), reference_model(path)
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    generated = reference.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0, use_cache=True
    )
    expected = generated[:, longest:].tolist()
    assert generate_batch(model, PROMPTS, 20, stop=[]) == expected
    assert [model.generate(prompt, 20, stop=[]) for prompt in PROMPTS] == expected


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 61])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_the_next_token_has_the_distribution_of_transformers(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (20, 61))
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    expected = warpers(None, torch.from_numpy(logits.copy())).softmax(-1).numpy()
    for row, wanted in zip(logits, expected, strict=True):
        tokens, probabilities = next_distribution(row, temperature, top_k, top_p)
        found = np.zeros(61)
        found[tokens] = probabilities
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-15)
