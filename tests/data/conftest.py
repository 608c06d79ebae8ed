"""Small tokenizers with the traits of real ones, and a writer of JSON Lines files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Messages = list[dict[str, str]]


class WordTokenizer:
    """A token per word, so that a boundary inside a word is lost if both sides are encoded together; so is `<...>`."""

    eos_token_id: int | None

    def __init__(self, begin: bool = False, template: Callable[[Messages, bool], str] | None = None, end: bool = True):
        self.vocabulary: list[str] = ["<begin>", "<end>"]
        self.bos_token_id = 0 if begin else None
        self.eos_token_id = 1 if end else None
        self.template = template
        self.has_chat_template = template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begin = [0] if self.bos_token_id == 0 and add_special_tokens else []
        return begin + [self._number(token) for token in re.findall(r"<[^<>\s]*>|\w+|\s+|[^\w\s]", text)]

    def decode(self, ids: Any) -> str:
        return "".join(self.vocabulary[number] for number in ids)

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        assert self.template is not None
        return self.template(messages, add_generation_prompt)

    def _number(self, token: str) -> int:
        if token not in self.vocabulary:
            self.vocabulary.append(token)
        return self.vocabulary.index(token)


class SentencePieceTokenizer(WordTokenizer):
    """Puts a space before any text that it is given, as Llama 2's does; a space belongs to the word after it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begin = [0] if self.bos_token_id == 0 and add_special_tokens else []
        tokens = re.findall(r"▁?[^▁\n]+|▁|\n", "▁" + text.replace(" ", "▁"))
        return begin + [self._number(token) for token in tokens]

    def decode(self, ids: Any) -> str:
        return super().decode(ids).replace("▁", " ")


def chatml(messages: Messages, add_generation_prompt: bool) -> str:
    text = "".join(f"<start>{m['role']}\n{m['content']}<stop>\n" for m in messages)
    if messages and messages[0]["role"] != "system":
        text = "<start>system\nBe kind.<stop>\n" + text
    return text + ("<start>assistant\n" if add_generation_prompt else "")


@pytest.fixture
def chatml_template() -> Callable[[Messages, bool], str]:
    return chatml


@pytest.fixture
def word_tokenizer() -> type[WordTokenizer]:
    return WordTokenizer


@pytest.fixture
def sentencepiece_tokenizer() -> type[SentencePieceTokenizer]:
    return SentencePieceTokenizer


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(row, row, ..., name="data.jsonl"): objects as JSON, strings and bytes as they are; a row per line."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        lines = [
            row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
            for row in rows
        ]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
