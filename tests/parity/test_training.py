"""Twenty steps of training against torch + PEFT from one initial adapter: the same loss at every step.

AdamW with weight decay, clipping that bites, a warm-up and a cosine, and three micro-batches of unequal label counts to
each step.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import minilora as ml
from tests import tiny
from tests.parity.reference import peft_pair, peft_parameters, token_losses, torch

pytestmark = pytest.mark.parity

STEPS, WARMUP, RATE, DECAY, MAX_NORM = 20, 5, 2e-2, 0.1, 0.5
MODELS = {
    "llama": tiny.llama(),
    "llama, multi-head, tied head": tiny.llama(num_key_value_heads=4, tie_word_embeddings=True),
    "mistral": tiny.mistral(),
    "qwen2": tiny.qwen2(),
    "qwen3": tiny.qwen3(),
    "gpt2": tiny.gpt2(),
}
CONFIG = ml.LoraConfig(r=4, alpha=8)


def micro_batches(step: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Three batches of other sizes; the second has few labels, so that a mean of means would be another number."""
    shapes = ((2, 9), (1, 5), (3, 7))
    batches = [tiny.labelled(rows, time, seed=3 * (step % 4) + index) for index, (rows, time) in enumerate(shapes)]
    batches[1][1][:, :-1] = -100
    return batches


def rate(step: int) -> float:
    """The learning rate, written out a second time."""
    if step < WARMUP:
        return RATE * (step + 1) / (WARMUP + 1)
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def train_here(model: ml.Model) -> tuple[list[float], list[float]]:
    """Losses and gradient norms before clipping, step by step."""
    optimiser = ml.AdamW(model.adapter_parameters("a"), lr=RATE, weight_decay=DECAY)
    step = ml.TrainStep(model, optimiser, max_grad_norm=MAX_NORM)
    factor = ml.schedule("cosine", STEPS, WARMUP)
    losses, norms = [], []
    for number in range(STEPS):
        optimiser.lr = RATE * factor(number)
        losses.append(float(step.gradients(micro_batches(number))))
        step.update()
        norms.append(float(step.grad_norm))
    return losses, norms


def train_there(model: object) -> tuple[list[float], list[float]]:
    parameters = list(peft_parameters(model).values())
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    losses, norms = [], []
    for number in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = rate(number)
        batches = micro_batches(number)
        total = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches)
        optimiser.zero_grad()
        loss = 0.0
        for tokens, labels in batches:
            part = token_losses(model, tokens, labels) / total
            part.backward()
            loss += part.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)))
        optimiser.step()
        losses.append(loss)
    return losses, norms


def compare(ours: ml.Model, theirs: object, tolerance: float) -> None:
    losses, norms = train_here(ours)
    expected, expected_norms = train_there(theirs)
    assert losses == pytest.approx(expected, rel=tolerance)
    assert norms == pytest.approx(expected_norms, rel=20 * tolerance)
    assert norms[0] > MAX_NORM  # clipped
    assert losses[-4] < 0.8 * losses[0]  # the same batch as at first: it was learnt
    final = peft_parameters(theirs)
    for key, tensor in ours.adapter_parameters("a").items():
        assert tiny.relative_error(tensor.data, final[key].detach()) < 100 * tolerance, key


@pytest.mark.parametrize("model", MODELS)
def test_twenty_float32_steps_have_the_losses_of_torch(model, checkpoint):
    compare(*peft_pair(checkpoint(MODELS[model], "float32"), CONFIG, "float32", zero_B=True), tolerance=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_twenty_float64_steps_have_the_losses_of_torch(model, checkpoint, float64_transformers):
    compare(*peft_pair(checkpoint(MODELS[model]), CONFIG, zero_B=True), tolerance=1e-10)
