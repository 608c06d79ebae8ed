"""The variants of LoRA, each a subclass of `LoraLayer` in a file of its own, and which of them a config asks for.

docs/variants.md says what each is good for and how it was checked; docs/extend.md adds one.
"""

from __future__ import annotations

from ...errors import MiniloraError
from ..config import LoraConfig
from ..layer import LoraLayer
from .dora import DoraLayer
from .lora_fa import LoraFaLayer
from .pissa import PissaLayer

VARIANTS: dict[str, type[LoraLayer]] = {"lora": LoraLayer, "lora_fa": LoraFaLayer}  # by LoraConfig.variant


def layer_class(config: LoraConfig) -> type[LoraLayer]:
    """What the layers of such an adapter are; MiniloraError for a variant that there is not."""
    if config.use_dora:
        return DoraLayer
    if config.init.startswith("pissa"):
        return PissaLayer
    if config.variant not in VARIANTS:
        raise MiniloraError(f"LoraConfig.variant is {config.variant!r}, expected one of {', '.join(VARIANTS)}")
    return VARIANTS[config.variant]
