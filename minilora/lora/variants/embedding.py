"""LoRA on an embedding (PEFT's lora_embedding_A and lora_embedding_B): y = E[t] + s · B A[:, t] for a token t.

With A (r, V), B (D, r) and E (V, D) frozen, ΔE = s · (B A)ᵀ (V, D) is what a linear layer's ΔW is, looked up instead of
multiplied: of A only the columns of the batch's tokens are read, so in training no (V, D) array is made. It is composed
of primitives that are checked on their own. With u = A[:, t] (r) and g = ∂L/∂y (D), summed over the tokens:
    dB = s · g uᵀ,   dA[:, t] = s · Bᵀ g
At the start A is 0 and B random, the other way round from a linear layer (a column of A is then learnt from its
token's first gradient on): dB = 0 and dA ≠ 0 in the first step. Dropout is not applied, in PEFT neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import ops
from ...backend import Array, to_device
from ...errors import MiniloraError
from ...nn import Embedding
from ...tensor import Tensor
from ..config import LoraConfig
from ..layer import LoraLayer


class LoraEmbedding(LoraLayer):
    """ΔE = scale · (B A)ᵀ for an embedding of V tokens: A (r, V), B (D, r)."""

    def __init__(
        self, module: Embedding, config: LoraConfig, path: str, dtype: np.dtype, random: np.random.Generator, seed: int
    ) -> None:
        check_plain(config, path)
        plain = config.with_changes(init="zeros", dropout=0.0)
        super().__init__(module, plain, path, dtype, random, seed)  # type: ignore[arg-type]  # no Linear, but as wide
        if config.init != "zeros":
            start = random.normal(0.0, 1.0, self.lora_B.shape).astype(dtype)
            self.lora_B.data = to_device(start, module.weight.device)

    def parameters(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}

    def forward(self, module: Any, x: Tensor, weight: float) -> Tensor:
        return module.base(x) + self.update(module, x, x, weight)

    def update(self, module: Any, x: Tensor, dropped: Tensor, weight: float) -> Tensor:
        """weight · ΔE[t] of the tokens x (...) -> (..., D)."""
        u = ops.embedding(ops.transpose(self.lora_A), tokens=x.data)  # (..., r)
        return ops.linear(u * (self.scale * weight), self.lora_B)

    def delta(self, base: Array) -> Array:
        """ΔE (V, D)."""
        return super().delta(base).T


def check_plain(config: LoraConfig, path: str) -> None:
    """MiniloraError for a config that the embedding `path` cannot take."""
    refused = {
        "use_dora = True": config.use_dora,
        f"variant = {config.variant!r}": config.variant != "lora",
        f"init = {config.init!r}": config.init.startswith("pissa"),
    }
    for asked in (text for text, is_asked in refused.items() if is_asked):
        raise MiniloraError(f"{path} is an embedding, which takes plain LoRA only, found {asked}: leave one out")
