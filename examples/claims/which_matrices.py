"""At an equal number of parameters, more kinds of matrices are better than more rank in one

Claim. Given a budget of parameters it is better to adapt all kinds of attention matrices, or q and v, with a small
rank than a single kind with a large one (Hu et al. 2021, section 7.1, table 5).

Measured. As the paper's table 5, on dates: LoRA on q, k, v, o alone, on q and k, q and v, all four; and beyond the
paper on the matrices of the MLP, and on all linear layers. Each has the rank that brings its parameters nearest to
those of rank 2 on all linear layers; all have the same alpha and learning rate. The score is the loss on 200 other
dates, the median over the seeds.

Refuted. If some single kind is as good as the better of "q, v" and "q, k, v, o": within the largest difference that
two seeds made to one of them, or better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import minilora as ml

from .common import Base, Verdict, dates, fresh, load, loss, median, spread, table, trained, trained_parameters
from .picture import COLOURS, Figure, save

SINGLE = ("q", "k", "v", "o")
SPREAD = ("q, v", "q, k, v, o")
KINDS = {
    **{kind: [f"{kind}_proj"] for kind in SINGLE},
    "q, k": ["q_proj", "k_proj"],
    "q, v": ["q_proj", "v_proj"],
    "q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gate, up, down": ["gate_proj", "up_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SETTINGS = {"smollm2": {"lr": 2e-3, "batch_size": 8, "seeds": 3}}


def measure(
    base: Base,
    kinds: Mapping[str, Sequence[str]] = KINDS,
    smallest_rank: int = 2,
    lr: float = 6e-3,
    steps: int = 60,
    batch_size: int = 16,
    seeds: int = 5,
) -> dict[str, Any]:
    """{"base": loss, "runs": [{"kinds", "rank", "parameters", "losses" by seed}]}."""
    model = load(base)
    task = dates(model)
    per_rank = {name: parameters_at(base, targets, 1) for name, targets in kinds.items()}
    budget = smallest_rank * per_rank["all"]
    runs = []
    for name, targets in kinds.items():
        way = ml.LoraConfig(r=max(1, round(budget / per_rank[name])), alpha=16, target_modules=list(targets))
        models = [trained(base, way, task.train, lr, steps, batch_size, seed) for seed in range(seeds)]
        losses = [loss(one, task.test) for one in models]
        runs.append({"kinds": name, "rank": way.r, "parameters": trained_parameters(models[0]), "losses": losses})
    return {"lr": lr, "steps": steps, "base": loss(model, task.test), "runs": runs}


def parameters_at(base: Base, targets: Sequence[str], rank: int) -> int:
    model = fresh(base)
    model.add_adapter("a", ml.LoraConfig(r=rank, target_modules=list(targets)))
    return trained_parameters(model)


def verdict(results: dict[str, Any]) -> Verdict:
    found = {run["kinds"]: median(run["losses"]) for run in results["runs"]}
    compared = [run["losses"] for run in results["runs"] if run["kinds"] in SINGLE + SPREAD]
    noise = max(max(losses) - min(losses) for losses in compared)
    spread, single = (min((n for n in names if n in found), key=found.__getitem__) for names in (SPREAD, SINGLE))
    ahead = found[single] - found[spread]
    return Verdict(
        ahead > noise,
        f"the best of several kinds is {spread!r} with a loss of {found[spread]:.3f}, the best single kind {single!r} "
        f"with {found[single]:.3f}: {ahead:+.3f} (asked: more than {noise:.3f}, what another seed changes at most)",
    )


def rows(results: dict[str, Any]) -> str:
    return table(
        ["adapted", "rank", "trained parameters", "loss"],
        [
            [
                run["kinds"],
                run["rank"],
                f"{run['parameters']:,}",
                spread(run["losses"]),
            ]
            for run in results["runs"]
        ],
    )


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("loss on other dates (nats): median, and a stroke for each seed", "")
    axis = figure.axis
    runs = results["runs"][::-1]
    for place, run in enumerate(runs):
        colour = COLOURS[1] if run["kinds"] in SINGLE else COLOURS[0]
        axis.barh(place, median(run["losses"]), color=colour, height=0.65)
        axis.plot(run["losses"], [place] * len(run["losses"]), "|", color=COLOURS[6], markersize=10)
    axis.set_yticks(range(len(runs)), [f"{run['kinds']}  (rank {run['rank']})" for run in runs])
    save(figure, path)
