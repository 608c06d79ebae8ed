"""What commands print: results on stdout, notes on stderr; tables in a terminal, plain whole lines in a log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from ..terminal import for_stream

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_A_LINE = 60  # of progress, outside a terminal
LOG_WIDTH = 10_000  # outside a terminal nothing is cut or wrapped


def console(stderr: bool = False) -> Console:
    """Rich's console for stdout or stderr: as wide as the terminal, or never wrapping where there is none."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else LOG_WIDTH, highlight=False)


def say(text: str) -> None:
    """A line of results on stdout."""
    typer.echo(for_stream(text, sys.stdout))


def note(text: str) -> None:
    """A line for people, on stderr: what is going on, what was left out."""
    typer.echo(for_stream(text, sys.stderr), err=True)


def print_json(value: Any) -> None:
    """`value` on stdout as one JSON document; numbers that JSON lacks (NaN, infinity) become null."""
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; a column whose name ends in ">" is aligned right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left")
    for row in rows:
        table.add_row(*(escape(for_stream(cell, sys.stdout)) for cell in row))
    console().print(table)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with how many of `total` are newly done.

    On stderr it shows a bar where that is a terminal, and in a log a line every `SECONDS_A_LINE`.
    """
    if not sys.stderr.isatty():
        yield _Lines(title, total).advance
        return
    from rich import progress as bars

    columns = [bars.TextColumn("{task.description}", markup=False), bars.BarColumn(), bars.MofNCompleteColumn()]
    with bars.Progress(*columns, bars.TimeRemainingColumn(), console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """Progress in a log: how far it is, now and then."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.said = title, total, 0, time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.said >= SECONDS_A_LINE:
            self.said = time.monotonic()
            note(f"{self.title}: {self.done:,} of {self.total:,}")


def bytes_text(count: int) -> str:
    """12.3 MB: decimal units, as model sizes are given."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
