"""Generation: continue a prompt token by token with a KV cache, greedily or by sampling, alone, in batches or streamed.

    generate(model, prompt)             text or chat messages -> text; token ids -> the list of new ids
    generate_batch(model, prompts)      many prompts at once: entry i is what generate(model, prompts[i]) gives
    stream_text(model, prompt)          the same text piece by piece, as it comes

Every pass runs under the adapters that were selected when it started, without recording. Left out: beam search and
speculative decoding.

Axes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .backend import Array, array_module, to_numpy
from .errors import MiniloraError
from .models import CausalLM, KVCache
from .models.decoding import decode, decoder_for
from .tensor import no_grad

PREFILL = 512  # positions of a prompt in one pass: bounds the memory that attention takes on a long prompt
CONTEXT_TOKENS = 8  # tokens of the prompt behind which new ones are decoded: a leading space depends on what is before

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray
Stop = str | int | Sequence[str | int] | None


def generate(
    model: Any,
    prompt: Prompt,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: Stop = None,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
) -> str | list[int]:
    """Continue `prompt`: the new text for a text or chat messages, the list of new ids for token ids (1-D).

    temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature), after
    top_k and top_p: see `next_distribution`. seed: same seed, same draws; None draws afresh.
    stop: token ids and strings that end the completion and are no part of it; None: the model's end tokens (see
    `end_tokens`); a list is all that stops, so [] ignores those. A string may begin and end inside of tokens.
    stream: called with each piece of new text that is complete (whole characters, surely before a stop string).
    Raises MiniloraError for an empty prompt, one that does not fit the context with max_new_tokens, or bad options.
    """
    settings = Settings.checked(model, max_new_tokens, temperature, top_k, top_p, stop, seed)
    completion = _Completion(model, prompt, settings, needs_text=stream is not None)
    for _, piece in _run(model, [completion], _rows_of(model, 1)):
        if stream is not None and piece:
            stream(piece)
    return completion.result()


def stream_text(model: Any, prompt: Prompt, max_new_tokens: int = 128, **options: Any) -> Iterator[str]:
    """The new text piece by piece: together what `generate` returns for the same text and options (but `stream`).

    Bad input raises here, before the first piece is asked for.
    """
    settings = Settings.checked(model, max_new_tokens, **options)
    completion = _Completion(model, prompt, settings, needs_text=True)
    steps = _run(model, [completion], _rows_of(model, 1))
    return (piece for _, piece in steps if piece)


def generate_batch(
    model: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> list[str | list[int]]:
    """Continue many prompts, `batch_size` at a time: entry i is generate(model, prompts[i], ...), to rounding.

    Prompts of similar length run together; shorter ones are filled up on the left with positions that nothing attends
    to. With set_adapter(rows=...), rows[i] is the adapter of prompt i. options: those of `generate` but `stream`.
    progress: called with the number of completions that have just ended.
    """
    if batch_size < 1:
        raise MiniloraError(f"batch_size is {batch_size}, expected at least 1")
    settings = Settings.checked(model, max_new_tokens, **options)
    rows = _rows_of(model, len(prompts))
    completions = []
    for number, prompt in enumerate(prompts):
        try:
            completions.append(_Completion(model, prompt, settings))
        except MiniloraError as error:
            raise MiniloraError(f"prompt {number}: {error}") from None
    longest_first = sorted(range(len(prompts)), key=lambda number: -len(completions[number].prompt))
    for start in range(0, len(prompts), batch_size):
        members = longest_first[start : start + batch_size]
        batch = [completions[number] for number in members]
        for completion, _ in _run(model, batch, None if rows is None else [rows[number] for number in members]):
            if progress is not None and completion.done:
                progress(1)
    return [completion.result() for completion in completions]


def end_tokens(model: Any) -> list[int]:
    """The ids that end a completion: the tokenizer's, those of generation_config.json and those of config.json."""
    found: set[int] = set(model.tokenizer.eos_token_ids) if model.tokenizer is not None else set()
    for config in (model.generation_config, model.config.raw):
        value = config.get("eos_token_id")
        found.update(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))
    return sorted(token for token in found if 0 <= token < model.config.vocab_size)  # others never come


# --- options --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The options of `generate`, checked, with `stop` resolved into ids and strings."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    seed: int | None

    @classmethod
    def checked(
        cls,
        model: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Stop = None,
        seed: int | None = None,
    ) -> Settings:
        """MiniloraError for a value outside its range."""
        if not _is_whole(max_new_tokens) or max_new_tokens < 1:
            raise MiniloraError(f"max_new_tokens is {max_new_tokens!r}, expected a whole number of at least 1")
        if not 0 <= temperature < math.inf:
            raise MiniloraError(
                f"temperature is {temperature!r}, expected a finite number from 0 (greedy) up, e.g. 0.7"
            )
        if top_k is not None and (not _is_whole(top_k) or top_k < 1):
            raise MiniloraError(f"top_k is {top_k!r}, expected a whole number of at least 1, or none")
        if not 0 < top_p <= 1:
            raise MiniloraError(f"top_p is {top_p!r}, expected more than 0 and at most 1, e.g. 0.9")
        if seed is not None and (not _is_whole(seed) or seed < 0):
            raise MiniloraError(f"seed is {seed!r}, expected a whole number from 0 up, or none")
        ids, strings = _stops(model, stop)
        return cls(max_new_tokens, temperature, top_k, top_p, ids, strings, seed)


def _stops(model: Any, stop: Stop) -> tuple[frozenset[int], tuple[str, ...]]:
    """The ids and the strings of `stop`. A string that is a special token's stops at its id: text never shows it."""
    if stop is None:
        return frozenset(end_tokens(model)), ()
    ids: set[int] = set()
    strings: list[str] = []
    for item in [stop] if isinstance(stop, str | int) else stop:
        if isinstance(item, str) and item:
            if model.tokenizer is None:
                raise MiniloraError(f"stop has the string {item!r}, but the model has no tokenizer: give token ids")
            encoded = model.tokenizer.encode(item, add_special_tokens=False)
            if len(encoded) == 1 and not model.tokenizer.decode(encoded):
                ids.add(encoded[0])
            else:
                strings.append(item)
        elif _is_whole(item) and 0 <= int(item) < model.config.vocab_size:
            ids.add(int(item))
        else:
            raise MiniloraError(
                f"stop has {item!r}, expected texts that are not empty and token ids below {model.config.vocab_size}"
            )
    return frozenset(ids), tuple(strings)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def prompt_ids(model: Any, prompt: Prompt) -> tuple[list[int], bool]:
    """A prompt's token ids, and whether its completion is text: (ids, True) for a text or chat messages.

    Raises MiniloraError for an empty prompt and for what is neither.
    """
    if not isinstance(prompt, str | np.ndarray) and not isinstance(prompt, Sequence):
        raise MiniloraError(
            f"the prompt is a {type(prompt).__name__}, expected a text, chat messages or a list of token ids"
        )
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if isinstance(prompt, str) or is_chat:
        if model.tokenizer is None:
            raise MiniloraError("the prompt is text, but the model has no tokenizer: give token ids")
        if isinstance(prompt, str):
            ids = model.tokenizer.encode(prompt)
        else:
            ids = model.tokenizer.encode(model.tokenizer.apply_chat_template(prompt), add_special_tokens=False)
    else:
        array = np.asarray(prompt)
        if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
            raise MiniloraError(
                f"the prompt has shape {array.shape} and dtype {array.dtype}, expected a text, chat messages or a 1-D "
                "list of token ids"
            )
        ids = array.tolist()
    if not ids:
        raise MiniloraError("the prompt is empty: expected at least one token to continue from")
    if min(ids) < 0 or max(ids) >= model.config.vocab_size:
        raise MiniloraError(
            f"the prompt's token ids must lie in 0 … {model.config.vocab_size - 1}, found {min(ids)} … {max(ids)}: "
            "is the tokenizer another model's?"
        )
    return ids, isinstance(prompt, str) or is_chat


# --- one completion -------------------------------------------------------------------------------------------------


class _Completion:
    """A completion in progress: its new ids, the text given out so far, and whether it has ended."""

    def __init__(self, model: Any, prompt: Prompt, settings: Settings, needs_text: bool = False) -> None:
        self.prompt, self.is_text = prompt_ids(model, prompt)
        total, context = len(self.prompt) + settings.max_new_tokens, model.config.max_position_embeddings
        if total > context:
            raise MiniloraError(
                f"the prompt's {len(self.prompt)} tokens and max_new_tokens {settings.max_new_tokens} make {total}, "
                f"over the model's context of {context}: shorten the prompt or lower max_new_tokens"
            )
        self.settings = settings
        self.random = np.random.default_rng(settings.seed)
        self.ids: list[int] = []
        self.done = False
        self.text: _Text | None = None
        if self.is_text or needs_text or settings.stop_strings:
            if model.tokenizer is None:
                raise MiniloraError("streaming gives text, but the model has no tokenizer")
            decoder = model.tokenizer.stream_decoder()
            for token in self.prompt[-CONTEXT_TOKENS:]:
                decoder.push(token)
            self.text = _Text(decoder, settings.stop_strings)

    def push(self, token: int) -> str:
        """Take the next token; the text that can be given out now."""
        if token in self.settings.stop_ids:
            return self._end()
        self.ids.append(token)
        piece = "" if self.text is None else self.text.push(token)
        if self.text is not None and self.text.stopped_after is not None:
            self.ids = self.ids[: self.text.stopped_after]
            self.done = True
        elif len(self.ids) == self.settings.max_new_tokens:
            return piece + self._end()
        return piece

    def _end(self) -> str:
        self.done = True
        if self.text is None:
            return ""
        piece = self.text.flush()
        if self.text.stopped_after is not None:
            self.ids = self.ids[: self.text.stopped_after]
        return piece

    def result(self) -> str | list[int]:
        return self.text.given if self.is_text and self.text is not None else self.ids


@dataclass
class _Text:
    """The text of tokens that arrive one by one, up to the first stop string.

    given: what was handed out. held: complete text that may be the beginning of a stop string. boundaries: after how
    many tokens the text had which length. stopped_after: once a stop string was found, how many tokens lie before it.
    """

    decoder: Any
    stops: tuple[str, ...]
    given: str = ""
    held: str = ""
    tokens: int = 0
    boundaries: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    stopped_after: int | None = None

    def push(self, token: int) -> str:
        self.tokens += 1
        return self._take(self.decoder.push(token), at_end=False)

    def flush(self) -> str:
        return self._take(self.decoder.flush(), at_end=True)

    def _take(self, new: str, at_end: bool) -> str:
        text = self.held + new
        if new:
            self.boundaries.append((self.tokens, len(self.given) + len(text)))
        found = [position for stop in self.stops if (position := text.find(stop)) >= 0]
        if found:
            ready, self.held = text[: min(found)], ""
            end = len(self.given) + len(ready)
            self.stopped_after = max(tokens for tokens, length in self.boundaries if length <= end)
        else:
            kept = 0 if at_end else max((_overlap(text, stop) for stop in self.stops), default=0)
            ready, self.held = text[: len(text) - kept], text[len(text) - kept :]
        self.given += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    return next(length for length in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:length]))


# --- the loop -------------------------------------------------------------------------------------------------------


def _rows_of(model: Any, count: int) -> list[str | None] | None:
    """The adapter of each of `count` prompts where set_adapter(rows=...) names them, else None."""
    rows = model.network.adapter_state.selection.rows
    if rows is not None and len(rows) != count:
        raise MiniloraError(f"set_adapter(rows=...) names {len(rows)} rows, and there are {count} prompts")
    return None if rows is None else list(rows)


def _run(
    model: Any, completions: list[_Completion], rows: list[str | None] | None
) -> Iterator[tuple[_Completion, str]]:
    """Decode a batch to its end, giving (completion, its new text) for every token of every sequence.

    Where lengths differ, prompts are filled up on the left with segment 0 and are segment 1 themselves: positions
    count from a prompt's first token, and nothing attends to the filling. Sequences that have ended leave the batch
    when they are half of it, so that all the copying of the cache together moves less than the cache once.
    """
    pass_ = _Pass(model.network, rows)
    longest = max(len(completion.prompt) for completion in completions)
    tokens = np.zeros((len(completions), longest), np.int64)
    segments = np.ones_like(tokens)
    for row, completion in enumerate(completions):
        tokens[row, longest - len(completion.prompt) :] = completion.prompt
        segments[row, : longest - len(completion.prompt)] = 0
    cache = KVCache(len(model.network.blocks), longest + completions[0].settings.max_new_tokens)
    batch = list(completions)
    logits = pass_.prefill(tokens, None if segments.all() else segments, cache)
    while True:
        chosen = next_tokens(logits, batch)
        for completion, token in zip(batch, chosen.tolist(), strict=True):
            if not completion.done:
                yield completion, completion.push(token)
        going = [row for row, completion in enumerate(batch) if not completion.done]
        if not going:
            return
        if len(going) <= len(batch) // 2:
            batch, chosen = [batch[row] for row in going], chosen[going]
            cache.keep(going)
            pass_.keep(going)
        logits = pass_.step(chosen[:, None], cache)


class _Pass:
    """Forward passes under the adapters that were selected at the start, with the rows that are left."""

    def __init__(self, network: CausalLM, rows: list[str | None] | None) -> None:
        self.network, self.rows = network, rows
        self.selection = network.adapter_state.selection
        self.segments: np.ndarray | None = None
        self.decoder: Any = None  # the kernel for steps, made for the sequences that are left
        self.decodes = 0  # how many sequences that was looked for with

    def prefill(self, tokens: np.ndarray, segments: np.ndarray | None, cache: KVCache) -> Array:
        """The whole prompts (B, T) into the cache, in parts; the logits (B, V) after the last position."""
        for start in range(0, tokens.shape[1], PREFILL):
            stop = min(start + PREFILL, tokens.shape[1])
            self.segments = None if segments is None else segments[:, :stop]
            logits = self._forward(tokens[:, start:stop], cache, last=stop == tokens.shape[1])
        return logits

    def step(self, tokens: np.ndarray, cache: KVCache) -> Array:
        """One more token for every row, (B, 1) -> logits (B, V)."""
        if self.segments is not None:
            self.segments = np.pad(self.segments, ((0, 0), (0, 1)), constant_values=1)
        with self._selected():
            if self.decodes != len(tokens):
                self.decoder, self.decodes = decoder_for(self.network, len(tokens)), len(tokens)
            if self.decoder is not None:
                return decode(self.network, self.decoder, tokens, self.segments, cache)
        return self._forward(tokens, cache, last=True)

    def keep(self, rows: list[int]) -> None:
        if self.segments is not None:
            self.segments = self.segments[rows]
        if self.rows is not None:
            self.rows = [self.rows[row] for row in rows]

    def _forward(self, tokens: np.ndarray, cache: KVCache, last: bool) -> Array:
        with self._selected():
            if last:
                return self.network.logits(tokens, self.segments, cache, last=True).data[:, -1]
            return self.network.hidden(tokens, self.segments, cache).data

    @contextmanager
    def _selected(self) -> Iterator[None]:
        """Inside, the adapters that were selected at the start hold, without dropout, and nothing is recorded."""
        state = self.network.adapter_state
        before, rows = state.selection, None if self.rows is None else tuple(self.rows)
        state.selection = replace(self.selection, rows=rows, dropout_pass=None)
        try:
            with no_grad():
                yield
        finally:
            state.selection = before


# --- choosing a token -----------------------------------------------------------------------------------------------


def next_tokens(logits: Array, completions: Sequence[_Completion]) -> np.ndarray:
    """The next token of each sequence, the likeliest or a drawn one: logits (B, V) -> (B,) on the host."""
    best = logits.argmax(axis=-1)
    top = to_numpy(logits[array_module(logits).arange(len(logits)), best]).astype(np.float64)
    if not np.isfinite(top).all():  # argmax gives a NaN's place where there is one
        raise MiniloraError(
            "the model's logits are not finite (NaN or infinite): its weights, or an adapter's, are damaged, or the "
            "dtype is too narrow for them; try dtype float32"
        )
    chosen = to_numpy(best).astype(np.int64)
    settings = completions[0].settings
    if settings.temperature > 0:
        for row, values in enumerate(to_numpy(logits)):
            tokens, probabilities = next_distribution(values, settings.temperature, settings.top_k, settings.top_p)
            chosen[row] = draw(tokens, probabilities, completions[row].random)
    return chosen


def next_distribution(
    logits: np.ndarray, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may come next, likeliest first, and their probabilities softmax(logits / temperature), float64.

    top_k keeps the k largest logits (and all that equal the k-th). Of what is left, renormalised, top_p keeps the
    fewest tokens, likeliest first, whose probabilities sum to at least top_p (Holtzman et al. 2020, "The curious case
    of neural text degeneration", section 3.1). The order of the two, and of temperature, is that of transformers.
    """
    scaled = logits.astype(np.float64) / temperature
    tokens = np.arange(len(scaled))
    if top_k is not None and top_k < len(scaled):
        tokens = np.flatnonzero(scaled >= np.partition(scaled, -top_k)[-top_k])
    tokens = tokens[np.argsort(-scaled[tokens], kind="stable")]
    probabilities = np.exp(scaled[tokens] - scaled[tokens[0]])
    probabilities /= probabilities.sum()
    if top_p < 1:
        count = 1 + int(np.searchsorted(np.cumsum(probabilities), top_p))  # the first sum that reaches top_p ends it
        tokens, probabilities = tokens[:count], probabilities[:count] / probabilities[:count].sum()
    return tokens, probabilities


def draw(tokens: np.ndarray, probabilities: np.ndarray, random: np.random.Generator) -> int:
    """One of `tokens` by inversion of the cumulative distribution: one uniform number for each token drawn."""
    cumulative = np.cumsum(probabilities)
    position = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    return int(tokens[min(position, len(tokens) - 1)])
