"""`ModelConfig`: a network's sizes and switches. They are read from Hugging Face's config.json by config_file.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of one network; names are Hugging Face's.

    window: keys that a query sees (sliding_window), or None for all before it; full_layers: the layers without the
    window where others have it. rope_theta: None for a family without rotary positions; rope_scaling: see
    models/rope.py.
    raw: config.json as it was read, to be written again with the model.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float | None = 10000.0
    rope_scaling: dict[str, Any] | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def window_of(self, layer: int) -> int | None:
        """Keys that a query of this layer sees, or None for all before it."""
        return None if layer in self.full_layers else self.window
