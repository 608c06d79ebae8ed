"""Rows: what is read, and that each kind of damage is an error that names the line."""

from typing import Any

import pytest

from minilora.data.rows import read_rows
from minilora.errors import MiniloraError

GOOD = {"text": "one"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def rejected(path: Any) -> str:
    """The message of the error, which is one line that begins with the file."""
    with pytest.raises(MiniloraError) as caught:
        list(read_rows(path))
    message = str(caught.value)
    assert message.startswith(f"{path}")
    assert "\n" not in message
    return message.removeprefix(f"{path}, ")


@pytest.mark.parametrize(
    ("row", "format"),
    [(GOOD, "text"), ({"prompt": "2+2=", "completion": "4"}, "prompt+completion"), (CHAT, "messages")],
)
def test_each_kind_of_row_is_told_by_its_keys(write, row, format):
    (read,) = read_rows(write(row))
    assert (read.format, read.values) == (format, row)


def test_blank_lines_are_skipped_and_counted_as_lines(write):
    first, second = read_rows(write(GOOD, "", "  ", GOOD))
    assert first.where.endswith("line 1")
    assert second.where.endswith("line 4")


def test_a_byte_order_mark_is_no_part_of_the_first_row(write):
    (read,) = read_rows(write(b"\xef\xbb\xbf" + b'{"text": "one"}'))
    assert read.values == GOOD


def test_a_line_separator_inside_a_string_does_not_end_the_row(write):
    (read,) = read_rows(write('{"text": "a\u2028b\u0085c"}'))
    assert read.values == {"text": "a\u2028b\u0085c"}


def test_other_keys_are_reported_as_unused(write):
    (read,) = read_rows(write({"text": "one", "id": 3, "source": None}))
    assert read.unused_keys == {"id", "source"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "one"', "malformed JSON at column"),
        ('{"text": "one"} {"text": "two"}', "malformed JSON at column 17"),
        (b'{"text": "caf\xe9"}', "byte 14 (0xe9) is not UTF-8"),
        ("[1, 2]", "found [1, 2]"),
        ('"text"', 'found "text"'),
        ("[" * 100_000, "JSON too large"),
        ('{"text": ' + "1" * 5_000 + "}", "JSON too large"),
        ({"txt": "one"}, 'found keys ["txt"]'),
        ({"prompt": "one"}, 'found keys ["prompt"]'),
        ({"completion": "one", "input": "two"}, 'found keys ["completion", "input"]'),
        ({"text": "one", "prompt": "a", "completion": "b"}, 'found keys ["completion", "prompt", "text"]'),
        ({}, "found keys []"),
        ({"text": 5}, "text is 5; expected a string"),
        ({"text": None}, "text is null; expected a string"),
        ('{"text": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_damage_is_reported_with_its_line(write, line, found):
    message = rejected(write(GOOD, line))
    assert message.startswith("line 2: ")
    assert found in message


@pytest.mark.parametrize(
    ("prompt", "completion", "name"), [(1, "b", "prompt is 1"), ("a", ["b"], 'completion is ["b"]')]
)
def test_prompt_and_completion_must_be_strings(write, prompt, completion, name):
    message = rejected(write({"prompt": "a", "completion": "b"}, {"prompt": prompt, "completion": completion}))
    assert message.startswith(f"line 2: {name}; expected a string")


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "messages is []"),
        ("hi", 'messages is "hi"'),
        ({"role": "user", "content": "hi"}, "messages is {"),
        (["hi"], 'message 1 is "hi"'),
        ([{"role": "user"}], 'message 1 has keys ["role"]'),
        ([{"from": "human", "value": "hi"}], 'message 1 has keys ["from", "value"]'),
        ([{"role": "user", "content": "hi", "weight": 0}], 'message 1 has keys ["content", "role", "weight"]'),
        ([{"role": "user", "content": "hi"}, {"role": "gpt", "content": "hi"}], 'message 2 has role "gpt"'),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of message 1 is ["),
        ([{"role": 7, "content": "hi"}], "role of message 1 is 7"),
    ],
)
def test_a_damaged_conversation_is_reported_with_its_line_and_message(write, messages, found):
    message = rejected(write(CHAT, {"messages": messages}))
    assert message.startswith(f"line 2: {found}")
    assert "expected" in message


def test_a_row_of_another_kind_is_reported_with_the_line_that_decided(write):
    message = rejected(write("", GOOD, GOOD, {"prompt": "a", "completion": "b"}))
    assert message.startswith("line 4: found a prompt+completion row; expected text as in line 2")


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    assert "cannot be read" in rejected(tmp_path)
