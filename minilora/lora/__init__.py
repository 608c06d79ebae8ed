"""LoRA: which layers (targets), which matrices (layer), many adapters on one base (adapters), one made of several
(combine), merging (merge).
"""

from .adapters import Adapters
from .combine import Combination, combine
from .config import LoraConfig
from .layer import LoraLayer, Selection
from .merge import Merge
from .requantise import Rounding
from .values import PEFT_PREFIX

__all__ = [
    "PEFT_PREFIX",
    "Adapters",
    "Combination",
    "LoraConfig",
    "LoraLayer",
    "Merge",
    "Rounding",
    "Selection",
    "combine",
]
