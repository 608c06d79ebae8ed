"""LoRA forgets less of what the base knew

Claim. Full fine-tuning on a narrow task spoils what the model could do before; LoRA, which leaves W as it is and adds a
small ΔW, spoils less (a consequence of Hu et al. 2021, section 4; measured by Biderman et al. 2024, "LoRA learns less
and forgets less").

Measured. Both learn the dates of `minilora demo`, each at three learning rates. Several times on the way two losses are
taken: of 100 other dates (learned), and of English that the training of `mini` held back (forgotten; its perplexity is
e^loss). Who learns less forgets less, so they are compared where both have learned alike: where the loss on dates
reaches the same level, straight lines being drawn between the stops. The levels are shares of what both have learned
in the end, with every seed; at each, a way may take the learning rate that forgets least. Forgetting is the rise of
the loss on English over the base's, the median over the seeds.

Refuted. If at the last level LoRA's rise is more than 80 % of full fine-tuning's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import minilora as ml

from .common import FULL, Base, Verdict, Way, dates, general_text, load, loss, median, spread, table, trained
from .picture import COLOURS, Figure, save

LESS = 0.8
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)  # of what both learn
WAYS: dict[str, Way] = {"full fine-tuning": FULL, "LoRA, rank 8": ml.LoraConfig(r=8, alpha=16)}
WHY_NOT = {
    "mini": "Until 95 % of it is learned LoRA forgets a fifth less or so. The last per cent decide: there the gentlest "
    "of LoRA's rates has run out of steps, and the next one is "
    "compared with the gentlest of full fine-tuning's. How fast one learns matters more here than how: between the "
    "lowest and the highest rate full fine-tuning's rise on English grows from a quarter of a nat to over two.",
}
SETTINGS = {
    "smollm2": {
        "rates": (5e-4, 1e-3, 2e-3), "full_rates": (5e-5, 1e-4, 2e-4), "steps": 100, "batch_size": 8,
        "stops": (0.1, 0.2, 0.4, 0.7, 1.0),
    }
}  # fmt: skip


def measure(
    base: Base,
    rates: Sequence[float] = (2e-3, 4e-3, 8e-3),
    full_rates: Sequence[float] = (5e-4, 1e-3, 2e-3),
    steps: int = 150,
    batch_size: int = 16,
    stops: Sequence[float] = (0.08, 0.16, 0.3, 0.5, 0.75, 1.0),
    seeds: int = 3,
) -> dict[str, Any]:
    """{"base": {"task", "english"}, "points": [{"way", "lr", "seed", "step", "task", "english"}]}: losses.

    stops: shares of the steps.
    """
    model = load(base)
    task, english = dates(model), general_text(model)[::2]
    test = task.test[:100]
    places = [round(steps * share) for share in stops]
    points: list[dict[str, Any]] = []
    for name, way in WAYS.items():
        for lr in full_rates if way is FULL else rates:
            for seed in range(seeds):
                where = {"way": name, "lr": lr, "seed": seed}

                def note(tuned: ml.Model, step: int, where: dict[str, Any] = where) -> None:
                    if step in places:
                        points.append(
                            {**where, "step": step, "task": loss(tuned, test), "english": loss(tuned, english)}
                        )

                trained(base, way, task.train, lr, steps, batch_size, seed, note)
    return {"steps": steps, "base": {"task": loss(model, test), "english": loss(model, english)}, "points": points}


def runs_of(results: dict[str, Any]) -> dict[str, dict[int, dict[float, list[dict[str, Any]]]]]:
    """{way: {seed: {learning rate: its points, in order}}}."""
    found: dict[str, dict[int, dict[float, list[dict[str, Any]]]]] = {name: {} for name in WAYS}
    for point in sorted(results["points"], key=lambda point: point["step"]):
        found[point["way"]].setdefault(point["seed"], {}).setdefault(point["lr"], []).append(point)
    return found


def levels(results: dict[str, Any]) -> dict[float, float]:
    """{share: the loss on dates there} of SHARES of the improvement that both ways reach with every seed."""
    lowest = [
        min(point["task"] for points in rates.values() for point in points)
        for seeds in runs_of(results).values()
        for rates in seeds.values()
    ]
    before, reached = results["base"]["task"], max(lowest)
    return {share: before - share * (before - reached) for share in SHARES}


def english_at(level: float, before: dict[str, float], points: list[dict[str, Any]]) -> float:
    """A run's loss on English where its loss on dates first comes down to the level; infinite where it never does."""
    for last, point in zip([before, *points], points, strict=False):
        if point["task"] <= level:
            share = (last["task"] - level) / (last["task"] - point["task"])
            return float(last["english"] + share * (point["english"] - last["english"]))
    return math.inf


def rises(results: dict[str, Any]) -> dict[str, dict[float, list[float]]]:
    """{way: {share of what is learned: by seed, the least rise of the loss on English}}."""
    before, found = results["base"], runs_of(results)
    return {
        name: {
            share: [
                min(english_at(level, before, points) for points in rates.values()) - before["english"]
                for rates in found[name].values()
            ]
            for share, level in levels(results).items()
        }
        for name in WAYS
    }


def verdict(results: dict[str, Any]) -> Verdict:
    full, lora = (median(shares[SHARES[-1]]) for shares in rises(results).values())
    if full <= 0:
        return Verdict(False, f"full fine-tuning forgot nothing: its loss on English changed by {full:+.3f} nats")
    return Verdict(
        lora <= LESS * full,
        f"having learned alike, LoRA's loss on English has risen by {lora:.2f} nats, full fine-tuning's by {full:.2f}: "
        f"{lora / full:.0%} of it (asked: at most {LESS:.0%})",
    )


def rows(results: dict[str, Any]) -> str:
    base, found = results["base"], rises(results)
    compared = table(
        ["of what both learn", "loss on dates", *(f"rise on English, {name}" for name in WAYS), "perplexity of both"],
        [
            [
                f"{share:.0%}",
                f"{level:.3f}",
                *(spread(found[name][share], "+.2f") for name in WAYS),
                ", ".join(perplexity(base["english"] + median(found[name][share])) for name in WAYS),
            ]
            for share, level in levels(results).items()
        ],
    )
    return (
        f"{compared}\n\nThe base: a loss of {base['task']:.3f} on dates, of {base['english']:.3f} on English "
        f"(perplexity {perplexity(base['english'])})."
    )


def perplexity(nats: float) -> str:
    return f"{math.exp(nats):,.0f}" if nats < 20 else "over 10⁸"


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("loss on dates (learned: to the left)", "loss on English (forgotten: up)", panels=2)
    first, second = figure.axes
    found = rises(results)
    for number, name in enumerate(WAYS):
        style = {"color": COLOURS[number], "markersize": 3}
        by_rate = zip(*(rates.values() for rates in runs_of(results)[name].values()), strict=True)
        for place, runs in enumerate(by_rate):  # the same rate with each seed
            xs, ys = ([median(p[of] for p in points) for points in zip(*runs, strict=True)] for of in results["base"])
            marks = "os"[number] + ("-" if number else "--")
            first.plot(xs, ys, marks, linewidth=1, label=None if place else f"{name}, each rate", **style)
        shares = [100 * share for share in SHARES]
        at = list(found[name].values())
        second.plot(shares, [median(values) for values in at], "os"[number] + "-", label=name, **style)
        second.fill_between(shares, [min(v) for v in at], [max(v) for v in at], color=COLOURS[number], alpha=0.2)
    first.axhline(results["base"]["english"], color=COLOURS[7], linestyle=":", label="base, on English")
    first.set_xscale("log")
    second.set(xlabel="learned, % of what both learn", ylabel="least rise on English (nats)")
    save(figure, path)
