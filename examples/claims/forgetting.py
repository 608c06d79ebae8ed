"""LoRA forgets less of what the base knew

Claim. Full fine-tuning on a narrow task spoils what the model could do before; LoRA, which leaves W as it is and adds a
small ΔW, spoils less (a consequence of Hu et al. 2021, section 4; measured by Biderman et al. 2024, "LoRA learns less
and forgets less").

Measured. Both learn the dates of `minilora demo`, each at three learning rates. Four times on the way two losses are
taken: of 200 other dates (learned), and of English that the base's training held back (forgotten; its perplexity is
e^loss). Who learns less forgets less, so they are compared where both have learned alike: among the points of each
that have learned as much as the best of the weaker one, the point with the lowest loss on English. Forgetting is the
rise of that loss over the base's, the median over the seeds.

Refuted. If LoRA's rise is more than 80 % of full fine-tuning's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml

from .common import FULL, Verdict, Way, dates, general_text, load, loss, median, table, trained
from .picture import COLOURS, Figure, save

LESS = 0.8
WAYS: dict[str, Way] = {"full fine-tuning": FULL, "LoRA, rank 8": ml.LoraConfig(r=8, alpha=16)}


def measure(
    model: str,
    rates: Sequence[float] = (2e-3, 4e-3, 8e-3),
    full_rates: Sequence[float] = (5e-4, 1e-3, 2e-3),
    steps: int = 120,
    seeds: int = 1,
) -> dict[str, Any]:
    """{"base": {"task", "english"}, "points": [{"way", "lr", "seed", "step", "task", "english"}]}: losses."""
    base = load(model)
    task, english = dates(base), general_text(base)
    stops = [round(steps * quarter / 4) for quarter in (1, 2, 3, 4)]
    points: list[dict[str, Any]] = []
    for name, way in WAYS.items():
        for lr in full_rates if way is FULL else rates:
            for seed in range(seeds):
                where = {"way": name, "lr": lr, "seed": seed}

                def note(tuned: ml.Model, step: int, where: dict[str, Any] = where) -> None:
                    if step in stops:
                        losses = {"task": loss(tuned, task.test), "english": loss(tuned, english)}
                        points.append({**where, "step": step, **losses})

                trained(model, way, task.train, lr, steps, seed=seed, each_step=note)
    return {"steps": steps, "base": {"task": loss(base, task.test), "english": loss(base, english)}, "points": points}


def least_forgetting(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{way: for each seed the point of least forgetting among those that learned as much as both ways can}."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for seed in sorted({point["seed"] for point in results["points"]}):
        mine = {name: [p for p in results["points"] if (p["way"], p["seed"]) == (name, seed)] for name in WAYS}
        both_reach = max(min(point["task"] for point in points) for points in mine.values())
        for name, points in mine.items():
            enough = [point for point in points if point["task"] <= both_reach]
            found[name].append(min(enough, key=lambda point: point["english"]))
    return found


def rises(results: dict[str, Any]) -> dict[str, float]:
    """{way: the rise of the loss on English}, the median over the seeds."""
    before = results["base"]["english"]
    return {name: median(p["english"] - before for p in points) for name, points in least_forgetting(results).items()}


def verdict(results: dict[str, Any]) -> Verdict:
    full, lora = rises(results).values()
    if full <= 0:
        return Verdict(False, f"full fine-tuning forgot nothing: its loss on English changed by {full:+.3f} nats")
    return Verdict(
        lora <= LESS * full,
        f"having learned alike, LoRA's loss on English has risen by {lora:.2f} nats, full fine-tuning's by {full:.2f}: "
        f"{lora / full:.0%} of it (asked: at most {LESS:.0%})",
    )


def rows(results: dict[str, Any]) -> str:
    base = results["base"]
    lines = [["base", "", f"{base['task']:.3f}", f"{base['english']:.3f}", perplexity(base["english"])]]
    for name, points in least_forgetting(results).items():
        rates = ", ".join(f"{point['lr']:g} × {point['step']}" for point in points)
        english = median(point["english"] for point in points)
        task = median(point["task"] for point in points)
        lines.append([name, rates, f"{task:.3f}", f"{english:.3f}", perplexity(english)])
    compared = table(
        ["", "learning rate × steps, by seed", "loss on dates", "loss on held-out English", "its perplexity"], lines
    )
    earlier = table(
        ["least rise on English where the loss on dates is at most", *WAYS],
        [[f"{level:.2f}", *(f"{rise:+.2f}" for rise in rises)] for level, rises in at_levels(results).items()],
    )
    return f"{compared}\n\nHow it is where both have learned less, all seeds together:\n\n{earlier}"


def at_levels(results: dict[str, Any]) -> dict[float, list[float]]:
    """{loss on dates: each way's least rise on English among its points at or below}, from little to much learned."""
    mine = [[point for point in results["points"] if point["way"] == name] for name in WAYS]
    first = min(max(point["task"] for point in points) for points in mine)
    last = max(min(point["task"] for point in points) for points in mine)
    before = results["base"]["english"]
    return {
        level: [min(p["english"] for p in points if p["task"] <= level) - before for points in mine]
        for level in np.linspace(first, last, 5).tolist()[:-1]
        if level >= last
    }


def perplexity(nats: float) -> str:
    return f"{math.exp(nats):,.0f}" if nats < 20 else "over 10⁸"


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("loss on dates (learned: to the left)", "loss on English (forgotten: up)")
    axis = figure.axis
    for number, name in enumerate(WAYS):
        points = [point for point in results["points"] if point["way"] == name]
        runs = sorted({(point["lr"], point["seed"]) for point in points})
        for lr, seed in runs:
            run = [point for point in points if (point["lr"], point["seed"]) == (lr, seed)]
            label = name if (lr, seed) == runs[0] else None
            style = {"color": COLOURS[number], "alpha": 0.7, "linewidth": 1, "markersize": 4}
            xs, ys = [point["task"] for point in run], [point["english"] for point in run]
            axis.plot(xs, ys, "os"[number] + ("-" if number else "--"), label=label, **style)
    axis.axhline(results["base"]["english"], color=COLOURS[7], linestyle=":", label="base, on English")
    save(figure, path)
