"""What full fine-tuning changes is of low rank

Claim. The change that a task needs, ΔW = W' - W of full fine-tuning, has a low intrinsic rank, so that matrices B A of
a small rank can hold it (Hu et al. 2021, sections 1 and 4.1).

Measured. Every parameter is trained on the dates of `minilora demo`. Of each linear layer's true ΔW the singular values
are computed in float64. All of it is done for several orders of the rows (seeds); the numbers are medians over them.
Then every ΔW is cut to its k largest singular values, B A being the nearest matrix of rank k, everything else staying
as trained, and the loss on 200 other dates is measured again: how much of the improvement is left, from the loss with
all ΔW at zero (k = 0) to that with them whole. Beside the spectra stands that of a random matrix of the same shape,
which has no low rank.

Refuted. If at rank 8 less than 90 % of the improvement that the linear layers bring is left; or if half of ‖ΔW‖²
(median over layers) takes over half the singular values that half of a random matrix's takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from minilora.backend import Array, array_module, matmul
from minilora.lora.statistics import effective_rank
from minilora.nn import Linear

from .common import FULL, Base, Verdict, both, dates, error_bars, load, loss, median, over_seeds, spread, table, trained
from .picture import COLOURS, Figure, save

RANK, ENOUGH, HALF = 8, 0.90, 0.5
SETTINGS = {"smollm2": {"rates": (1e-4,), "steps": 60, "batch_size": 8, "seeds": 1}}


def measure(
    base: Base,
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    rates: Sequence[float] = (1e-3, 2e-3),
    steps: int = 120,
    batch_size: int = 16,
    seeds: int = 3,
) -> dict[str, Any]:
    """{"base": loss, "runs": for each seed what `update_of` finds, "random": {"energy", "spectrum"}}."""
    model = load(base)
    task = dates(model)
    before = linear_weights(model)

    def run(lr: float, seed: int) -> ml.Model:
        return trained(base, FULL, task.train, lr, steps, batch_size, seed)

    lr, models = over_seeds(rates, seeds, run, task.valid)
    chance = [random_values(*weight.shape) for weight in before.values()]
    return {
        "lr": lr,
        "steps": steps,
        "base": loss(model, task.test),
        "runs": [update_of(tuned, before, ranks, lambda tuned: loss(tuned, task.test)) for tuned in models],
        "random": {"half": median(map(values_for_half, chance)), **curves(chance, ranks)},
    }


def update_of(
    tuned: ml.Model, before: dict[str, Array], ranks: Sequence[int], score: Callable[[ml.Model], float]
) -> dict[str, Any]:
    """{"full": loss, "cut": {rank: loss}, "layers": [...], "energy": {rank: share}, "spectrum": σ_i / σ_1}.

    Of each layer its effective rank, and how many singular values hold half of ‖ΔW‖²; the last two are medians over the
    layers: the share of ‖ΔW‖² in the largest, and how they fall. Leaves the model's linear layers cut.
    """
    whole = score(tuned)
    updates = {}
    for name, after in linear_weights(tuned).items():
        update = after.astype(np.float64) - before[name]
        updates[name] = update if update.shape[0] <= update.shape[1] else update.T.copy()
    parts = {name: singular_values(update) for name, update in updates.items()}
    cut = {}
    for rank in (0, *ranks):
        for name, weight in linear_weights(tuned).items():
            weight[...] = before[name]
            if rank:
                first = parts[name][1][:, :rank].copy()
                near = matmul(first, matmul(first.T, updates[name]))  # U_k U_kᵀ ΔW is ΔW cut to its k largest
                weight += near if near.shape == weight.shape else near.T
        cut[str(rank)] = score(tuned)
    values = {name: found for name, (found, _) in parts.items()}
    return {
        "full": whole,
        "cut": cut,
        "layers": [
            {"name": name, "effective_rank": effective_rank(found), "half": values_for_half(found)}
            for name, found in values.items()
        ],
        **curves(list(values.values()), ranks),
    }


def singular_values(update: Array) -> tuple[np.ndarray, Array]:
    """(σ, largest first; the left singular vectors in columns) of D with no more rows than columns, in float64.

    From D Dᵀ = U diag(σ²) Uᵀ, many times faster than the SVD: what is below 1e-8 of σ_1 is rounding.
    """
    squares, vectors = array_module(update).linalg.eigh(matmul(update, update.T))
    return np.sqrt(np.maximum(ml.to_numpy(squares)[::-1], 0.0)), vectors[:, ::-1].copy()


@cache
def random_values(rows: int, columns: int) -> np.ndarray:
    """The singular values of a random matrix of that shape."""
    return np.linalg.svd(np.random.default_rng(0).normal(size=(rows, columns)), compute_uv=False)


def curves(found: list[np.ndarray], ranks: Sequence[int]) -> dict[str, Any]:
    """Medians over layers: {rank: the share of ‖ΔW‖² in that many singular values}, and the list of σ_i / σ_1."""
    shortest = min(map(len, found))
    return {
        "energy": {str(rank): median(energy(values, rank) for values in found) for rank in (0, *ranks)},
        "spectrum": np.median([values[:shortest] / values[0] for values in found], axis=0).round(6).tolist(),
    }


def linear_weights(model: ml.Model) -> dict[str, Array]:
    """The weights of all linear layers but the head (which is tied to the embedding), by name."""
    modules = dict(model.network.named_modules())
    return {
        name: module.weight.data
        for name, module in modules.items()
        if isinstance(module, Linear) and not name.endswith("lm_head")
    }


def left(results: dict[str, Any]) -> dict[int, list[float]]:
    """{k: the share of the improvement that is left with every ΔW cut to rank k, by seed}."""
    runs = results["runs"]
    return {
        int(rank): [(run["cut"]["0"] - run["cut"][rank]) / (run["cut"]["0"] - run["full"]) for run in runs]
        for rank in runs[0]["cut"]
    }


def energy(values: np.ndarray, rank: int) -> float:
    """The share of ‖ΔW‖² = Σσ² that the `rank` largest singular values hold."""
    return float(np.square(values[:rank]).sum() / np.square(values).sum())


def values_for_half(values: np.ndarray) -> int:
    """How many of the largest singular values hold half of ‖ΔW‖²."""
    squares = np.cumsum(np.square(values))
    return int(np.searchsorted(squares, squares[-1] / 2)) + 1


def verdict(results: dict[str, Any]) -> Verdict:
    kept = median(left(results)[RANK])
    ours = median(median(layer["half"] for layer in run["layers"]) for run in results["runs"])
    chance = results["random"]["half"]
    return Verdict(
        both(kept >= ENOUGH, ours <= HALF * chance),
        f"cut to rank {RANK}, ΔW keeps {kept:.0%} of what it brings (asked: {ENOUGH:.0%}); half of its energy lies in "
        f"{ours:g} singular values, of a random matrix in {chance:g} (asked: at most {HALF:.0%} of them)",
    )


def rows(results: dict[str, Any]) -> str:
    runs, random = results["runs"], results["random"]["energy"]
    return table(
        ["rank that every ΔW is cut to", "loss", "improvement left", "‖ΔW‖² left", "of a random matrix"],
        [
            [rank, spread([run["cut"][rank] for run in runs]), spread(left(results)[int(rank)], ".0%"),
             spread([run["energy"][rank] for run in runs], ".0%"), f"{random[rank]:.0%}"]
            for rank in random
        ],
    )  # fmt: skip


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("rank that every ΔW is cut to", "share left", panels=2)
    first, second = figure.axes
    runs, random = results["runs"], results["random"]
    kept = {rank: shares for rank, shares in left(results).items() if rank}
    ranks = list(kept)
    held = [[run["energy"][str(rank)] for run in runs] for rank in ranks]
    lines = ((list(kept.values()), "o-", 0, "improvement on the task"), (held, "s--", 1, "‖ΔW‖², median"))
    for values, style, colour, label in lines:
        middles, bars = [median(found) for found in values], error_bars(values)
        first.errorbar(
            ranks, middles, bars, fmt=style, capsize=3, color=COLOURS[colour], markersize=4, label=label
        )  # fmt: skip
    chance = [random["energy"][str(rank)] for rank in ranks]
    first.plot(ranks, chance, "D:", color=COLOURS[7], markersize=4, label="random matrix")
    first.set_xscale("log", base=2)
    first.set_xticks(ranks, [str(rank) for rank in ranks])
    ours = np.array([run["spectrum"] for run in runs])
    places = range(1, ours.shape[1] + 1)
    second.plot(places, np.median(ours, axis=0), "--", color=COLOURS[1], label="ΔW")
    second.fill_between(places, ours.min(axis=0), ours.max(axis=0), color=COLOURS[1], alpha=0.2, linewidth=0)
    second.plot(places, random["spectrum"], ":", color=COLOURS[7], label="random matrix")
    second.set(xlabel="i", ylabel="σᵢ / σ₁, median over layers")
    save(figure, path)
