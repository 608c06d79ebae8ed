"""The command line, `minilora COMMAND ...`: thin commands that parse, call the library and print.

A command is a module of this package with a typed function `command`, whose docstring is its help. Adding one is one
line in COMMANDS. A command's module is imported when the command is called, so that --help answers at once.
Exit status: 0 done; 1 a clear line on stderr; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import MiniloraError

COMMANDS = {  # name -> the first sentence of its help
    "demo": "See LoRA at work in a minute or two: three adapters on one small base, switched, measured, merged.",
    "train": "Fine-tune a model: train a low-rank adapter on your examples, the base staying as it is.",
    "eval": "Measure loss, perplexity and exact match on a data set, for the base and for each adapter.",
    "generate": "Continue a text or answer a message, with or without adapters.",
    "merge": "Merge adapters into their base and write the result as a Hugging Face directory.",
    "export": "Write an adapter in another tool's format, after checking that it fits its base.",
    "gradcheck": "Check the gradients of your model and adapter against finite differences, in float64.",
    "plan": "Tell how much memory training takes, and on what it fits, for full fine-tuning and LoRA side by side.",
    "report": "Make an HTML page of a run, or of several: loss, learning rate, gradient norms, samples, spectra.",
    "bench": "Measure training and decoding on your machine and model: tokens/s, how near the limit, peak memory.",
    "inspect": "Show what a model, an adapter or a GGUF file holds: shapes, dtypes, sizes, ranks, norms.",
}
SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


class Commands(TyperGroup):
    """The group of all commands: bad input of any of them becomes one line on stderr and exit status 1."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        unloaded: Any = None  # the names are for guessing what a mistyped one was meant to be
        self.commands.update(dict.fromkeys(COMMANDS, unloaded))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        single = typer.Typer(add_completion=False, **SETTINGS)
        single.command(cmd_name)(import_module(f".{cmd_name}", __package__).command)
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk behind stdout is noticed here, not after the exit status was decided
            return result
        except MiniloraError as error:
            message = str(error)
        except MemoryError as error:
            message = f"out of memory ({error or 'no details'}): use a smaller batch, a shorter length or --checkpoint"
        except BrokenPipeError:
            raise  # `| head` has read enough: typer ends quietly
        except OSError as error:
            message = f"{error.filename or 'output'}: {error.strerror or error}"
            if error.filename is None and sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
                # What is left in its buffer would fail again when Python ends, and change the exit status.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        from .messages import one_line

        typer.echo(f"error: {one_line(message, self._options(ctx))}", err=True)
        raise typer.Exit(1)

    def _options(self, ctx: Any) -> set[str]:
        """The options of the command that was called, as Python writes them."""
        command = self.get_command(ctx, ctx.invoked_subcommand)
        given = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        return {option.removeprefix("--").replace("-", "_") for option in given}


app = typer.Typer(cls=Commands, no_args_is_help=True, **SETTINGS)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minilora {import_module('minilora').__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """LoRA fine-tuning written from scratch on NumPy; the same source runs on a GPU through CuPy."""


def main() -> None:
    """The entry point of `minilora` and of `python -m minilora`."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character of the text shows its number instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="minilora")
