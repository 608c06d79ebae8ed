"""PiSSA: training starts from the principal part of W instead of from nothing.

Meng et al. 2024, "PiSSA: principal singular values and singular vectors adaptation of large language models"; PEFT's
init_lora_weights "pissa" and "pissa_niter_N". From W = U diag(σ) Vᵀ, with σ falling and s the adapter's scale:

    B0 = U_r diag(√(σ_r / s)),   A0 = diag(√(σ_r / s)) V_rᵀ,   W_res = W − s B0 A0,   W' = W_res + s B A

The paper, and PEFT, put W_res in the base's place. Here a base is shared by adapters that know nothing of each other,
so W stays, and the adapter carries what is to be subtracted:

    W' = W + s (B A − B0 A0) = W + s [B, −B0] [A; A0]

which is LoRA of rank 2 r, half of it frozen: the same function of A and B, the same gradients. It is saved as that
plain LoRA, which fits the base as it is (what PEFT's path_initial_model_for_weight_conversion converts to), and a base
in bfloat16 is not rounded a second time. Axes: in and out the layer's widths, r rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ... import ops
from ...backend import Array, array_module, cast, matmul, to_device
from ...errors import MiniloraError
from ...nn import Linear
from ...ops import CompressedWeight
from ...ops.linalg import times, times_transposed
from ...tensor import Tensor
from ..config import LoraConfig
from ..layer import LoraLayer

OVERSAMPLING = 10  # directions that the randomised decomposition finds besides the r that are wanted


class PissaLayer(LoraLayer):
    """ΔW = s · (B A − B0 A0), A and B starting at A0 and B0."""

    def __init__(self, module: Linear, config: LoraConfig, path: str, dtype: np.dtype, *how: Any) -> None:
        super().__init__(module, config, path, dtype, *how)
        most = min(module.out_features, module.in_features)
        if self.rank > most or self.scale == 0:
            raise MiniloraError(
                f"PiSSA takes {self.rank} singular values of {path} ({module.out_features} × {module.in_features}) at "
                f"scale {self.scale:g}: expected a rank of at most {most}, and an alpha that is not 0"
            )
        steps = config.init.removeprefix("pissa").removeprefix("_niter_")
        left, values, right = singular_triplets(module.weight.data, self.rank, dtype, int(steps) if steps else None)
        root = array_module(values).sqrt(values / abs(self.scale))
        self.start_A = root[:, None] * right
        self.start_B = left * root * math.copysign(1.0, self.scale)
        self.lora_A.data, self.lora_B.data = self.start_A.copy(), self.start_B.copy()

    def start(self) -> tuple[Array, Array]:
        """A0 (r, in) and −B0 (out, r), where A and B are."""
        device = self.lora_A.device
        self.start_A, self.start_B = to_device(self.start_A, device), to_device(self.start_B, device)
        return self.start_A, -self.start_B

    def factors(self) -> tuple[Tensor, Tensor]:
        start_A, minus_B = self.start()
        return ops.concatenate(self.lora_A, start_A, axis=0), ops.concatenate(self.lora_B, minus_B, axis=1)

    def update(self, linear: Linear, x: Tensor, dropped: Tensor, weight: float) -> Tensor:
        scale = self.scale * weight
        trained = ops.low_rank(dropped, self.lora_A, self.lora_B, scale=scale)
        return trained + ops.low_rank(x, *self.start(), scale=scale)  # the base's part: nothing is dropped from it

    @staticmethod
    def saved_config(config: LoraConfig) -> LoraConfig:
        """Twice the rank at the same scale."""
        factor = math.sqrt(2) if config.use_rslora else 2
        return config.with_changes(
            r=2 * config.r,
            alpha=factor * config.alpha,
            rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
            alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
            init="kaiming",
        )

    def saved(self) -> dict[str, Array]:
        lora_A, lora_B = self.factors()
        return {"lora_A.weight": lora_A.data, "lora_B.weight": lora_B.data}


def singular_triplets(
    weight: Any, rank: int, dtype: np.dtype, iterations: int | None = None
) -> tuple[Array, Array, Array]:
    """The largest `rank` singular values of W (out, in), with U (out, r) and Vᵀ (r, in), in `dtype`.

    iterations: None decomposes W exactly; a number finds them by that many power iterations from random directions, the
    same ones every time (Halko, Martinsson & Tropp 2011, "Finding structure with randomness", algorithms 4.4 and 5.1):
    a few products with W instead of O(out · in²) operations, and W may stay compressed.
    """
    if iterations is None:
        dense = cast(weight.dense() if isinstance(weight, CompressedWeight) else weight, dtype)
        left, values, right = array_module(dense).linalg.svd(dense, full_matrices=False)
        return left[:, :rank].copy(), values[:rank], right[:rank].copy()
    outside, inside = weight.shape
    count = min(rank + OVERSAMPLING, outside, inside)
    random = np.random.default_rng(0).standard_normal((count, inside)).astype(dtype)
    directions = to_device(random, Tensor(weight).device)  # (k, in)
    xp = array_module(directions)
    for _ in range(iterations):  # orthogonalised each time, or all would turn to the first
        basis, _ = xp.linalg.qr(times_transposed(directions, weight).T)  # of W Ω: (out, k)
        directions, _ = xp.linalg.qr(times(basis.T, weight).T)  # of Wᵀ Q: (in, k)
        directions = directions.T
    basis, _ = xp.linalg.qr(times_transposed(directions, weight).T)
    left, values, right = xp.linalg.svd(times(basis.T, weight), full_matrices=False)  # of Qᵀ W: (k, in)
    return matmul(basis, left[:, :rank]), values[:rank], right[:rank].copy()
