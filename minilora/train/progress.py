"""What is seen while training runs: a bar in a terminal, a line now and then in a log, or nothing but warnings."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from ..terminal import escaped, for_stream

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINES_PER_RUN = 20  # outside a terminal
SECONDS_PER_LINE = 60.0  # at the latest


class StepReport(NamedTuple):
    """One step as it is shown: loss per label token, tokens per second, bytes in use, the last validation loss."""

    step: int
    loss: float
    tokens_per_second: float
    memory: int
    valid_loss: float | None


class Quiet:
    """Shows warnings, on stderr. The others show more."""

    def line(self, text: str) -> None:
        """Text that stays: a table, a validation loss, where something was saved."""

    def warn(self, text: str) -> None:
        """What may be wrong."""
        print(f"warning: {for_stream(text, sys.stderr)}", file=sys.stderr, flush=True)

    def start(self, step: int, total: int) -> None:
        """Training begins, after `step` steps of `total` (more than 0 when it is resumed)."""

    def step(self, report: StepReport) -> None:
        """A step is done."""

    def close(self) -> None:
        """Training is over, in whatever way."""


class Lines(Quiet):
    """Plain lines for logs and pipes: about 20 in a run, and one a minute at least."""

    def line(self, text: str) -> None:
        print(for_stream(text, sys.stdout), flush=True)

    def start(self, step: int, total: int) -> None:
        self.first, self.total = step, total
        self.begun = self.shown = time.monotonic()

    def step(self, report: StepReport) -> None:
        now = time.monotonic()
        every = math.ceil(self.total / LINES_PER_RUN)
        due = report.step % every == 0 or report.step in (self.first + 1, self.total)
        if not due and now - self.shown < SECONDS_PER_LINE:
            return
        self.shown = now
        left = (now - self.begun) / (report.step - self.first) * (self.total - report.step)
        self.line(f"step {report.step:,}/{self.total:,}  {facts(report)}  {clock(left)} left")


class Bar(Lines):
    """A bar with the time left at the terminal's last line; what stays is printed above it."""

    progress: Progress | None = None
    task: TaskID

    def line(self, text: str) -> None:
        if self.progress is None:
            super().line(text)
        else:
            self.progress.console.print(escaped(text), markup=False, highlight=False)

    def warn(self, text: str) -> None:
        if self.progress is None:
            super().warn(text)
        else:
            self.progress.console.print(f"warning: {escaped(text)}", style="yellow", markup=False, highlight=False)

    def start(self, step: int, total: int) -> None:
        from rich import progress

        self.progress = progress.Progress(
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[facts]}", markup=False),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("", total=total, completed=step, facts="")
        self.progress.start()

    def step(self, report: StepReport) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=report.step, facts=facts(report))

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def facts(report: StepReport) -> str:
    """loss 1.234  valid 1.345  2,345 tok/s  1.2 GB"""
    valid = "" if report.valid_loss is None else f"valid {report.valid_loss:.4f}  "
    return f"loss {report.loss:.4f}  {valid}{report.tokens_per_second:,.0f} tok/s  {report.memory / 1e9:.1f} GB"


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def choose(quiet: bool) -> Quiet:
    """A bar where stdout is a terminal that can show one, else lines; quiet: neither."""
    if quiet:
        return Quiet()
    if not sys.stdout.isatty():
        return Lines()
    try:
        from rich.console import Console
    except ImportError:
        lines = Lines()
        lines.line("rich is not installed: plain lines instead of a progress bar")
        return lines
    return Bar() if Console().is_interactive else Lines()
