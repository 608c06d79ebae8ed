"""The loss curve as a PNG, drawn from the records of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write

SMOOTHING_WINDOWS = 40  # the smooth line is a mean over 1/40 of the run


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with the training loss of every step, its running mean, and the validation losses, atomically.

    Raises ImportError where matplotlib (the extra `plot`) is missing.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [record["step"] for record in records if "loss" in record]
    losses = [record["loss"] for record in records if "loss" in record]
    measured = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    window = max(1, len(losses) // SMOOTHING_WINDOWS)
    if window > 1:
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(losses, window), color="C0", label=f"training, mean of {window} steps")
    else:
        axes.plot(steps, losses, color="C0", label="training", marker="." if len(losses) < 30 else "")
    if measured:
        axes.plot(*zip(*measured, strict=True), color="C1", marker="o", markersize=4, label="validation")
    axes.set(xlabel="optimiser step", ylabel="cross-entropy per label token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to window − 1 before it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means
