"""Several adapters combined into a new one: Σ_i w_i ΔW_i as one pair of factors in each layer, exactly or to a rank.

With ΔW_i = s_i B_i A_i, the sum over the adapters of a layer is one product of the stacked factors,
    Σ_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | …] [A_1; A_2; …] = B A      B (out, R), A (R, in), R = Σ_i r_i
"cat" is those factors: exact, and the ranks add up. "svd" is the best approximation of rank k in the Frobenius norm
(Eckart & Young 1936) from the singular values σ of B A, which come from the factors' QR decompositions: B A itself is
never made. Its error is known from what is cut off: (Σ_{j>k} σ_j² / Σ_j σ_j²)^½.
PEFT's `add_weighted_adapter` has both under the same names; where its adapters have one rank the results agree.

Left out: adapters with parameters of their own (biases, whole modules) and DoRA, whose ΔW has no low-rank factors.
Axes: in and out the layer's widths, r and R ranks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..backend import Array, array_module, to_numpy
from ..errors import MiniloraError
from .adapters import Adapters
from .config import LoraConfig
from .layer import LoraLayer
from .statistics import spectrum
from .targets import shortest_patterns
from .values import PEFT_PREFIX

COMBINATIONS = ("cat", "svd")
Terms = list[tuple[LoraLayer, float]]  # the adapters of one layer, with their weights


@dataclass(frozen=True)
class Combination:
    """What a combination came to. ranks: the new adapter's, by layer. errors: ‖ΔW' − ΔW‖ / ‖ΔW‖ of each layer, where
    ΔW is the exact sum (Frobenius norms); relative_error: that of all layers together. All zero for "cat".
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    relative_error: float


def combine(
    adapters: Adapters, name: str, weights: Mapping[str, float], combination: str = "cat", rank: int | None = None
) -> Combination:
    """Add the adapter `name` that is Σ weight · ΔW of the named ones; MiniloraError for what cannot be combined.

    rank: the new adapter's with "svd", at most; by default the largest one among the adapters of each layer.
    """
    terms = _terms(adapters, adapters.weighted(weights))
    if combination not in COMBINATIONS:
        raise MiniloraError(f"combination is {combination!r}, expected one of {', '.join(COMBINATIONS)}")
    if rank is not None and combination == "cat":
        raise MiniloraError('found a rank with combination "cat", whose ranks add up: leave it out, or take "svd"')
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise MiniloraError(f"rank is {rank!r}, expected a whole number of at least 1, e.g. 8")
    values: dict[str, np.ndarray] = {}
    ranks, errors = {}, {}
    whole = lost = 0.0  # Σ σ² and what was cut off of it
    for path, own in terms.items():
        lora_A, lora_B = stacked(own)
        errors[path] = 0.0
        if combination == "svd":
            keep = rank or max(layer.factors()[0].shape[0] for layer, _ in own)
            lora_A, lora_B, squares = truncated(lora_A, lora_B, keep)
            cut = float(squares[len(lora_A) :].sum())
            errors[path] = math.sqrt(cut / (float(squares.sum()) or 1.0))
            whole, lost = whole + float(squares.sum()), lost + cut
        ranks[path] = len(lora_A)
        for part, matrix in zip(own[0][0].parameters(), (lora_A, lora_B), strict=True):
            values[f"{PEFT_PREFIX}{path}.{part}"] = to_numpy(matrix)
    adapters.add(name, _config(ranks, list(adapters.adaptable)), values=values)
    return Combination(ranks, errors, math.sqrt(lost / (whole or 1.0)))


def stacked(terms: Terms) -> tuple[Array, Array]:
    """A (R, in) and B (out, R) with Σ weight · ΔW = B A, in float64."""
    factors = [layer.factors() for layer, _ in terms]
    scales = [weight * layer.scale for layer, weight in terms]
    xp = array_module(factors[0][0].data)
    lora_A = xp.concatenate([A.data.astype(np.float64) for A, _ in factors])
    scaled = [B.data.astype(np.float64) * scale for (_, B), scale in zip(factors, scales, strict=True)]
    return lora_A, xp.concatenate(scaled, axis=1)


def truncated(lora_A: Array, lora_B: Array, rank: int) -> tuple[Array, Array, Array]:
    """The nearest A' (k, in), B' (out, k) of at most `rank` to B A, and the squares of all its singular values.

    B' = U √σ and A' = √σ Vᵀ: both factors are of one size, as training on wants them.
    """
    whole = spectrum(lora_A, lora_B, 1.0)
    root = array_module(lora_A).sqrt(whole.values[:rank])
    return (whole.right[:, :rank] * root).T, whole.left[:, :rank] * root, whole.values**2


def _terms(adapters: Adapters, weights: Mapping[str, float]) -> dict[str, Terms]:
    """The layers that an adapter with a weight other than zero has, with those adapters."""
    used = {name: weight for name, weight in weights.items() if weight}
    if not used:
        raise MiniloraError(f"found {dict(weights) or 'nothing'} to combine, expected {{name: weight}}, not all zero")
    for name in used:
        if adapters.own[name]:
            raise MiniloraError(
                f"adapter {name!r} has parameters of its own ({next(iter(adapters.own[name]))}), expected A and B "
                "alone: the others have no sum that an adapter could hold"
            )
    found: dict[str, Terms] = {}
    for name, weight in used.items():
        for path, layer in adapters.layers(name).items():
            found.setdefault(path, []).append((layer, weight))
    return {path: found[path] for path in adapters.adaptable if path in found}


def _config(ranks: Mapping[str, int], names: list[str]) -> LoraConfig:
    """The configuration under which B A is ΔW: alpha = rank in every layer, so that the scale is 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = sorted(set(ranks.values()) - {usual})
    pattern = {
        re.escape(name): rank
        for rank in others
        for name in shortest_patterns([path for path in ranks if ranks[path] == rank], list(ranks))
    }
    return LoraConfig(
        r=usual, alpha=usual, target_modules=shortest_patterns(list(ranks), names), rank_pattern=pattern,
        alpha_pattern={name: float(rank) for name, rank in pattern.items()},
    )  # fmt: skip
