"""alpha / r keeps the learning rate that suits one rank right for the others

Claim. With ΔW = (alpha / r) B A and alpha fixed, the learning rate need not be tuned again when r is changed (Hu et al.
2021, section 4.1). rsLoRA's alpha / sqrt(r) (Kalajdzievski 2023, "A rank stabilization scaling factor") is meant for
large ranks, which learn slowly otherwise.

Measured. Three scales that agree at rank 4 (all are 4 there): alpha / r, alpha / sqrt(r), and none that depends on r.
First, how far one step of Adam at one learning rate moves the logits, at ranks 1 to 64. Adam moves every entry of B by
the learning rate, and B A x sums r of them, all of one sign with respect to x at the first step: so the movement should
be as the scale times r. Second, ranks 4 and 64 are trained on dates at five learning rates, each three times the one
before, under each scale; the best learning rate is where a parabola through the losses of the best and its neighbours,
over log(rate), is lowest.

Refuted. If under alpha / r the first step's movement changes by over half between ranks 4 and 64, or the best learning
rate by over a factor of 3; or if it changes no more without a scale than with alpha / r, which then does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from minilora.data import batches

from .common import Verdict, both, dates, load, loss, table, trained
from .picture import COLOURS, MARKERS, Figure, save

REFERENCE, ALPHA = 4, 16
SCALES = ("alpha / r", "alpha / sqrt(r)", "no scale")
MOVEMENT, SHIFT = 1.5, 3.0


def way_of(scale: str, rank: int) -> ml.LoraConfig:
    """All three scales are ALPHA / REFERENCE at the reference rank."""
    if scale == "alpha / sqrt(r)":
        return ml.LoraConfig(r=rank, alpha=ALPHA / math.sqrt(REFERENCE), use_rslora=True)
    return ml.LoraConfig(r=rank, alpha=ALPHA if scale == "alpha / r" else ALPHA / REFERENCE * rank)


def measure(
    model: str,
    ranks: Sequence[int] = (1, 4, 16, 64),
    rates: Sequence[float] = (2.5e-4, 7.5e-4, 2.25e-3, 6.75e-3, 2e-2),
    steps: int = 40,
) -> dict[str, Any]:
    """{"movement": {scale: {rank: RMS change of the logits}}, "losses": {scale: {rank: {rate: loss}}}}."""
    base = load(model)
    task = dates(base)
    movement: dict[str, dict[str, float]] = {scale: {} for scale in SCALES}
    probe = batches(task.valid[:16], 16, shuffle=False)[0].tokens
    before = np.array(base.logits(probe))
    for scale in SCALES:
        for rank in ranks:
            moved = trained(model, way_of(scale, rank), task.train, lr=1e-4, steps=1).logits(probe) - before
            movement[scale][str(rank)] = float(np.sqrt(np.mean(np.square(moved))))
    losses: dict[str, dict[str, dict[str, float]]] = {scale: {} for scale in SCALES}
    for rank in (REFERENCE, max(ranks)):
        for scale in SCALES:
            if rank == REFERENCE and scale != SCALES[0]:
                losses[scale][str(rank)] = losses[SCALES[0]][str(rank)]  # the same scale, so the same run
                continue
            losses[scale][str(rank)] = {
                f"{rate:g}": loss(trained(model, way_of(scale, rank), task.train, rate, steps), task.valid)
                for rate in rates
            }
    return {"steps": steps, "movement": movement, "losses": losses}


def best_of(losses: dict[str, float]) -> float:
    """The learning rate at the lowest point of the parabola through the best three neighbours, over log(rate)."""
    rates, values = [float(rate) for rate in losses], list(losses.values())
    k = int(np.argmin(values))
    if not 0 < k < len(values) - 1 or not all(map(math.isfinite, values[k - 1 : k + 2])):
        return rates[k]
    bend, slope, _ = np.polyfit(np.log(rates[k - 1 : k + 2]), values[k - 1 : k + 2], 2)
    return float(np.exp(-slope / (2 * bend))) if bend > 0 else rates[k]


def changes(results: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """{scale: (movement at the largest rank / at the reference, best rate likewise)}."""
    found = {}
    for scale in SCALES:
        movement, losses = results["movement"][scale], results["losses"][scale]
        small, large = str(REFERENCE), max(losses, key=int)
        found[scale] = (movement[large] / movement[small], best_of(losses[large]) / best_of(losses[small]))
    return found


def factor(ratio: float) -> float:
    """How large a change is, whichever way it goes."""
    return max(ratio, 1 / ratio)


def verdict(results: dict[str, Any]) -> Verdict:
    found = changes(results)
    moved, shifted = found["alpha / r"]
    kept = factor(moved) <= MOVEMENT and factor(shifted) <= SHIFT
    needed = factor(found["no scale"][1]) > factor(shifted)
    rank = max(results["losses"]["alpha / r"], key=int)
    root = found["alpha / sqrt(r)"]
    return Verdict(
        both(kept, needed),
        f"from rank {REFERENCE} to {rank} the first step moves the logits {moved:.2f} times as far under alpha / r, "
        f"{root[0]:.1f} times under rsLoRA and {found['no scale'][0]:.1f} times without a scale; the best learning "
        f"rate becomes {shifted:.2f} times what it was, {root[1]:.2f} times and {found['no scale'][1]:.2f} times "
        f"(asked under alpha / r: within factors of {MOVEMENT:g} and {SHIFT:g}, and a larger change without)",
    )


def rows(results: dict[str, Any]) -> str:
    lines = []
    for scale in SCALES:
        for rank, losses in results["losses"][scale].items():
            moved = f"{results['movement'][scale][rank]:.2g}"
            lines.append([scale, rank, moved, f"{best_of(losses):.1e}", *(f"{value:.3f}" for value in losses.values())])
    rates = results["losses"][SCALES[0]][str(REFERENCE)]
    return table(["scale", "rank", "first step", "best rate", *(f"loss at {rate}" for rate in rates)], lines)


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("rank", "RMS change of the logits, first step", panels=2)
    first, second = figure.axes
    for number, scale in enumerate(SCALES):
        style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4}
        movement = results["movement"][scale]
        first.plot([int(rank) for rank in movement], list(movement.values()), label=scale, **style)
        losses = results["losses"][scale]
        rank = max(losses, key=int)
        points = [(float(rate), value) for rate, value in losses[rank].items() if math.isfinite(value)]
        second.plot(*zip(*points, strict=True), label=f"rank {rank}, {scale}", **style)
    reference = results["losses"][SCALES[0]][str(REFERENCE)]
    points = [(float(rate), value) for rate, value in reference.items() if math.isfinite(value)]
    second.plot(*zip(*points, strict=True), "^--", color=COLOURS[6], markersize=4, label=f"rank {REFERENCE}, all three")
    first.set(xscale="log", yscale="log")
    first.minorticks_off()
    first.set_xticks([int(rank) for rank in movement], list(movement))
    second.set(xscale="log", xlabel="learning rate", ylabel="loss on other dates (nats)")
    save(figure, path)
