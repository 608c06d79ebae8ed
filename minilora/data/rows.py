"""Reads a JSON Lines file: checked rows of one format, or an error that names the line.

    {"text": "..."}
    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

A file holds one kind of row, which its first row decides. Blank lines are skipped; other keys of a row are not used,
and the data set's summary says so. Left out: what the text means to a tokenizer (encoding.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MiniloraError

FORMATS = {"text": ("text",), "prompt+completion": ("prompt", "completion"), "messages": ("messages",)}
FORMAT_KEYS = frozenset(key for keys in FORMATS.values() for key in keys)
ROLES = ("system", "user", "assistant", "tool")
UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A checked row: `values` has the keys of FORMATS[format], strings, or for messages a list of {role, content}."""

    where: str  # "file, line N", for error messages
    format: str
    values: dict[str, Any]
    unused_keys: frozenset[str]


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a file one by one; raises MiniloraError for the first line that does not fit."""
    first_format, first_line = "", 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(UTF8_BYTE_ORDER_MARK)
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                values = _parse(line, where)
                format = _format_of(values, where)
                if not first_format:
                    first_format, first_line = format, number
                if format != first_format:
                    raise MiniloraError(
                        f"{where}: found a {format} row; expected {first_format} as in line {first_line}, "
                        "since a file holds one kind of row; convert this row or move it to another file"
                    )
                _check_values(values, format, where)
                yield Row(where, format, values, frozenset(values.keys() - FORMAT_KEYS))
    except OSError as error:
        raise MiniloraError(
            f"{path}: found a file that cannot be read ({error.strerror}); check its permissions"
        ) from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} (0x{line[error.start]:02x})"
        raise MiniloraError(f"{where}: {byte} is not UTF-8; expected text in UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise MiniloraError(
            f"{where}: malformed JSON at column {error.colno} ({error.msg}); "
            "expected one whole JSON object on each line; correct the line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise MiniloraError(
            f"{where}: found JSON too large to read; expected an object of strings; remove the line"
        ) from error
    if not isinstance(row, dict):
        raise MiniloraError(
            f'{where}: found {_shown(row)}; expected an object such as {{"text": "..."}}; write one object on each line'
        )
    return row


def _format_of(values: dict[str, Any], where: str) -> str:
    known = values.keys() & FORMAT_KEYS
    for format, keys in FORMATS.items():
        if known == set(keys):
            return format
    raise MiniloraError(
        f"{where}: found keys {_shown(sorted(values))}; expected either text, or prompt and completion, or messages; "
        "rename, add or remove keys"
    )


def _check_values(values: dict[str, Any], format: str, where: str) -> None:
    if format != "messages":
        for key in FORMATS[format]:
            _check_string(values[key], key, where)
        return
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise MiniloraError(
            f"{where}: messages is {_shown(messages)}; expected a list with at least one message; remove the row"
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            found = f"has keys {_shown(sorted(message))}" if isinstance(message, dict) else f"is {_shown(message)}"
            raise MiniloraError(
                f"{where}: message {number} {found}; expected an object with role and content only; correct it"
            )
        _check_string(message["role"], f"role of message {number}", where)
        if message["role"] not in ROLES:
            raise MiniloraError(
                f"{where}: message {number} has role {_shown(message['role'])}; "
                f"expected one of {', '.join(ROLES)}; rename the role"
            )
        _check_string(message["content"], f"content of message {number}", where)


def _check_string(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise MiniloraError(
            f"{where}: {name} is {_shown(value)}; expected a string; put the value in quotes or remove the row"
        )
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MiniloraError(
                f"{where}: {name} holds half of a surrogate pair ({_shown(value[error.start])}); "
                "expected whole characters; write the text as UTF-8 instead of \\u escapes"
            ) from error


def _shown(value: Any) -> str:
    """A value as one short line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
