"""`minilora generate`: continue a text or answer a message, with and without adapters, as it is generated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MiniloraError
from ..terminal import for_stream
from .console import note, print_json
from .options import AdapterDirectories, Device, Dtype, Json, ModelName, open_model

if TYPE_CHECKING:
    from ..generate import Prompt

STDIN = "-"


def command(
    model: ModelName,
    prompt: Annotated[str | None, typer.Option(help='A text to continue; "-" reads it from stdin.')] = None,
    chat: Annotated[str | None, typer.Option(help='A message to answer; "-" reads it from stdin.')] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            help='A conversation to answer: a JSON list of {"role": ..., "content": ...}, or {"messages": ...}.'
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message before --chat.")] = None,
    adapter: AdapterDirectories = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above it, tokens are drawn.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens only.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens with this much probability.")] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="A text that ends the completion, besides the model's end tokens; may be given several times."
        ),
    ] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on after the model's end tokens.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same draws. Default: fresh ones.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Continue a text or answer a message, with or without adapters.

    Several adapters answer one after another.
    """
    from ..generate import end_tokens

    given = read_prompt(prompt, chat, messages, system)
    if temperature == 0 and (top_k is not None or top_p < 1 or seed is not None):
        note("at temperature 0 the likeliest token is taken: --top-k, --top-p and --seed change nothing")
    directories = adapter or []
    loaded = open_model(model, directories, device, dtype)
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop": [*([] if ignore_end else end_tokens(loaded)), *(stop or [])],
        "seed": seed,
    }
    completions = []
    for number, directory in enumerate(directories or [None]):
        loaded.set_adapter(None if directory is None else str(number))
        if as_json:
            text = loaded.generate(given, max_new_tokens, **options)
            completions.append({"adapter": None if directory is None else str(directory), "completion": text})
            continue
        if len(directories) > 1:
            note(f"--- {directory}")
        text = loaded.generate(given, max_new_tokens, **options, stream=write_out)
        if not text.endswith("\n"):
            write_out("\n")
    if as_json:
        print_json({"model": model, "prompt": given, "completions": completions})


def read_prompt(prompt: str | None, chat: str | None, messages: Path | None, system: str | None) -> Prompt:
    """The text, or the messages, that exactly one of the three options gives."""
    if sum(option is not None for option in (prompt, chat, messages)) != 1:
        raise typer.BadParameter("expected exactly one of them", param_hint="--prompt, --chat or --messages")
    if system is not None and chat is None:
        raise typer.BadParameter("goes with --chat only", param_hint="--system")
    if prompt is not None:
        return read_stdin() if prompt == STDIN else prompt
    if chat is not None:
        turns = [] if system is None else [{"role": "system", "content": system}]
        return [*turns, {"role": "user", "content": read_stdin() if chat == STDIN else chat}]
    assert messages is not None
    from ..files import read_json

    found = read_json(messages)
    found = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
        raise MiniloraError(
            f'{messages}: expected a JSON list of {{"role": ..., "content": ...}}, or an object with it as "messages"'
        )
    return found


def read_stdin() -> str:
    """All of stdin, less the line break that `echo` puts at its end."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise MiniloraError(f"stdin: byte {error.start + 1} is not UTF-8; expected text in UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")


def write_out(piece: str) -> None:
    """Write a piece of the text as it comes; a terminal gets control characters written out."""
    sys.stdout.write(for_stream(piece, sys.stdout))
    sys.stdout.flush()
