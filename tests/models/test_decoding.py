"""The CPU's kernel for decoding is the network, for every family, kind of selection, padding and window."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.kernels.cpu import decode as kernel
from minilora.models import KVCache
from minilora.models.decoding import MOST_SEQUENCES, decode, decoder_for
from minilora.tensor import definitions_only, no_grad
from tests import tiny

DECODED = {name: config for name, config in tiny.FAMILIES.items() if name != "gpt2"}
DECODED["biased"] = tiny.llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
LINEARS = {"all": "all-linear", "some": ["q_proj", "v_proj", "down_proj"], "head": ["k_proj", "lm_head"]}
PROMPT, STEPS = 6, 5


def made(config: dict, linears: str | list[str], dtype: str = "float64") -> ml.Model:
    model = ml.new_model(config, dtype=dtype, std=0.3)
    for seed, rank in enumerate((3, 2)):
        tiny.add_random_adapter(model, "ab"[seed], ml.LoraConfig(r=rank, alpha=6, target_modules=linears), seed)
    for name, parameter in model.network.named_parameters():
        if name.endswith("bias"):
            parameter.data[...] = np.random.default_rng(0).normal(0, 0.3, parameter.shape)
    return model


SELECTIONS = {
    "base": {"which": None},
    "one": {"which": "a"},
    "sum": {"which": {"a": 0.5, "b": -1.5}},
    "rows": {"rows": ["b", None, "a"]},
}


def decoded(model: ml.Model, tokens: np.ndarray, segments: np.ndarray | None) -> np.ndarray:
    """The logits of the tokens after the prompt, each from the kernel."""
    network, cache = model.network, KVCache(2, PROMPT + STEPS)
    found = []
    with no_grad():
        network.hidden(tokens[:, :PROMPT], None if segments is None else segments[:, :PROMPT], cache)
        decoder = decoder_for(network, len(tokens))
        assert decoder is not None
        for end in range(PROMPT + 1, PROMPT + STEPS + 1):
            seen = None if segments is None else segments[:, :end]
            found.append(decode(network, decoder, tokens[:, end - 1 : end], seen, cache))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", DECODED)
@given(
    linears=st.sampled_from(sorted(LINEARS)),
    dtype=st.sampled_from(("float64", "float32")),
    padding=st.sampled_from((None, (0, 0, 0), (2, 0, 5))),
    stacked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_step_of_the_kernel_is_a_step_of_the_network(family, selection, linears, dtype, padding, stacked, seed):
    model = made(DECODED[family], LINEARS[linears], dtype)
    model.set_adapter(**SELECTIONS[selection])
    tokens = tiny.tokens(3, PROMPT + STEPS, seed)
    segments = None
    if padding is not None:
        segments = (np.arange(PROMPT + STEPS) >= np.array(padding)[:, None]).astype(int)
    patch = pytest.MonkeyPatch()
    patch.setattr(kernel, "THREADED_ENTRIES", 100 if stacked else 10**9)
    with patch.context():
        found = decoded(model, tokens, segments)
    with definitions_only():
        expected = model.logits(tokens, segments)[:, PROMPT:]
    patch.undo()
    assert tiny.relative_error(found, expected) < (1e-11 if dtype == "float64" else 1e-5)


def test_one_sequence_is_decoded_as_in_a_batch():
    model = made(tiny.llama(), "all-linear")
    model.set_adapter("a")
    tokens = tiny.tokens(1, PROMPT + STEPS)
    assert tiny.relative_error(decoded(model, tokens, None), model.logits(tokens)[:, PROMPT:]) < 1e-11


def test_generation_uses_the_kernel_and_says_the_same(monkeypatch):
    model = made(tiny.llama(), "all-linear")
    prompt, steps = tiny.tokens(1, 4)[0].tolist(), []
    step = kernel.Decoder.step
    monkeypatch.setattr(kernel.Decoder, "step", lambda *arguments: steps.append(1) or step(*arguments))
    found = model.generate(prompt, max_new_tokens=9, stop=[])
    assert len(steps) == 8, "the first token comes from the prompt's pass"
    with definitions_only():
        assert model.generate(prompt, max_new_tokens=9, stop=[]) == found
    assert len(steps) == 8


@pytest.mark.parametrize("reason", ["family", "definitions", "many", "dora", "narrow", "replaced"])
def test_what_the_kernel_does_not_compute_is_left_to_the_network(reason):
    model = tiny.model() if reason != "family" else ml.new_model(tiny.gpt2(), dtype="float64")
    if reason == "dora":
        model.add_adapter("d", ml.LoraConfig(use_dora=True))
    if reason == "narrow":
        weight = model.network.blocks[1].mlp.up_proj.weight
        weight.data = weight.data.astype(np.float16)
    if reason == "replaced":
        block = model.network.blocks[0]
        block.mlp = type("Other", (type(block.mlp),), {"forward": lambda self, x: x})(model.config, Filled())
    with definitions_only() if reason == "definitions" else nullcontext():
        assert decoder_for(model.network, MOST_SEQUENCES + 1 if reason == "many" else 1) is None
    assert decoder_for(tiny.model().network, 1) is not None


class Filled:
    """Weights of ones, for a part that is made by hand."""

    def at(self, part: str) -> Filled:
        return self

    def take(self, name: str, *shape: int) -> ml.Tensor:
        return ml.Tensor(np.ones(shape))
