"""The report as one HTML file that needs nothing else: no network, no script, charts inline, light and dark.

A `Page` is sections of blocks (paragraphs, tables, tiles, figures, samples); page.html.jinja lays them out.
`run_section` says of a run what there is to say; other commands put sections of their own before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..files import atomic_write
from ..train.plot import SMOOTHING_WINDOWS, running_mean
from ..train.progress import clock
from .charts import Series, heat_map, line_chart, number
from .run import Run
from .spectrum import LayerSpectrum, by_kind

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: "text", "note" (small), "heading" or "code" (as it stands)."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table; a column whose name ends in ">" is aligned right.

    texts: its cells hold longer texts, as they stand. folded: only the caption is seen until it is clicked.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    texts: bool = False
    folded: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Tiles:
    """Numbers that matter, each with what it is."""

    tiles: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "tiles"


@dataclass(frozen=True)
class Figures:
    """SVG texts from charts.py, side by side where there is room; empty ones are left out."""

    figures: Sequence[str]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Samples:
    """How one prompt was continued as training went on."""

    prompt: str
    texts: Sequence[tuple[int, str]]
    open: bool = True
    kind: ClassVar[str] = "samples"


Block = Text | Table | Tiles | Figures | Samples


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str = ""
    sections: Sequence[Section] = field(default_factory=list)
    footer: str = "Written by minilora. This page is one file and loads nothing."


def write_page(page: Page, path: Path) -> None:
    """Write the page as one HTML file, whole or not at all."""
    atomic_write(path, render(page).encode())


def render(page: Page) -> str:
    """The page as HTML; all text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(page=page)


def report_on(runs: Sequence[Run]) -> Page:
    """The page of `minilora report`: a section for each run, before them a comparison where there are several."""
    sections = [run_section(run) for run in runs]
    if len(runs) == 1:
        run = runs[0]
        return Page(f"Run {run.name}", str(run.settings.get("model", "")), _split(sections[0]))
    return Page(f"{len(runs)} runs", ", ".join(run.name for run in runs), [comparison(runs), *sections])


def comparison(runs: Sequence[Run], title: str = "Side by side") -> Section:
    """The runs in one table and one chart."""
    columns = ["run", "rank>", "learning rate>", "steps>", "training loss>", "lowest validation loss>", "‖ΔW‖>"]
    rows = [
        [
            run.name,
            _text(run.settings.get("rank")) if run.layers else "",
            _text(run.settings.get("lr")),
            f"{run.records[-1]['step']:,}",
            _text(smoothed(run)[1][-1]),
            _text(min(run.column("validation_loss")[1], default=None)),
            _text(sum(layer.norm**2 for layer in run.layers) ** 0.5) if run.layers else "",
        ]
        for run in runs
    ]
    curves = [Series(run.name, *smoothed(run), colour=number) for number, run in enumerate(runs)]
    measured = [Series(run.name, *run.column("validation_loss"), "marks", number) for number, run in enumerate(runs)]
    return Section(
        title,
        [
            Table(columns, rows),
            Figures(
                [
                    line_chart(curves, "Training loss, running mean", "optimiser step", "nats per label token"),
                    line_chart(measured, "Validation loss", "optimiser step", "nats per label token"),
                ]
            ),
        ],
    )


def run_section(run: Run, title: str | None = None) -> Section:
    """Everything about one run: what it was, its curves, its samples, what its adapter did to the base."""
    blocks: list[Block] = [Tiles(_tiles(run)), Figures(_curves(run))]
    if run.samples:
        blocks.append(Text("What it writes, as training goes on", "heading"))
        blocks += [Samples(prompt, texts, number == 0) for number, (prompt, texts) in enumerate(run.samples.items())]
    if run.layers:
        blocks += [Text("What the adapter changed", "heading"), *_evidence(run)]
    facts = [[option, _text(value)] for option, value in run.settings.items() if value not in ([], {})]
    blocks += [Text("Settings", "heading"), Table(["option", "value"], facts)]
    return Section(title or f"Run {run.name}", blocks)


def smoothed(run: Run) -> tuple[list[float], list[float]]:
    """(steps, training losses as a running mean over 1/40 of the run)."""
    steps, losses = run.column("loss")
    return steps, running_mean(losses, max(1, len(losses) // SMOOTHING_WINDOWS))


def _split(section: Section) -> list[Section]:
    """One run alone: its headings become sections."""
    parts: list[tuple[str, list[Block]]] = [("Training", [])]
    for block in section.blocks:
        if isinstance(block, Text) and block.kind == "heading":
            parts.append((block.text, []))
        else:
            parts[-1][1].append(block)
    return [Section(title, blocks) for title, blocks in parts]


def _tiles(run: Run) -> list[tuple[str, str]]:
    steps = run.records[-1]["step"]
    losses = smoothed(run)[1]
    found = [(f"{steps:,}", "optimiser steps"), (f"{losses[0]:.3f} → {losses[-1]:.3f}", "training loss, running mean")]
    measured = run.column("validation_loss")
    if measured[1]:
        best = min(range(len(measured[1])), key=lambda index: measured[1][index])
        found.append((f"{measured[1][best]:.4f}", f"lowest validation loss, step {measured[0][best]:,}"))
    if (tokens := run.last("tokens")) is not None:
        found.append((f"{tokens:,.0f}", "tokens seen"))
    speeds = sorted(run.column("tokens_per_second")[1])
    if speeds:
        median = speeds[len(speeds) // 2]
        found.append((f"{median:,.0f}", "tokens per second, median"))
        seconds = sum(
            (after - before) / speed
            for before, after, speed in zip(
                [0.0, *run.column("tokens")[1]],
                run.column("tokens")[1],
                run.column("tokens_per_second")[1],
                strict=False,
            )
            if speed > 0 and after > before
        )
        found.append((clock(seconds), "in training steps"))
    if run.layers:
        found.append((f"{len(run.layers)}", "adapted layers"))
    return found


def _curves(run: Run) -> list[str]:
    steps, losses = run.column("loss")
    mean = smoothed(run)[1]
    series = [Series("each step", steps, losses, "faint", 0)] if mean != losses else []
    series.append(Series("training", steps, mean, "line", 0))
    if run.column("validation_loss")[1]:
        series.append(Series("validation", *run.column("validation_loss"), "marks", 1))
    limit = run.settings.get("max_grad_norm")
    norms = [Series("gradient norm", *run.column("grad_norm"), "line", 2)]
    if limit and max(run.column("grad_norm")[1], default=0.0) > limit:
        norms.append(Series(f"clipped at {limit:g}", steps, [float(limit)] * len(steps), "line", 5))
    memory = run.column("memory")
    return [
        line_chart(series, "Loss", "optimiser step", "nats per label token", log=False),
        line_chart([Series("lr", *run.column("lr"), "line", 0)], "Learning rate", "optimiser step", "lr", log=False),
        line_chart(norms, "Gradient norm, before clipping", "optimiser step", "‖g‖"),
        line_chart(
            [Series("memory", memory[0], [value / 1e9 for value in memory[1]], "line", 3)],
            "Memory in use", "optimiser step", "GB", log=False,
        ),
    ]  # fmt: skip


def _evidence(run: Run) -> list[Block]:
    """Spectra, and per block and kind of layer how much changed."""
    layers = run.layers
    kinds = by_kind(layers)
    curves = []
    for kind, blocks in kinds.items():
        ratios = [layer.values / layer.values[0] for layer in blocks.values() if layer.rank]
        if ratios:
            length = min(map(len, ratios))
            middle = [sorted(values[index] for values in ratios)[len(ratios) // 2] for index in range(length)]
            curves.append(Series(kind, list(range(1, length + 1)), [float(value) for value in middle], "marks"))
    maps = [_map(layers, "effective rank of ΔW", lambda layer: layer.effective_rank)]
    if run.base is not None:
        maps += [
            _map(layers, "‖ΔW‖ / ‖W‖", lambda layer: layer.share),
            _map(layers, "amplification ‖ΔW‖ / ‖UᵀWV‖ (Hu et al. 2021, table 7)", lambda layer: layer.amplification),
        ]
    else:
        maps.append(_map(layers, "‖ΔW‖", lambda layer: layer.norm))
    figures: list[Block] = [
        Figures([line_chart(curves, "Singular values of ΔW, median over blocks", "i", "σᵢ / σ₁", log=None), *maps])
    ]
    rows = [
        [
            layer.module,
            f"{layer.shape[0]} × {layer.shape[1]}",
            f"{layer.rank} of {len(layer.values)}",
            f"{layer.effective_rank:.2f}",
            " ".join(number(float(value)) for value in layer.values[:8]) + (" …" if len(layer.values) > 8 else ""),
            number(layer.norm),
        ]
        for layer in layers
    ]
    columns = ["layer", "ΔW>", "rank>", "effective rank>", "singular values", "‖ΔW‖>"]
    figures.append(Table(columns, rows, f"All {len(layers)} adapted layers, with their singular values", folded=True))
    return ([Text(run.note, "note")] if run.note else []) + figures


def _map(layers: Sequence[LayerSpectrum], title: str, value) -> str:  # type: ignore[no-untyped-def]
    kinds = by_kind(layers)
    blocks = sorted({block for found in kinds.values() for block in found})
    cells = [[value(found[block]) if block in found else None for block in blocks] for found in kinds.values()]
    return heat_map(list(kinds), [str(block) for block in blocks], cells, title, "block")


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)
