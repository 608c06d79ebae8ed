"""alpha / r keeps the learning rate that suits one rank right for the others

Claim. With ΔW = (alpha / r) B A and alpha fixed, the learning rate need not be tuned again when r is changed (Hu et al.
2021, section 4.1). rsLoRA's alpha / sqrt(r) (Kalajdzievski 2023, "A rank stabilization scaling factor") is meant for
large ranks, which learn slowly otherwise.

Measured. Three scales that agree at rank 4 (all are 4 there): alpha / r, alpha / sqrt(r), and none that depends on r.
First, how far one step of Adam at one learning rate moves the logits, at ranks 1 to 64. Adam moves every entry of B by
the learning rate, and B A x sums r of them, all of one sign with respect to x at the first step: so the movement should
be as the scale times r. Second, ranks 4 and 64 are trained on dates at five learning rates, each three times the one
before, under each scale; the best learning rate is where a parabola through the losses of the best and its neighbours,
over log(rate), is lowest. Medians over the seeds.

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

from .common import Base, Verdict, both, dates, error_bars, load, loss, median, spread, table, trained
from .picture import COLOURS, MARKERS, Figure, save

REFERENCE, ALPHA = 4, 16
SCALES = ("alpha / r", "alpha / sqrt(r)", "no scale")
MOVEMENT, SHIFT = 1.5, 3.0
SETTINGS = {"smollm2": {"rates": (1e-4, 3e-4, 9e-4, 2.7e-3, 8.1e-3), "batch_size": 8, "seeds": 2}}


def way_of(scale: str, rank: int) -> ml.LoraConfig:
    """All three scales are ALPHA / REFERENCE at the reference rank."""
    if scale == "alpha / sqrt(r)":
        return ml.LoraConfig(r=rank, alpha=ALPHA / math.sqrt(REFERENCE), use_rslora=True)
    return ml.LoraConfig(r=rank, alpha=ALPHA if scale == "alpha / r" else ALPHA / REFERENCE * rank)


def measure(
    base: Base,
    ranks: Sequence[int] = (1, 4, 16, 64),
    rates: Sequence[float] = (2.5e-4, 7.5e-4, 2.25e-3, 6.75e-3, 2e-2),
    steps: int = 40,
    batch_size: int = 16,
    seeds: int = 3,
) -> dict[str, Any]:
    """{"movement": {scale: {rank: RMS changes of the logits}}, "losses": {scale: {rank: {rate: losses}}}}, by seed."""
    model = load(base)
    task = dates(model)
    movement: dict[str, dict[str, list[float]]] = {scale: {} for scale in SCALES}
    probe = batches(task.valid[:16], 16, shuffle=False)[0].tokens
    before = np.array(ml.to_numpy(model.logits(probe)))
    for scale in SCALES:
        for rank in ranks:
            movement[scale][str(rank)] = []
            for seed in range(seeds):
                tuned = trained(base, way_of(scale, rank), task.train, 1e-4, 1, batch_size, seed)
                moved = ml.to_numpy(tuned.logits(probe)) - before
                movement[scale][str(rank)].append(float(np.sqrt(np.mean(np.square(moved)))))
    losses: dict[str, dict[str, dict[str, list[float]]]] = {scale: {} for scale in SCALES}
    for rank in (REFERENCE, max(ranks)):
        for scale in SCALES:
            if rank == REFERENCE and scale != SCALES[0]:
                losses[scale][str(rank)] = losses[SCALES[0]][str(rank)]  # the same scale, so the same run
                continue
            losses[scale][str(rank)] = {
                f"{rate:g}": [
                    loss(trained(base, way_of(scale, rank), task.train, rate, steps, batch_size, seed), task.valid)
                    for seed in range(seeds)
                ]
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


def by_seed(losses: dict[str, list[float]]) -> list[dict[str, float]]:
    """{rate: loss} of each seed."""
    count = len(next(iter(losses.values())))
    return [{rate: found[seed] for rate, found in losses.items()} for seed in range(count)]


def best_rates(losses: dict[str, list[float]]) -> list[float]:
    """The best learning rate of each seed."""
    return [best_of(found) for found in by_seed(losses)]


def changes(results: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """{scale: (movement at the largest rank / at the reference, best rate likewise)}: medians over the seeds."""
    found = {}
    for scale in SCALES:
        movement, losses = results["movement"][scale], results["losses"][scale]
        small, large = str(REFERENCE), max(losses, key=int)
        moved = [after / before for after, before in zip(movement[large], movement[small], strict=True)]
        rates = zip(best_rates(losses[large]), best_rates(losses[small]), strict=True)
        found[scale] = (median(moved), median(after / before for after, before in rates))
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
            moved, rate = results["movement"][scale][rank], best_rates(losses)
            lines.append(
                [
                    scale,
                    rank,
                    f"{median(moved):.2g}",
                    spread(rate, ".1e"),
                    *(f"{median(v):.3f}" for v in losses.values()),
                ]
            )
    rates = results["losses"][SCALES[0]][str(REFERENCE)]
    return table(["scale", "rank", "first step", "best rate", *(f"loss at {rate}" for rate in rates)], lines)


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("rank", "RMS change of the logits, first step", panels=2)
    first, second = figure.axes
    for number, scale in enumerate(SCALES):
        style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4, "capsize": 3}
        movement = results["movement"][scale]
        moved = list(movement.values())
        middles = [median(values) for values in moved]
        first.errorbar([int(rank) for rank in movement], middles, error_bars(moved), label=scale, **style)
        losses = results["losses"][scale]
        rank = max(losses, key=int)
        second.errorbar(*curve(losses[rank]), label=f"rank {rank}, {scale}", **style)
    reference = results["losses"][SCALES[0]][str(REFERENCE)]
    style = {"fmt": "^--", "color": COLOURS[6], "markersize": 4, "capsize": 3}
    second.errorbar(*curve(reference), label=f"rank {REFERENCE}, all three", **style)
    first.set(xscale="log", yscale="log")
    first.minorticks_off()
    first.set_xticks([int(rank) for rank in movement], list(movement))
    second.set(xscale="log", xlabel="learning rate", ylabel="loss on other dates (nats)")
    save(figure, path)


def curve(losses: dict[str, list[float]]) -> tuple[list[float], list[float], np.ndarray]:
    """Rates, median losses and their error bars, where no seed blew up."""
    finite = {float(rate): found for rate, found in losses.items() if all(map(math.isfinite, found))}
    return list(finite), [median(found) for found in finite.values()], error_bars(list(finite.values()))
