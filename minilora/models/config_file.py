"""Reading Hugging Face's config.json. What is missing, of the wrong kind or not supported is an error that names it."""

from __future__ import annotations

import math
from typing import Any

from ..errors import MiniloraError
from .config import ModelConfig

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class ConfigReader:
    """Typed access to a config.json: each value is checked, and what is missing or of the wrong kind is named."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def value(self, name: str, kind: type, default: Any = None) -> Any:
        found = self.raw.get(name)
        if found is None:
            if default is None:
                raise MiniloraError(f"config.json has no {name!r}, expected {_KINDS[kind]}: is the file complete?")
            return default
        if kind is float and isinstance(found, int) and not isinstance(found, bool):
            return float(found)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise MiniloraError(f"config.json has {name} = {found!r}, expected {_KINDS[kind]}")
        return found

    def size(self, name: str, default: int | None = None) -> int:
        found = self.value(name, int, default)
        if found < 1:
            raise MiniloraError(f"config.json has {name} = {found}, expected at least 1")
        return found

    def refuse(self, name: str, *allowed: Any) -> None:
        """MiniloraError if the config sets `name` to anything but None or the allowed values."""
        found = self.raw.get(name)
        if found is not None and found not in allowed:
            supported = ", ".join(map(repr, allowed)) or "leaving it out"
            raise MiniloraError(f"config.json has {name} = {found!r:.60}, not supported (supported: {supported})")

    def window(self, default: int) -> int | None:
        """sliding_window: `default` where it is left out, None where it is null."""
        return self.size("sliding_window", default) if self.raw.get("sliding_window", default) is not None else None

    def rope(self) -> tuple[float, dict[str, Any] | None]:
        """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it)."""
        parameters = self.raw.get("rope_parameters") or self.raw.get("rope_scaling")
        if parameters is not None and not isinstance(parameters, dict):
            raise MiniloraError(f"config.json has rope parameters {parameters!r}, expected an object")
        theta = (parameters or {}).get("rope_theta", self.raw.get("rope_theta", 10000.0))
        if not isinstance(theta, int | float) or isinstance(theta, bool) or not 0 < theta < math.inf:
            raise MiniloraError(f"config.json has rope_theta = {theta!r}, expected a number above zero")
        ConfigReader(parameters or {}).refuse("partial_rotary_factor", 1.0)
        return float(theta), parameters


def decoder_config(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    """The ModelConfig of a Llama-like config.json: what its families have in common; `changes` are a family's own."""
    read = ConfigReader(raw)
    read.refuse("hidden_act", "silu")
    heads, hidden = read.size("num_attention_heads"), read.size("hidden_size")
    kv_heads = read.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise MiniloraError(
            f"config.json has {heads} attention heads and {kv_heads} key-value heads: "
            "the first must be a multiple of the second"
        )
    if raw.get("head_dim") is None and hidden % heads:
        raise MiniloraError(f"config.json has hidden_size {hidden}, which {heads} attention heads do not divide evenly")
    head_dim = read.size("head_dim", hidden // heads)
    if head_dim % 2:
        raise MiniloraError(f"config.json has head_dim = {head_dim}, expected an even number: rotary turns pairs")
    theta, scaling = read.rope()
    values: dict[str, Any] = {
        "model_type": read.value("model_type", str),
        "vocab_size": read.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": read.size("intermediate_size"),
        "num_hidden_layers": read.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": read.size("max_position_embeddings", 2048),
        "norm_eps": read.value("rms_norm_eps", float, 1e-6),
        "tie_word_embeddings": read.value("tie_word_embeddings", bool, False),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "raw": raw,
    }
    return ModelConfig(**(values | changes))
