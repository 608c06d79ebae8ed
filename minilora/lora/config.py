"""`LoraConfig`: what an adapter is, before any array exists. Field names follow PEFT where PEFT has the idea."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import MiniloraError

INITIALISATIONS = ("kaiming", "gaussian", "zeros", "pissa")  # and pissa_niter_N, for a whole number N
BIAS_MODES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoraConfig:
    """The shape and scale of one adapter (Hu et al. 2021, section 4.1; PEFT's `LoraConfig`).

    r: rank of the update ΔW = scale · B A, with A (r, in) and B (out, r).
    alpha: numerator of the scale (PEFT's `lora_alpha`); scale = alpha / r, or alpha / sqrt(r) with `use_rslora`.
    dropout: probability of zeroing an entry of the adapter's input while training (PEFT's `lora_dropout`).
    target_modules: a list matches names of linear layers and embeddings by suffix, a string is a regular expression for
        the full name, and "all-linear" is every linear layer but the head. `exclude_modules` is matched the same way
        and wins.
    layers_to_transform: of the modules that are matched by suffix or expression only those of these blocks.
    modules_to_save: modules that the adapter trains whole, in a copy of its own, each named by what its name ends in
        (with all below it); they get no A and B. bias: "all" also trains every bias so, "lora_only" those of the
        adapted layers.
    rank_pattern, alpha_pattern: {pattern: value} overriding r and alpha for the modules that a pattern matches.
    use_rslora, use_dora: rank-stabilised scale; directions and magnitudes apart (lora/variants/dora.py).
    variant: "lora", "lora_fa" (A stays as drawn), or another name in lora/variants: what PEFT's fields do not say.
    init: "kaiming" (PEFT's default: A uniform in ±1/sqrt(in), B zero), "gaussian" (A normal with standard deviation
        1/r, B zero), "pissa" or "pissa_niter_N" (from the largest singular values of W, exact or by N power iterations:
        lora/variants/pissa.py), or "zeros" (both zero; only for adapters whose values are loaded afterwards).

    Raises MiniloraError for values outside these ranges.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    exclude_modules: str | tuple[str, ...] | list[str] | None = None
    layers_to_transform: tuple[int, ...] | list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    variant: str = "lora"
    init: str = "kaiming"
    bias: str = "none"
    modules_to_save: tuple[str, ...] | list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise _bad(name, getattr(self, name), "{pattern: value}, e.g. {'q_proj': 4}")
        for name, rank in {"r": self.r, **_entries("rank_pattern", self.rank_pattern)}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise _bad(name, rank, "a whole number of at least 1, e.g. 8")
        for name, alpha in {"alpha": self.alpha, **_entries("alpha_pattern", self.alpha_pattern)}.items():
            if not _is_number(alpha):
                raise _bad(name, alpha, "a finite number, e.g. 16")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise _bad("dropout", self.dropout, "a probability in [0, 1), e.g. 0.05")
        if not _is_pattern(self.target_modules):
            raise _bad("target_modules", self.target_modules, "a list of names or a regular expression")
        if self.exclude_modules is not None and not _is_pattern(self.exclude_modules):
            raise _bad("exclude_modules", self.exclude_modules, "a list of names, a regular expression or None")
        if self.layers_to_transform is not None and not _is_list_of(int, self.layers_to_transform):
            raise _bad("layers_to_transform", self.layers_to_transform, "a list of block numbers, e.g. [0, 1]")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False")
        if self.init not in INITIALISATIONS and not re.fullmatch(r"pissa_niter_[0-9]+", str(self.init)):
            raise _bad("init", self.init, f"one of {', '.join(INITIALISATIONS)} or pissa_niter_N, e.g. pissa_niter_4")
        if not isinstance(self.variant, str):
            raise _bad("variant", self.variant, "a variant's name, e.g. 'lora_fa'")
        choices = {"use_dora=True": self.use_dora, f"init={self.init!r}": self.init.startswith("pissa"),
                   f"variant={self.variant!r}": self.variant != "lora"}  # fmt: skip
        if len(asked := [choice for choice, made in choices.items() if made]) > 1:
            raise MiniloraError(f"found {' and '.join(asked)}, expected one of them: they do not combine")
        if self.modules_to_save is not None and not (
            _is_list_of(str, self.modules_to_save) and all(self.modules_to_save)
        ):
            raise _bad("modules_to_save", self.modules_to_save, "a list of names, e.g. ['lm_head'], or None")
        if self.bias not in BIAS_MODES:
            raise _bad("bias", self.bias, f"one of {', '.join(BIAS_MODES)}")

    def scale(self, rank: int, alpha: float) -> float:
        """The factor in front of B A: alpha / r (Hu et al. 2021), or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def with_changes(self, **changes: object) -> LoraConfig:
        """A copy with some fields replaced, checked like a new one."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _bad(name: str, value: object, expected: str) -> MiniloraError:
    return MiniloraError(f"LoraConfig.{name} is {value!r}, expected {expected}")


def _entries(field: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values of rank_pattern or alpha_pattern, under the names that errors give them."""
    return {f"{field}[{pattern!r}]": value for pattern, value in values.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) or _is_list_of(str, value)
