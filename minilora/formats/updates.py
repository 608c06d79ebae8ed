"""An adapter as its updates ΔW = s · B A by module: the form between PEFT's and another tool's.

PEFT gives each module a rank and a scale of its own. Other tools' files have one number for all of them: what they
cannot say is folded into B (its factor) or filled up with zeros (its rank), which leaves every ΔW as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import MiniloraError
from ..lora.config import LoraConfig
from ..lora.targets import pattern_value
from ..lora.values import PEFT_PREFIX

_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Update:
    """ΔW = scale · B A (out, in) of one module: A (r, in), B (out, r).

    embedding: A (r, V) and B (D, r) add scale · B A[:, token] to the row of a token. magnitude (out,): DoRA's.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    scale: float
    embedding: bool = False
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def scaled_to(self, scale: float) -> Update:
        """The same ΔW with another scale in front: B takes the factor up, rounded once where it is no power of two."""
        if scale == self.scale:
            return self
        dtype = np.result_type(self.lora_B.dtype, np.float32)
        lora_B = (self.lora_B.astype(np.float64) * (self.scale / scale)).astype(dtype)
        return replace(self, lora_B=lora_B, scale=scale)

    def padded_to(self, rank: int) -> Update:
        """The same ΔW with a higher rank: rows of zeros in A, columns of zeros in B."""
        more = rank - self.rank
        return replace(
            self, lora_A=np.pad(self.lora_A, ((0, more), (0, 0))), lora_B=np.pad(self.lora_B, ((0, 0), (0, more)))
        )


def updates_of(config: LoraConfig, tensors: Mapping[str, np.ndarray], tool: str) -> dict[str, Update]:
    """The updates by module name of an adapter given by PEFT's keys.

    Raises MiniloraError for a tensor that is no part of a ΔW (a trained bias, a module saved whole); `tool` is named in
    it.
    """
    if config.init.startswith("pissa"):
        raise MiniloraError(
            f"the adapter began as the base's principal part (PiSSA): its base has changed with it, which {tool} does "
            "not know; merge the adapter into its base instead (minilora merge)"
        )
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PEFT_PREFIX)
        part = next((part for part in (*_LINEAR, *_EMBEDDING, _MAGNITUDE) if path.endswith(f".{part}")), None)
        if part is None:
            raise MiniloraError(
                f"the adapter holds {path}, which an adapter file of {tool} has no place for: expected A and B of "
                "low-rank updates alone; merge the adapter into its base instead (minilora merge)"
            )
        parts.setdefault(path.removesuffix(f".{part}"), {})[part] = tensor
    updates = {}
    for path, found in parts.items():
        embedding = _EMBEDDING[0] in found
        lora_A, lora_B = (found[part] for part in (_EMBEDDING if embedding else _LINEAR))
        alpha = pattern_value(path, config.alpha_pattern, config.alpha)
        scale = config.scale(lora_A.shape[0], alpha)
        updates[path] = Update(lora_A, lora_B, scale, embedding, found.get(_MAGNITUDE))
    return updates


def peft_adapter(
    updates: Mapping[str, Update], alpha: float, dropout: float = 0.0
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The configuration and the tensors, by PEFT's keys, of updates whose scale is alpha / r."""
    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    tensors: dict[str, np.ndarray] = {}
    for path, update in updates.items():
        names = _EMBEDDING if update.embedding else _LINEAR
        values: dict[str, Any] = {names[0]: update.lora_A, names[1]: update.lora_B, _MAGNITUDE: update.magnitude}
        tensors |= {f"{PEFT_PREFIX}{path}.{part}": value for part, value in values.items() if value is not None}
    config = LoraConfig(
        r=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=list(updates),
        rank_pattern={path.replace(".", r"\."): update.rank for path, update in updates.items() if update.rank != rank},
        use_dora=any(update.magnitude is not None for update in updates.values()),
    )
    return config, tensors


def most_common(values: list[float]) -> float:
    """The value that most of them have: made the common one, it leaves most matrices bit for bit as they are.

    Never 0, from which no B has its update back, and which llama.cpp takes for 1: a scale of 0 goes into B as well.
    """
    return Counter([value for value in values if value] or [1.0]).most_common(1)[0][0]
