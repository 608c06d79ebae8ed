"""llama.cpp itself runs what is written here: its probabilities are ours, for bases, adapters and merged models.

Against float32 files the differences are rounding: 1e-5 of the log-probabilities' norm, and for GPT-2, whose GELU
llama.cpp looks up in a float16 table on a CPU, 3e-4. For SmolLM2 the bounds are on a token's ln p, which the adapter
moves by more than 1 on average. F16 (0.05 at most, 0.01 on average): llama.cpp rounds activations to float16 too. Q4_1
and Q8_0 (0.25 on average): it rounds activations to 8 bits, 32 to a block, and this small model answers by 0.1.
"""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest

import minilora as ml
from minilora.formats import gguf_adapter
from minilora.formats.checkpoint import find_model
from tests import texts, tiny
from tests.formats.test_gguf_adapter import PLAIN, write
from tests.formats.test_gguf_vocabulary import TEXTS, sentencepiece
from tests.formats.test_gguf_write import SWITCHES, model
from tests.formats.test_mlx import of_family
from tests.parity.llama_cpp import LlamaCpp, log_probabilities, token_log_probabilities

pytestmark = pytest.mark.parity

FULL = {"sliding_window": None, "use_sliding_window": False}  # llama.cpp has no window for these families
BOUNDS = {"gpt2": 3e-4}


def error(llama_cpp: LlamaCpp, network: ml.Model, length: int = 12) -> float:
    """‖theirs − ours‖ / ‖ours‖ of the log-probabilities of all tokens behind a random text."""
    tokens = np.random.default_rng(1).integers(0, texts.MERGED, length)
    ours = log_probabilities(network, tokens)[-1]
    return tiny.relative_error(llama_cpp.log_probabilities(tokens, printable=ord("a")), ours)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tiny_model_of_each_family_has_our_log_probabilities(tmp_path, family):
    network = model(family, **FULL)
    for name, parameter in network.network.named_parameters():
        if name.endswith("bias"):
            parameter.data = np.random.default_rng(0).normal(0, 0.3, parameter.shape).astype(np.float32)
    network.save_gguf(tmp_path / "m.gguf", "f32")
    assert error(LlamaCpp(tmp_path / "m.gguf", context=64), network) < BOUNDS.get(family, 1e-5)


@pytest.mark.parametrize("changes", SWITCHES)
def test_the_switches_of_a_llama_s_config_reach_llama_cpp(tmp_path, changes):
    network = model(**changes)
    for name, parameter in network.network.named_parameters():
        if name.endswith("bias"):
            parameter.data = np.random.default_rng(0).normal(0, 0.3, parameter.shape).astype(np.float32)
    network.save_gguf(tmp_path / "m.gguf", "f32")
    assert error(LlamaCpp(tmp_path / "m.gguf", context=64), network, length=40) < 1e-5


@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_adapter_on_each_family_has_our_log_probabilities(tmp_path, family, config):
    network = model(family, **FULL)
    network.save_gguf(tmp_path / "m.gguf", "f32")
    tiny.add_random_adapter(network, "a", of_family(family, config))
    for key, tensor in network.adapter_parameters("a").items():
        tensor.data *= 0.3 if "lora_B" in key else 1.0
    write(network, tmp_path / "a.gguf")
    adapted = LlamaCpp(tmp_path / "m.gguf", [tmp_path / "a.gguf"], context=64)
    assert error(adapted, network) < BOUNDS.get(family, 2e-5)
    network.set_adapter(None)
    assert error(adapted, network) > 0.01


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_embedding_and_head_with_an_adapter_have_our_log_probabilities(tmp_path, targets):
    network = model()
    network.save_gguf(tmp_path / "m.gguf", "f32")
    tiny.add_random_adapter(network, "a", ml.LoraConfig(r=3, alpha=6, target_modules=targets))
    write(network, tmp_path / "a.gguf")
    assert error(LlamaCpp(tmp_path / "m.gguf", [tmp_path / "a.gguf"], context=64), network) < 2e-5


@pytest.mark.parametrize("words", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default", "sentencepiece"])
def test_llama_cpp_s_tokens_are_those_of_the_tokenizer(tmp_path, words):
    if words == "sentencepiece":
        tokenizer = sentencepiece()
    else:
        tokenizer = texts.merging_tokenizer(words, ignore_merges=words == "llama-bpe")
    network = model(vocab_size=tokenizer.vocab_size)
    network.tokenizer = tokenizer
    network.save_gguf(tmp_path / "m.gguf", "f16")
    llama_cpp = LlamaCpp(tmp_path / "m.gguf", context=64)
    for text in TEXTS:
        if text and not (words == "sentencepiece" and "<" in text):
            assert asked(llama_cpp, "tokenize", content=text, add_special=True)["tokens"] == tokenizer.encode(text), (
                text
            )


def asked(llama_cpp: LlamaCpp, what: str, **request) -> dict:
    """The answer of llama-server at /what."""
    body = json.dumps(request).encode()
    address = f"{llama_cpp.server.listening_address}/{what}"
    message = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(message) as answer:
        return json.loads(answer.read())


# ---------------------------------------------------------------- SmolLM2

COUNT = 10
TEXT = "The capital of France is Paris, and the river that runs through it is the Seine. Its tower was built in 1889."


@pytest.fixture(scope="module")
def adapted(smollm2_adapter) -> ml.Model:
    """SmolLM2 under its trained adapter, "a"."""
    network = ml.load_model("smollm2")
    network.load_adapter("a", smollm2_adapter)
    return network


@pytest.fixture(scope="module")
def tokens(adapted) -> list[int]:
    return adapted.tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def ours(adapted, tokens) -> np.ndarray:
    """ln p of the text's tokens under the adapter."""
    adapted.set_adapter("a")
    return token_log_probabilities(adapted, tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llama.cpp")


@pytest.fixture(scope="module")
def f16_base(folder, adapted):
    adapted.save_gguf(folder / "base.gguf", "f16")
    return folder / "base.gguf"


@pytest.fixture(scope="module")
def adapter(folder, adapted):
    write(adapted, folder / "adapter.gguf")
    return folder / "adapter.gguf"


def assert_close(found: np.ndarray, ours: np.ndarray, dtype: str) -> None:
    """The bounds that are given at the head of this file."""
    difference = np.abs(found - ours)
    if dtype == "f16":
        assert difference.max() < 0.05
    assert difference.mean() < (0.01 if dtype == "f16" else 0.25)


@pytest.mark.slow
def test_the_adapter_on_a_base_written_here_says_what_it_says_here(f16_base, adapter, adapted, tokens, ours):
    llama_cpp = LlamaCpp(f16_base, [adapter])
    found = llama_cpp.token_log_probabilities(tokens)
    assert_close(found, ours, "f16")
    prompt = TEXT[:24]
    assert llama_cpp.text(prompt, COUNT) == adapted.generate(prompt, COUNT)
    adapted.set_adapter(None)
    base = token_log_probabilities(adapted, tokens)
    assert np.abs(ours - base).mean() > 1
    assert llama_cpp.text(prompt, COUNT) != adapted.generate(prompt, COUNT)
    adapted.set_adapter("a")


@pytest.mark.slow
def test_the_adapter_on_the_file_that_was_trained_on_says_what_it_says_here(adapter, adapted, tokens, ours):
    llama_cpp = LlamaCpp(find_model("smollm2"), [adapter])
    assert_close(llama_cpp.token_log_probabilities(tokens), ours, "q4_1")
    prompt = TEXT[:24]
    assert llama_cpp.text(prompt, COUNT) == adapted.generate(prompt, COUNT)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["rows as they are", "twice alpha"])
def test_a_wrong_row_order_or_alpha_would_be_noticed(f16_base, folder, adapted, tokens, ours, monkeypatch, wrong):
    if wrong == "twice alpha":
        monkeypatch.setattr(gguf_adapter, "most_common", lambda values: 2 * values[0])
        monkeypatch.setattr(gguf_adapter.Update, "scaled_to", lambda update, scale: update)
    else:
        monkeypatch.setattr(gguf_adapter, "permute_rows", lambda rows, heads: rows)
    write(adapted, folder / "wrong.gguf")
    found = LlamaCpp(f16_base, [folder / "wrong.gguf"]).token_log_probabilities(tokens)
    assert np.abs(found - ours).mean() > 0.1  # ten times the bound


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_the_merged_model_says_what_base_and_adapter_say_here(folder, adapted, tokens, ours, dtype):
    prompt = TEXT[:24]
    completion = adapted.generate(prompt, COUNT)
    adapted.merge_adapter("a")
    adapted.save_gguf(folder / f"{dtype}.gguf", dtype)
    adapted.unmerge_adapter()
    adapted.set_adapter("a")
    llama_cpp = LlamaCpp(folder / f"{dtype}.gguf")
    assert_close(llama_cpp.token_log_probabilities(tokens), ours, dtype)
    assert llama_cpp.text(prompt, COUNT) == completion
    read = ml.load_model(folder / f"{dtype}.gguf")
    assert_close(token_log_probabilities(read, tokens), ours, dtype)
    assert read.generate(prompt, COUNT) == completion


@pytest.mark.slow
def test_smollm2_s_tokens_and_chats_are_the_same_in_llama_cpp(f16_base, adapted):
    llama_cpp = LlamaCpp(f16_base)
    for text in TEXTS:
        if text:
            answer = asked(llama_cpp, "tokenize", content=text, add_special=True)
            assert answer["tokens"] == adapted.tokenizer.encode(text)
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    assert asked(llama_cpp, "apply-template", messages=chat)["prompt"] == adapted.tokenizer.apply_chat_template(chat)
