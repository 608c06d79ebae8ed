"""The Mistral family (Jiang et al. 2023): Llama's block whose queries see the last `sliding_window` positions only.

A null sliding_window sees everything (Mistral 7B from v0.2 on). The block is Llama's own; only the config is read here.
"""

from __future__ import annotations

from typing import Any

from ..errors import MiniloraError
from .config import ModelConfig
from .config_file import ConfigReader, decoder_config

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072}  # where config.json leaves them out


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json with model_type "mistral"."""
    if raw.get("layer_types") is not None:
        raise MiniloraError(
            "config.json has layer_types, which a mistral model does not follow: its sliding_window is for all layers "
            "(models with layers of two kinds are of type ministral, not supported)"
        )
    return decoder_config(DEFAULTS | raw, window=ConfigReader(raw).window(4096))
