"""The variants of LoRA by name, each a subclass of `LoraLayer` in a file of its own. docs/extend.md adds one."""

from __future__ import annotations

from ...errors import MiniloraError
from ..config import LoraConfig
from ..layer import LoraLayer

VARIANTS: dict[str, type[LoraLayer]] = {"lora": LoraLayer}


def layer_class(config: LoraConfig) -> type[LoraLayer]:
    """What the layers of such an adapter are; MiniloraError for a variant that there is not."""
    name = "dora" if config.use_dora else config.variant
    if name not in VARIANTS:
        raise MiniloraError(f"LoraConfig asks for the variant {name!r}, expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
