"""Chat templates: a model's own Jinja program that turns messages into the text it was trained on.

Templates come with downloaded models, so they run sandboxed, see only plain JSON values, and any error of theirs is one
clear line. The environment is the one that transformers gives them, so that the same template gives the same text.
Source: transformers, utils/chat_template_utils.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import MiniloraError

# What a template's expressions can raise besides Jinja's own errors: they are arbitrary arithmetic, indexing and calls.
_EXPRESSION_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, special_tokens: Mapping[str, str]
) -> str:
    """The text of a conversation of messages {"role": ..., "content": ...}.

    `add_generation_prompt` asks for the opening of the assistant's next turn; `special_tokens` are what the template
    may name, e.g. {"bos_token": "<s>"}.
    Raises MiniloraError where the messages are malformed or the template fails or refuses them (with its own words).
    """
    messages = _plain_messages(messages)
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        )
    except jinja2.TemplateSyntaxError as error:
        raise MiniloraError(f"the model's chat template is malformed: line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, *_EXPRESSION_ERRORS) as error:
        raise MiniloraError(f"the model's chat template refused these messages: {error}") from error


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping):
        raise MiniloraError(
            f'messages are a {type(messages).__name__}, expected a list of {{"role": ..., "content": ...}}'
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MiniloraError(f'message {number} is {message!r}, expected {{"role": "user", "content": "..."}}')
    try:
        return json.loads(json.dumps(list(messages)))
    except (TypeError, ValueError) as error:
        raise MiniloraError(f"the messages hold something that JSON cannot: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant says; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 (the type that Jinja declares)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML's characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
