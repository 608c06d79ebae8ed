"""`Tokenizer`: text to token ids and back, chat templates, and the directory files that transformers reads and writes.

The tokenising itself is the `tokenizers` library's. A tokenizer comes from a Hugging Face directory (here) or from a
GGUF file's metadata (gguf_tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import MiniloraError
from ..files import Content, atomic_write_all, json_bytes, read_json_object
from .chat_template import render_chat

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no complete UTF-8 decode to


class Tokenizer:
    """A `tokenizers.Tokenizer` with the roles of its special tokens and its chat template.

    config: what tokenizer_config.json holds; "bos_token", "eos_token", "pad_token" name the tokens with a role.
    eos_token_ids: further ids that end a generation, besides the end token's.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        chat_template: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ):
        self._backend = backend
        self._config = dict(config)
        self._special_tokens = {
            name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None
        }
        self.chat_template = chat_template
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        self.unk_token_id = self._special_id("unk_token")
        self.eos_token_ids = {int(token) for token in eos_token_ids}
        if self.eos_token_id is not None:
            self.eos_token_ids.add(self.eos_token_id)
        backend.no_truncation()  # a tokenizer.json may carry the settings of the training that wrote it
        backend.no_padding()

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face directory, or None where it has no tokenizer.json.

        Where present, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and generation_config.json
        (for its end tokens) are read too. Raises MiniloraError for a malformed one.
        """
        path = Path(path)
        if not (path / "tokenizer.json").exists():
            return None
        with _library_errors(f"{path / 'tokenizer.json'} is not a tokenizer that the tokenizers library reads"):
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            backend.encode("")  # a template around the text that names an unknown token only shows here
        optional = {}
        for name in ("special_tokens_map", "tokenizer_config", "generation_config"):
            optional[name] = read_json_object(file) if (file := path / f"{name}.json").exists() else {}
        config = optional["special_tokens_map"] | optional["tokenizer_config"]
        if (path / "chat_template.jinja").exists():
            template: str | None = _read_text(path / "chat_template.jinja")
        else:
            template = _default_template(config.get("chat_template"), path / "tokenizer_config.json")
        return cls(backend, config, template, token_ids(optional["generation_config"].get("eos_token_id")))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included; the model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model expects around a text (Llama: its begin token).

        The text of a chat template holds these already: encode it with add_special_tokens=False.
        Raises MiniloraError where `text` is no valid text.
        """
        if not isinstance(text, str):
            raise MiniloraError(f"cannot encode a {type(text).__name__} ({text!r:.60}), expected a text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MiniloraError(
                f"the text {text!r:.60} holds half of a surrogate pair, which is no character"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; incomplete UTF-8 comes out as U+FFFD, ids outside the vocabulary as nothing."""
        numbers = [int(token) for token in ids]
        if numbers and min(numbers) < 0:
            raise MiniloraError(
                f"cannot decode the token id {min(numbers)}, expected at least 0 (labels use -100 for ignored)"
            )
        return self._backend.decode(numbers, skip_special_tokens=skip_special_tokens)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for tokens that arrive one by one."""
        return StreamDecoder(self, skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation [{"role": "user", "content": "..."}, ...] as the model was trained to read it.

        Raises MiniloraError where the tokenizer has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise MiniloraError(
                "this model's tokenizer has no chat template: give a plain prompt, or a chat (instruct) model"
            )
        return render_chat(self.chat_template, messages, add_generation_prompt, self._special_tokens)

    def files(self) -> dict[str, Content]:
        """The directory files by name, for whoever writes them together with others."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self._config
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {
            "tokenizer.json": self._backend.to_str(pretty=True).encode("utf-8"),
            "tokenizer_config.json": json_bytes(config),
            "special_tokens_map.json": json_bytes(self._special_tokens),
        }

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json (with the chat template), special_tokens_map.json; atomically."""
        atomic_write_all({Path(directory) / name: content for name, content in self.files().items()})

    def _special_id(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


class StreamDecoder:
    """Turns tokens that arrive one by one into text, never giving out half of a character.

    A character may take several tokens, and how a token reads can depend on the one before it (a leading space), so
    each new token is decoded behind those of the last text given out, and that text is cut off.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []  # tokens of the last piece given out
        self._pending: list[int] = []  # tokens since

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be empty."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(_REPLACEMENT):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is left when no more tokens come; an incomplete character reads U+FFFD."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._context, self._pending = self._pending, []
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, self._skip_special_tokens)


def token_ids(value: Any) -> list[int]:
    """The ids in a config's "eos_token_id", which is a number, a list of numbers or null."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # The tokenizers library raises plain Exception, and where its Rust code gives up PanicException; no other does.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise MiniloraError(f"{what}: {error}") from error


def _default_template(value: Any, source: Path) -> str | None:
    """A "chat_template" is the template, or a list of {"name", "template"} of which the one named "default" counts."""
    found = value
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        found = next((item.get("template") for item in value if item.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise MiniloraError(f"{source}: chat_template is {value!r:.60}, expected a text")
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MiniloraError(f"cannot read {path}: {error}") from error


def _token_text(value: Any) -> str | None:
    """A special token is its text, or an object that holds it as "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
