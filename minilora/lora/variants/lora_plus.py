"""LoRA+: B learns faster than A.

Hayou et al. 2024, "LoRA+: efficient low rank adaptation of large models", section 4: for wide layers A and B should not
share a learning rate. With A ~ 1/√in and B = 0 at the start, features move by Θ(1) through both only if η_B / η_A grows
with the width; the paper fixes the ratio λ = η_B / η_A (about 16) and tunes η_A. Nothing else of LoRA changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import MiniloraError
from ...tensor import Tensor


def lora_plus(parameters: Mapping[str, Tensor], ratio: float) -> dict[str, float]:
    """{name: ratio} of the parameters that learn `ratio` times faster, for `AdamW(..., lr_scale=)`.

    They are the B matrices and, as in PEFT's create_loraplus_optimizer, all vectors: DoRA's magnitudes and biases.
    MiniloraError where there is no B among the parameters.
    """
    found = {name for name in parameters if "lora_B" in name or "lora_embedding_B" in name}
    if not found:
        raise MiniloraError("LoRA+ found no lora_B among what is trained, expected an adapter: leave the ratio out")
    return {name: ratio for name, tensor in parameters.items() if name in found or tensor.ndim == 1}
