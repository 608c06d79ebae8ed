"""LoRA: which layers (targets), which matrices (layer), many adapters on one base (adapters), merging (merge)."""

from .adapters import PEFT_PREFIX, Adapters
from .config import LoraConfig
from .layer import LoraLayer, Selection
from .merge import Merge

__all__ = ["PEFT_PREFIX", "Adapters", "LoraConfig", "LoraLayer", "Merge", "Selection"]
