"""The trade-off: what is far from all that the base knows is learned better with every parameter

Claim. LoRA's ΔW of low rank suffices where the task is near to what the base knows; one that is far from it, such as
another language, may need more (Hu et al. 2021, section 7.2, the footnote to table 6).

Measured. Another language is made of passages of the King James Bible: each letter is replaced by the one 13 places on
in the alphabet, so that the base has seen none of its words. Full fine-tuning, and LoRA on all linear layers of ranks 8
and 64, learn it for the same number of steps, each at the best of two learning rates, chosen on rows of their own. The
score is the loss on 40 other passages, as the share of full fine-tuning's improvement that LoRA reaches, the median
over the seeds; beside it the lowest and the highest. The last line is LoRA of rank 8 that trains the embeddings whole,
too.

Refuted. If the best of LoRA's ranks reaches 90 % of full fine-tuning's improvement or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import minilora as ml

from .common import (
    FULL,
    Base,
    Verdict,
    Way,
    error_bars,
    load,
    loss,
    median,
    other_language,
    over_seeds,
    spread,
    table,
    trained,
    trained_parameters,
)
from .picture import COLOURS, Figure, save

ENOUGH = 0.90
EMBEDDINGS = "LoRA, rank 8, and embeddings"
WAYS: dict[str, Way] = {
    "full fine-tuning": FULL,
    **{f"LoRA, rank {rank}": ml.LoraConfig(r=rank, alpha=16) for rank in (8, 64)},
    EMBEDDINGS: ml.LoraConfig(r=8, alpha=16, modules_to_save=["embed_tokens"]),
}
SETTINGS = {"smollm2": {"rates": (1e-3, 2e-3), "full_rates": (1e-4, 3e-4)}}


def measure(
    base: Base,
    ways: Mapping[str, Way] = WAYS,
    rates: Sequence[float] = (2e-3, 6e-3),
    full_rates: Sequence[float] = (1e-3, 3e-3),
    steps: int = 80,
    batch_size: int = 4,
    seeds: int = 3,
) -> dict[str, Any]:
    """{"base": loss, "runs": [{"way", "lr", "parameters", "losses" by seed}]}."""
    model = load(base)
    task = other_language(model)
    runs = []
    for name, way in ways.items():

        def run(lr: float, seed: int, way: Way = way) -> ml.Model:
            return trained(base, way, task.train, lr, steps, batch_size, seed)

        lr, models = over_seeds(full_rates if way is FULL else rates, seeds, run, task.valid)
        losses = [loss(tuned, task.test) for tuned in models]
        runs.append({"way": name, "lr": lr, "parameters": trained_parameters(models[0]), "losses": losses})
    return {"steps": steps, "base": loss(model, task.test), "runs": runs}


def by_seed(results: dict[str, Any]) -> dict[str, list[float]]:
    """{way: by seed, the share that it reaches of full fine-tuning's improvement (its median)}."""
    losses = {run["way"]: run["losses"] for run in results["runs"]}
    gain = results["base"] - median(losses["full fine-tuning"])
    return {name: [(results["base"] - value) / gain for value in found] for name, found in losses.items()}


def shares(results: dict[str, Any]) -> dict[str, float]:
    """{way: the share of full fine-tuning's improvement that it reaches}, the medians."""
    return {name: median(found) for name, found in by_seed(results).items()}


def verdict(results: dict[str, Any]) -> Verdict:
    found = shares(results)
    low_rank = {name: share for name, share in found.items() if name not in ("full fine-tuning", EMBEDDINGS)}
    best = max(low_rank, key=lambda name: low_rank[name])
    return Verdict(
        low_rank[best] < ENOUGH,
        f"the best of LoRA ({best.removeprefix('LoRA, ')}) reaches {low_rank[best]:.0%} of full fine-tuning's "
        f"improvement (asked: less than {ENOUGH:.0%})",
    )


def rows(results: dict[str, Any]) -> str:
    found = by_seed(results)
    return table(
        ["", "trained parameters", "learning rate", "loss", "share of full's improvement"],
        [
            [run["way"], f"{run['parameters']:,}", f"{run['lr']:g}", spread(run["losses"]),
             spread(found[run["way"]], ".0%")]
            for run in results["runs"]
        ],
    )  # fmt: skip


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("share of full fine-tuning's improvement", "")
    found = by_seed(results)
    names = list(reversed(found))
    for place, name in enumerate(names):
        colour = COLOURS[1] if name == "full fine-tuning" else COLOURS[2] if name == EMBEDDINGS else COLOURS[0]
        bars = {"xerr": error_bars([found[name]]), "capsize": 3}
        figure.axis.barh(place, median(found[name]), color=colour, height=0.6, **bars)
    figure.axis.axvline(ENOUGH, color=COLOURS[7], linestyle=":", linewidth=1)
    figure.axis.set_yticks(range(len(names)), names)
    save(figure, path)
