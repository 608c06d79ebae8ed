"""Turns a row into token ids and labels.

A row becomes pieces of text, each tokenised by itself, so that the boundary between what is given and what is learned
is a boundary between tokens, and a prompt has the ids that it will have when the model is used:

    text                 [text + end]                                    all of it learned
    prompt + completion  [begin + prompt] [completion + end]             the second learned
    messages             [up to "assistant\\n"] [turn + end of turn] ...  every second learned

`begin` is there if the tokenizer adds it by itself, `end` is its end-of-text id, if it has one. A chat template writes
its own. Left out: reading files (rows.py), counting what was dropped (dataset.py).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from ..errors import MiniloraError
from .rows import Row

IGNORED = -100  # label of a position where nothing is learned, as in Hugging Face

IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


class Tokenizer(Protocol):
    """What is asked of a tokenizer; `encode_batch(texts, add_special_tokens=False)` is used where there is one."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row of data as token ids.

    tokens: (T,) int32. labels: (T,) int32, the same ids, -100 where nothing is learned; not shifted.
    completion: the text that should follow `prompt_tokens`; None for text rows and where truncation cut the prompt.
    """

    tokens: IntArray
    labels: IntArray
    prompt_length: int = 0
    completion: str | None = None

    @property
    def label_count(self) -> int:
        """How many labels the loss counts: not the first one, since no token stands before it that could predict it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))

    @property
    def prompt_tokens(self) -> IntArray | None:
        """(prompt_length,) int32, what the model is given to produce `completion`; None where there is none.

        Of a conversation that is all before the last assistant turn.
        """
        return None if self.completion is None else self.tokens[: self.prompt_length]


class Piece(NamedTuple):
    """A stretch of text that is tokenised by itself."""

    text: str
    learned: bool


class Encoder:
    """Tokenises rows, many at a time."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._encode_batch = getattr(tokenizer, "encode_batch", None)
        letter = tokenizer.encode("a", add_special_tokens=False)
        with_special = tokenizer.encode("a", add_special_tokens=True)
        starts = range(len(with_special) - len(letter) + 1)
        self._begin = with_special[: next(s for s in starts if with_special[s : s + len(letter)] == letter)]
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # SentencePiece puts a space before any text that it is given, which is wrong in the middle of a row. There it
        # gets the piece after a line break, which never merges with what follows, and whose ids are cut off again.
        line_break = tokenizer.encode("\n", add_special_tokens=False)
        after_line_break = tokenizer.encode("\na", add_special_tokens=False)
        adds_space = after_line_break[: len(line_break)] == line_break and after_line_break != line_break + letter
        self._lead_in, self._lead_in_length = ("\n", len(line_break)) if adds_space else ("", 0)

    def examples(self, rows: list[Row], max_length: int, mask_prompt: bool) -> Iterator[tuple[Example, int]]:
        """For each row its example, cut on the right to max_length tokens, and the number of tokens before the cut."""
        pieces_of_rows = [row_pieces(row, self._tokenizer) for row in rows]
        texts = []
        for pieces in pieces_of_rows:
            lead_in = ""
            for text, _ in pieces:
                if text:
                    texts.append(lead_in + text)
                    lead_in = self._lead_in
        encoded = iter(self._encode(texts))
        for row, pieces in zip(rows, pieces_of_rows, strict=True):
            yield self._example(row, pieces, encoded, max_length, mask_prompt)

    def _encode(self, texts: list[str]) -> Iterable[list[int]]:
        if self._encode_batch is not None:
            ids: list[list[int]] = self._encode_batch(texts, add_special_tokens=False)
            return ids
        return (self._tokenizer.encode(text, add_special_tokens=False) for text in texts)

    def _example(
        self, row: Row, pieces: list[Piece], encoded: Iterator[list[int]], max_length: int, mask_prompt: bool
    ) -> tuple[Example, int]:
        templated = row.format == "messages"
        ids = [] if templated else list(self._begin)
        learned: list[slice] = []
        lead_in_length = 0
        for text, is_learned in pieces:
            start = len(ids)
            if text:
                ids += next(encoded)[lead_in_length:]
                lead_in_length = self._lead_in_length
            if is_learned:
                learned.append(slice(start, len(ids)))
        # Some data sets write the end token into the text: it is not doubled.
        if not templated and ids[learned[-1].start :][-1:] != self._end:
            ids += self._end
            learned[-1] = slice(learned[-1].start, len(ids))

        tokens = np.array(ids[:max_length], dtype=np.int32)
        if row.format == "text" or not mask_prompt:
            labels = tokens
        else:
            labels = np.full_like(tokens, IGNORED)
            for span in learned:
                labels[span] = tokens[span]
        completion = _completion(row)
        if completion is None or learned[-1].start > len(tokens):
            return Example(tokens, labels), len(ids)
        return Example(tokens, labels, learned[-1].start, completion), len(ids)


def row_pieces(row: Row, tokenizer: Tokenizer) -> list[Piece]:
    """The row's text, cut where learning starts and stops."""
    if row.format == "text":
        return [Piece(row.values["text"], True)]
    if row.format == "prompt+completion":
        return [Piece(row.values["prompt"], False), Piece(row.values["completion"], True)]
    return _conversation_pieces(row.values["messages"], tokenizer, row.where)


def _completion(row: Row) -> str | None:
    if row.format == "messages":
        return next((m["content"] for m in reversed(row.values["messages"]) if m["role"] == "assistant"), None)
    return row.values.get("completion")


def _conversation_pieces(messages: list[dict[str, str]], tokenizer: Tokenizer, where: str) -> list[Piece]:
    """The conversation as the chat template renders it, each assistant turn and its end-of-turn mark a learned piece.

    A turn starts where the messages before it, rendered with the generation prompt, end: there the model takes over
    when it is used. It ends with the mark that ends it as the last message; white space after that is the template's.
    """
    if not tokenizer.has_chat_template:
        raise MiniloraError(
            f"{where}: found messages, but the tokenizer of this model has no chat template; "
            "expected a model that was trained on conversations; use one, or rows with prompt and completion"
        )

    def rendered(count: int, add_generation_prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], add_generation_prompt=add_generation_prompt)
        except MiniloraError as error:
            raise MiniloraError(f"{where}: {error}") from error

    def refuse(turn: int) -> NoReturn:
        raise MiniloraError(
            f"{where}: the chat template renders message {turn + 1} (assistant), or what stands before it, differently "
            "when more follows; expected a template that only appends, or the turn's tokens cannot be found; "
            "use rows with prompt and completion"
        )

    whole = rendered(len(messages))
    pieces: list[Piece] = []
    done = 0  # characters of `whole` that are in pieces
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise MiniloraError(
                f"{where}: the conversation begins with the assistant; expected a user or system message first; add one"
            )
        prompt = rendered(turn, add_generation_prompt=True)
        as_last = whole if turn == len(messages) - 1 else rendered(turn + 1)
        start = len(prompt)
        if start < done or not whole.startswith(prompt) or not as_last.startswith(prompt):
            refuse(turn)
        learned = _without_trailing_space(as_last[start:], message["content"])
        if not whole.startswith(learned, start):
            # Qwen3 writes an empty reasoning block before the last turn only; without it, content and mark are left.
            content = message["content"].strip()
            learned = content + learned[learned.rfind(content) + len(content) :]
            if not content or not whole.startswith(learned, start):
                refuse(turn)
        pieces += [Piece(whole[done:start], False), Piece(learned, True)]
        done = start + len(learned)
    return [*pieces, Piece(whole[done:], False)]


def _without_trailing_space(turn: str, content: str) -> str:
    """The turn up to its end-of-turn mark; if white space is all that follows the content, that is the mark."""
    stripped = turn.rstrip()
    content = content.strip()
    return turn if content and stripped.endswith(content) else stripped
