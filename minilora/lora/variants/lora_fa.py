"""LoRA-FA: A stays as it was drawn, only B is trained.

Zhang et al. 2023, "LoRA-FA: memory-efficient low-rank adaptation for large language models fine-tuning", section 3. Of
LoRA's gradients one is left, dB = s gᵀ u with u = x Aᵀ (N, r): so x (N, in) is not kept for backward, and the optimiser
holds half as much. `ops.lora_linear` keeps no x for an A that needs no gradient; nothing else is to be done.
"""

from __future__ import annotations

from typing import Any

from ...nn import Linear
from ..layer import LoraLayer


class LoraFaLayer(LoraLayer):
    """ΔW = s · B A with A frozen."""

    def __init__(self, module: Linear, *how: Any) -> None:
        super().__init__(module, *how)
        self.lora_A.requires_grad = False
