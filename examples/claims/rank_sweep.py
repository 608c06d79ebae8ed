"""A small rank is enough

Claim. Fine-tuning needs few directions: a rank as small as 8 does about as well as training everything, and a larger
one adds little (Hu et al. 2021, section 7.2, table 6).

Measured. The dates of `minilora demo` are learned by LoRA on all linear layers, ranks 1 to 64 at the same alpha, and by
full fine-tuning, for the same number of steps. Full fine-tuning takes the best of its learning rates, LoRA the best of
its own at rank 8, both chosen on rows of their own; all other runs use those. The score is the loss on 200 other dates,
as the share of full fine-tuning's improvement: (base - LoRA) / (base - full), medians over the seeds; beside them the
lowest and the highest. Rows written exactly right are counted, too.

Refuted. If rank 8 reaches less than 90 % of full fine-tuning's improvement, or if rank 64 reaches over 5 points more
than rank 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import minilora as ml

from .common import (
    FULL,
    Base,
    Verdict,
    Way,
    both,
    dates,
    error_bars,
    exact_share,
    load,
    loss,
    median,
    over_seeds,
    spread,
    table,
    trained,
)
from .common import trained_parameters as parameters
from .picture import COLOURS, Figure, save

ENOUGH, MORE = 0.90, 0.05
SETTINGS = {"smollm2": {"rates": (1e-3, 2e-3), "full_rates": (1e-4, 2e-4), "steps": 80, "batch_size": 8}}


def measure(
    base: Base,
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    rates: Sequence[float] = (4e-3, 8e-3),
    full_rates: Sequence[float] = (1e-3, 2e-3),
    steps: int = 120,
    batch_size: int = 16,
    seeds: int = 3,
) -> dict[str, Any]:
    """{"base": loss, "runs": [{"rank" (None: full), "lr", "parameters", "losses", "exact" by seed}]}."""
    model = load(base)
    task = dates(model)

    def run(way: Way, lr: float, seed: int) -> ml.Model:
        return trained(base, way, task.train, lr, steps, batch_size, seed)

    full_rate, full = over_seeds(full_rates, seeds, lambda lr, seed: run(FULL, lr, seed), task.valid)
    rate, eight = over_seeds(rates, seeds, lambda lr, seed: run(way_of(8), lr, seed), task.valid)
    runs = []
    for rank in (None, *ranks):
        lr = full_rate if rank is None else rate
        models = {None: full, 8: eight}.get(rank) or [run(way_of(rank), lr, seed) for seed in range(seeds)]
        runs.append(
            {
                "rank": rank,
                "lr": lr,
                "parameters": parameters(models[0]),
                "losses": [loss(one, task.test) for one in models],
                "exact": [exact_share(one, task.test) for one in models],
            }
        )
    return {"steps": steps, "base": loss(model, task.test), "runs": runs}


def way_of(rank: int | None) -> Way:
    return FULL if rank is None else ml.LoraConfig(r=rank, alpha=16)


def shares(results: dict[str, Any]) -> dict[int | None, float]:
    """{rank: the share of full fine-tuning's improvement that it reaches} (None: full, 1)."""
    losses = {run["rank"]: median(run["losses"]) for run in results["runs"]}
    gain = results["base"] - losses[None]
    return {rank: (results["base"] - value) / gain for rank, value in losses.items()}


def verdict(results: dict[str, Any]) -> Verdict:
    found = shares(results)
    small, large = found[8], found[max(rank for rank in found if rank is not None)]
    enough, no_more = small >= ENOUGH, large - small <= MORE
    return Verdict(
        both(enough, no_more),
        f"rank 8 reaches {small:.0%} of full fine-tuning's improvement (asked: {ENOUGH:.0%}), the largest rank "
        f"{round(100 * (large - small)):+d} points more (allowed: {100 * MORE:.0f})",
    )


def rows(results: dict[str, Any]) -> str:
    found = shares(results)
    return table(
        ["rank", "trained parameters", "learning rate", "loss", "share of full's improvement", "exactly right"],
        [
            [
                "full" if run["rank"] is None else run["rank"],
                f"{run['parameters']:,}",
                f"{run['lr']:g}",
                spread(run["losses"]),
                f"{found[run['rank']]:.0%}",
                spread(run["exact"], ".0%"),
            ]
            for run in results["runs"]
        ],
    )


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("rank", "loss on other dates (nats, logarithmic)")
    axis = figure.axis
    lora = [run for run in results["runs"] if run["rank"] is not None]
    (full,) = [run for run in results["runs"] if run["rank"] is None]
    ranks = [run["rank"] for run in lora]
    losses = [run["losses"] for run in lora]
    middles = [median(values) for values in losses]
    axis.errorbar(ranks, middles, error_bars(losses), fmt="o-", capsize=3, color=COLOURS[0], label="LoRA")
    axis.axhline(median(full["losses"]), color=COLOURS[1], linestyle="--", label="full fine-tuning")
    axis.axhspan(min(full["losses"]), max(full["losses"]), color=COLOURS[1], alpha=0.2, linewidth=0)
    axis.axhline(results["base"], color=COLOURS[7], linestyle=":", label="base")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    save(figure, path)
