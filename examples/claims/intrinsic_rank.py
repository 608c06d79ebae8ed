"""What full fine-tuning changes is of low rank

Claim. The change that a task needs, ΔW = W' - W of full fine-tuning, has a low intrinsic rank, so that matrices B A of
a small rank can hold it (Hu et al. 2021, sections 1 and 4.1).

Measured. Every parameter is trained on the dates of `minilora demo`. Of each linear layer's true ΔW the singular values
are computed in float64. Then every ΔW is cut to its k largest singular values, B A being the nearest matrix of rank k,
everything else staying as trained, and the loss on 200 other dates is measured again: how much of the improvement is
left, from the loss with all ΔW at zero (k = 0) to that with them whole. Beside the spectra stands that of a random
matrix of the same shape, which has no low rank.

Refuted. If at rank 8 less than 90 % of the improvement that the linear layers bring is left; or if half of ‖ΔW‖²
(median over layers) takes over half the singular values that half of a random matrix's takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from minilora.lora.statistics import effective_rank
from minilora.nn import Linear

from .common import FULL, Verdict, best_rate, both, dates, load, loss, median, table, trained
from .picture import COLOURS, Figure, save

RANK, ENOUGH, HALF = 8, 0.90, 0.5


def measure(
    model: str,
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    rates: Sequence[float] = (1e-3, 2e-3),
    steps: int = 120,
) -> dict[str, Any]:
    """{"base", "full": losses, "cut": {rank: loss}, "layers": [...], "energy", "spectrum": {"ours", "random": ...}}.

    Of each layer its effective rank, and how many singular values hold half of ‖ΔW‖²; energy: {rank: the share of ‖ΔW‖²
    in that many}, spectrum: σ_i / σ_1, both medians over the layers. random: of a random matrix of each layer's shape.
    """
    base = load(model)
    task = dates(base)
    lr, tuned = best_rate(rates, lambda rate: trained(model, FULL, task.train, rate, steps), task.valid)
    whole = loss(tuned, task.test)
    random = np.random.default_rng(0)
    before = linear_weights(base)
    factors, chance = {}, {}
    for name, after in linear_weights(tuned).items():
        factors[name] = np.linalg.svd(after.astype(np.float64) - before[name], full_matrices=False)
        chance[name] = np.linalg.svd(random.normal(size=after.shape), compute_uv=False)
    cut = {}
    for rank in (0, *ranks):
        for name, weight in linear_weights(tuned).items():
            U, values, V = factors[name]
            weight[...] = before[name] + (U[:, :rank] * values[:rank]) @ V[:rank]
        cut[str(rank)] = loss(tuned, task.test)
    spectra = {"ours": [values for _, values, _ in factors.values()], "random": list(chance.values())}
    return {
        "lr": lr,
        "steps": steps,
        "base": loss(base, task.test),
        "full": whole,
        "cut": cut,
        "layers": [
            {
                "name": name,
                "effective_rank": effective_rank(values),
                "half": values_for_half(values),
                "half_of_random": values_for_half(chance[name]),
            }
            for name, (_, values, _) in factors.items()
        ],
        "energy": {
            whose: {str(rank): median(energy(values, rank) for values in found) for rank in (0, *ranks)}
            for whose, found in spectra.items()
        },
        "spectrum": {
            whose: np.median([values[: min(map(len, found))] / values[0] for values in found], axis=0).tolist()
            for whose, found in spectra.items()
        },
    }


def linear_weights(model: ml.Model) -> dict[str, np.ndarray]:
    """The weights of all linear layers but the head (which is tied to the embedding), by name."""
    modules = dict(model.network.named_modules())
    return {
        name: module.weight.data
        for name, module in modules.items()
        if isinstance(module, Linear) and not name.endswith("lm_head")
    }


def left(results: dict[str, Any]) -> dict[int, float]:
    """{k: the share of the improvement that is left with every ΔW cut to rank k}."""
    none = results["cut"]["0"]
    return {int(rank): (none - value) / (none - results["full"]) for rank, value in results["cut"].items()}


def energy(values: np.ndarray, rank: int) -> float:
    """The share of ‖ΔW‖² = Σσ² that the `rank` largest singular values hold."""
    return float(np.square(values[:rank]).sum() / np.square(values).sum())


def values_for_half(values: np.ndarray) -> int:
    """How many of the largest singular values hold half of ‖ΔW‖²."""
    squares = np.cumsum(np.square(values))
    return int(np.searchsorted(squares, squares[-1] / 2)) + 1


def verdict(results: dict[str, Any]) -> Verdict:
    kept = left(results)[RANK]
    ours, chance = (median(layer[key] for layer in results["layers"]) for key in ("half", "half_of_random"))
    return Verdict(
        both(kept >= ENOUGH, ours <= HALF * chance),
        f"cut to rank {RANK}, ΔW keeps {kept:.0%} of what it brings (asked: {ENOUGH:.0%}); half of its energy lies in "
        f"{ours:g} singular values, of a random matrix in {chance:g} (asked: at most {HALF:.0%} of them)",
    )


def rows(results: dict[str, Any]) -> str:
    ours, random = results["energy"]["ours"], results["energy"]["random"]
    return table(
        ["rank that every ΔW is cut to", "loss", "improvement left", "‖ΔW‖² left", "of a random matrix"],
        [
            [rank, f"{results['cut'][rank]:.3f}", f"{left(results)[int(rank)]:.0%}", f"{ours[rank]:.0%}",
             f"{random[rank]:.0%}"]
            for rank in results["cut"]
        ],
    )  # fmt: skip


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("rank that every ΔW is cut to", "share left", panels=2)
    first, second = figure.axes
    kept = {rank: share for rank, share in left(results).items() if rank}
    ranks = list(kept)
    first.plot(ranks, list(kept.values()), "o-", color=COLOURS[0], label="improvement on the task")
    for whose, style, colour, label in (("ours", "s--", 1, "‖ΔW‖², median"), ("random", "D:", 7, "random matrix")):
        shares = [results["energy"][whose][str(rank)] for rank in ranks]
        first.plot(ranks, shares, style, color=COLOURS[colour], markersize=4, label=label)
    first.set_xscale("log", base=2)
    first.set_xticks(ranks, [str(rank) for rank in ranks])
    for whose, style, colour, label in (("ours", "--", 1, "ΔW"), ("random", ":", 7, "random matrix")):
        curve = results["spectrum"][whose]
        second.plot(range(1, len(curve) + 1), curve, style, color=COLOURS[colour], label=label)
    second.set(xlabel="i", ylabel="σᵢ / σ₁, median over layers")
    save(figure, path)
