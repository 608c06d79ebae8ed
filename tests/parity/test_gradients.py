"""The gradient of every adapter tensor against torch's autograd through PEFT, in float64 to 1e-9 in relative norm.

A family is a line in MODELS, a way to adapt is a line in ADAPTERS.
"""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from tests import tiny
from tests.parity.reference import peft_pair, peft_parameters, token_losses, torch

pytestmark = pytest.mark.parity

MODELS = {
    "llama": tiny.llama(),
    "llama, multi-head, tied head": tiny.llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama, biases, wide heads": tiny.llama(attention_bias=True, mlp_bias=True, head_dim=10),
    "mistral": tiny.mistral(),
    "qwen2": tiny.qwen2(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": tiny.qwen3(),
    "gpt2": tiny.gpt2(),
}
ADAPTERS = {
    "all linear": ml.LoraConfig(r=3, alpha=7),
    "rank over the widths": ml.LoraConfig(r=50, alpha=16, target_modules=["k_proj", "down_proj"]),
    "rslora": ml.LoraConfig(r=4, alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "patterns": ml.LoraConfig(r=2, alpha=4, rank_pattern={"layers.1.*q_proj": 5}, alpha_pattern={"mlp.up_proj": 3}),
    "one layer": ml.LoraConfig(r=2, alpha=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "regular expression": ml.LoraConfig(r=2, alpha=4, target_modules=r".*\.0\.mlp\.(up|down)_proj"),
    "head": ml.LoraConfig(r=2, alpha=4, target_modules=["lm_head", "o_proj"]),
}
CASES = [
    *((model, "all linear") for model in MODELS),
    *(("llama", adapter) for adapter in ADAPTERS if adapter != "all linear"),
]
TOLERANCE = 1e-9


def compare(ours: ml.Model, theirs: object) -> None:
    """Each tensor's `.grad` here against torch's."""
    mine, parameters = ours.adapter_parameters("a"), peft_parameters(theirs)
    errors = {key: tiny.relative_error(tensor.grad, parameters[key].grad) for key, tensor in mine.items()}
    assert all(parameter.grad.norm() > 0 for parameter in parameters.values())  # so that every error is a relative one
    assert max(errors.values()) < TOLERANCE, {key: error for key, error in errors.items() if error >= TOLERANCE}


@pytest.mark.parametrize(("model", "adapter"), CASES)
def test_gradients_are_those_of_torch(model, adapter, checkpoint, float64_transformers):
    ours, theirs = peft_pair(checkpoint(MODELS[model]), ADAPTERS[adapter])
    tokens, labels = tiny.labelled(3, 9)
    loss = ours.loss(tokens, labels)
    loss.backward()
    expected = theirs(torch.from_numpy(tokens), labels=torch.from_numpy(labels), use_cache=False).loss
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    compare(ours, theirs)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_with_checkpointing_are_those_of_torch(model, checkpoint, float64_transformers):
    ours, theirs = peft_pair(checkpoint(MODELS[model]), ADAPTERS["all linear"])
    ours.checkpoint = True
    tokens, labels = tiny.labelled(3, 9)
    ours.loss(tokens, labels).backward()
    theirs(torch.from_numpy(tokens), labels=torch.from_numpy(labels), use_cache=False).loss.backward()
    compare(ours, theirs)


def test_gradients_of_packed_sequences_are_those_of_separate_ones_in_torch(checkpoint, float64_transformers):
    ours, theirs = peft_pair(checkpoint(tiny.llama()), ADAPTERS["all linear"])
    sequences = [tiny.tokens(1, length, seed=length) for length in (6, 4)]
    packed = np.concatenate(sequences, axis=1)
    segments = np.array([[1] * 6 + [2] * 4])
    ours.loss(packed, segments=segments).backward()
    (sum(token_losses(theirs, sequence, sequence) for sequence in sequences) / (5 + 3)).backward()
    compare(ours, theirs)


def test_a_wrong_scale_would_be_seen(checkpoint, float64_transformers):
    """The comparison is sharp: an alpha that is off by one in a million fails it."""
    ours, theirs = peft_pair(checkpoint(tiny.llama()), ADAPTERS["all linear"])
    for layer in ours._adapters.layers("a").values():
        layer.scale *= 1 + 1e-6
    tokens = tiny.tokens(2, 6)
    ours.loss(tokens).backward()
    token_losses(theirs, tokens, tokens).backward()
    with pytest.raises(AssertionError):
        compare(ours, theirs)
