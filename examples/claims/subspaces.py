"""What small and large ranks share, and what ΔW amplifies

Claim. The most important direction of a rank 8 adapter is among those of a rank 64 one, the others are not: they are
noise (Hu et al. 2021, section 7.2, figure 3). And ΔW amplifies directions that the task needs and W has but little
of, rather than W's own strongest ones (section 7.3, table 7).

Measured. Adapters of rank 8 and 64 on q and v learn dates from different random starts; ΔW's singular vectors come
from its factors (lora/statistics.py). φ(i, j) is how much of the span of the first i input directions of one lies in
that of the first j of the other, 1 being all. Then for each layer: ‖UᵀWV‖, what of W lies in ΔW's directions U, V,
beside the norm of W's own r strongest and what random directions would have; and the amplification ‖ΔW‖ / ‖UᵀWV‖. All
are medians over layers, and then over the seeds.

Refuted. The first half: if for neither q nor v φ(1, 1) is at least 0.5 and at least twice what directions 2 to 8 of
both share. The second: if ‖UᵀWV‖ of rank 8 is over half the norm of W's own 8 strongest directions, or the
amplification does not fall from rank 8 to rank 64, or is below 1 at rank 8.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from minilora.lora.statistics import Spectrum, frobenius_norm, projected_norm, spectrum, subspace_similarity
from minilora.nn import Linear

from .common import Base, Verdict, both, dates, load, loss, median, spread, table, trained
from .picture import MAP, Figure, save

KINDS = {"q": "q_proj", "v": "v_proj"}
SHARED, OWN = 0.5, 0.5
WHY_NOT = {
    "mini": "The first direction is shared far beyond chance, yet not much more than the others. The paper saw it in "
    "layers of GPT-3, 12,288 wide; here a layer is 192 wide, and the change that the dates need has no one direction "
    "that stands out: half of the energy of full fine-tuning's lies in five ([measured](intrinsic_rank.md)). Which "
    "of them comes first is then up to the random start.",
    "smollm2": "The first half holds: one direction is shared, the others are noise, as in the paper. The "
    "amplification is near 1 or below because 60 steps leave ΔW small, not because it lies where W is strong: there W "
    "has a twelfth at most of what it has in its own strongest directions.",
}
SETTINGS = {"smollm2": {"lr": 2e-3, "steps": 60, "batch_size": 8, "seeds": 1}}


def measure(
    base: Base,
    ranks: tuple[int, int] = (8, 64),
    lr: float = 6e-3,
    steps: int = 150,
    batch_size: int = 16,
    seeds: int = 5,
) -> dict[str, Any]:
    """Losses by rank; what the ranks share, {kind: {"map": φ, ...}}; what is amplified, {kind: {rank: {...}}}.

    All but the map, which is a median, are lists by seed.
    """
    model = load(base)
    task = dates(model)
    weights = {
        name: Weight(ml.to_numpy(module.weight.data))
        for name, module in model.network.named_modules()
        if isinstance(module, Linear) and name.endswith(tuple(KINDS.values()))
    }
    losses: dict[str, list[float]] = {str(rank): [] for rank in ranks}
    found: list[dict[int, dict[str, Spectrum]]] = []
    for seed in range(seeds):
        found.append({})
        for number, rank in enumerate(ranks):
            way = ml.LoraConfig(r=rank, alpha=16, target_modules=list(KINDS.values()))
            tuned = trained(base, way, task.train, lr, steps, batch_size, seed=2 * seed + number)
            losses[str(rank)].append(loss(tuned, task.test))
            found[-1][rank] = directions(tuned, list(weights), 16 / rank)
    similar, amplified = {}, {}
    for kind, ending in KINDS.items():
        layers = [name for name in weights if name.endswith(ending)]
        shared = [similarity([(run[ranks[0]][name], run[ranks[1]][name]) for name in layers]) for run in found]
        similar[kind] = {
            "map": np.median([phi for phi, _, _ in shared], axis=0).round(4).tolist(),
            "first": [first for _, first, _ in shared],
            "rest": [rest for _, _, rest in shared],
            "chance": 1 / weights[layers[0]].array.shape[1],
        }
        amplified[kind] = {
            str(rank): by_name([amplification([(weights[name], run[rank][name]) for name in layers]) for run in found])
            for rank in ranks
        }
    return {"lr": lr, "steps": steps, "losses": losses, "similar": similar, "amplified": amplified}


class Weight:
    """A frozen weight and its singular values, which are the same for every seed and rank."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.values = np.linalg.svd(array.astype(np.float64), compute_uv=False)


def directions(tuned: ml.Model, layers: list[str], scale: float) -> dict[str, Spectrum]:
    """{layer: the singular value decomposition of its ΔW}."""
    found = {key: ml.to_numpy(tensor) for key, tensor in tuned.adapter_parameters("a").items()}
    keys = {name: next(key for key in found if f"{name}.lora_A" in key) for name in layers}
    return {name: spectrum(found[key], found[key.replace("lora_A", "lora_B")], scale) for name, key in keys.items()}


def similarity(pairs: list[tuple[Spectrum, Spectrum]]) -> tuple[np.ndarray, float, float]:
    """Medians over layers: φ(i, j) of the input directions, φ(1, 1), and what directions 2 to r of both share."""
    sides = [(small.right, large.right) for small, large in pairs]
    maps = [subspace_similarity(P, Q) for P, Q in sides]
    rests = [float(subspace_similarity(P[:, 1:], Q[:, 1 : P.shape[1]])[-1, -1]) for P, Q in sides]
    return np.median(maps, axis=0), median(float(phi[0, 0]) for phi in maps), median(rests)


def by_name(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """Lists by seed instead of a list of seeds."""
    return {name: [one[name] for one in found] for name in found[0]}


def amplification(layers: list[tuple[Weight, Spectrum]]) -> dict[str, float]:
    """Medians over layers of ‖ΔW‖, ‖UᵀWV‖ for ΔW's directions, for W's own, for random ones, and of the factor."""
    found: dict[str, list[float]] = {"norm": [], "within": [], "own": [], "random": [], "factor": []}
    for weight, update in layers:
        norm, within = float(np.linalg.norm(update.values)), projected_norm(weight.array, update)
        found["norm"].append(norm)
        found["within"].append(within)
        found["own"].append(float(np.linalg.norm(weight.values[: update.rank])))
        # E‖Uᵀ W V‖² of random orthonormal U (out, r), V (in, r) is ‖W‖² r² / (out · in)
        found["random"].append(frobenius_norm(weight.array) * update.rank / math.sqrt(weight.array.size))
        found["factor"].append(norm / within)
    return {name: median(values) for name, values in found.items()}


def verdict(results: dict[str, Any]) -> Verdict:
    similar = results["similar"]
    best = max(similar, key=lambda kind: median(similar[kind]["first"]))
    first, rest = median(similar[best]["first"]), median(similar[best]["rest"])
    shared = first >= SHARED and first >= 2 * rest
    small, large = (
        {kind: {name: median(v) for name, v in found[k].items()} for kind, found in results["amplified"].items()}
        for k in results["losses"]
    )
    amplifies = all(
        small[kind]["within"] <= OWN * small[kind]["own"]
        and small[kind]["factor"] > large[kind]["factor"]
        and small[kind]["factor"] >= 1
        for kind in small
    )
    ranks = list(results["losses"])
    factors = "; ".join(
        f"{kind} {small[kind]['factor']:.1f} and {large[kind]['factor']:.1f}, with "
        f"{small[kind]['within'] / small[kind]['own']:.0%} of W's strongest directions"
        for kind in small
    )
    return Verdict(
        both(shared, amplifies),
        f"the first directions share {first:.2f} ({best}), the next {rest:.2f} (asked: {SHARED:g}, twice the next); "
        f"amplification at ranks {ranks[0]} and {ranks[1]}: {factors} (asked: at least 1, falling, at most {OWN:.0%})",
    )


def rows(results: dict[str, Any]) -> str:
    similar = table(
        ["", "φ(1, 1)", "directions 2 to 8", "random directions"],
        [
            [kind, spread(found["first"]), spread(found["rest"]), f"{found['chance']:.3f}"]
            for kind, found in results["similar"].items()
        ],
    )
    amplified = table(
        ["", "rank", "‖ΔW‖", "‖UᵀWV‖", "of W's own directions", "of random ones", "amplification"],
        [
            [kind, rank, *(spread(found[key], ".2f") for key in ("norm", "within", "own", "random", "factor"))]
            for kind, ranks in results["amplified"].items()
            for rank, found in ranks.items()
        ],
    )
    return f"{similar}\n\n{amplified}"


def draw(results: dict[str, Any], path: Path) -> None:
    small, large = results["losses"]
    figure = Figure(f"j, of rank {large}", f"i, of rank {small}", panels=len(results["similar"]))
    for axis, (kind, found) in zip(figure.axes, results["similar"].items(), strict=True):
        phi = np.array(found["map"])
        extent = (0.5, phi.shape[1] + 0.5, 0.5, phi.shape[0] + 0.5)
        image = axis.imshow(phi, origin="lower", vmin=0, vmax=1, cmap=MAP, extent=extent, aspect="auto")
        axis.set(title=f"φ(i, j) of {kind}, median over layers", xlabel=f"j, of rank {large}")
    figure.canvas.colorbar(image, ax=figure.axes)
    save(figure, path)
