"""Which layers an adapter goes to: PEFT's matching rules, where a pattern without a match is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import MiniloraError
from .config import LoraConfig

ALL_LINEAR = "all-linear"
HEAD = "lm_head"  # the one linear layer that "all-linear" leaves out


def matches(name: str, pattern: str) -> bool:
    """Whether a list's entry names this module: it is the name, or its end after a dot ("self_attn.q_proj")."""
    return name == pattern or name.endswith(f".{pattern}")


def selected(names: Sequence[str], patterns: str | Iterable[str], field: str, kind: str = "linear layer") -> list[str]:
    """The names that a list (by suffix) or a string (a regular expression for all of it) selects, in their order.

    Raises MiniloraError for a pattern that selects none; `field` and `kind` say in it what was asked for, of what.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        whole = isinstance(patterns, str)
        hits = {name for name in names if (_fullmatch(pattern, name, field) if whole else matches(name, pattern))}
        if not hits:
            raise MiniloraError(f"{field} {pattern!r} matches no {kind}; {_examples(names, pattern, kind)}")
        found |= hits
    return [name for name in names if name in found]


def _fullmatch(pattern: str, name: str, field: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise MiniloraError(f"{field} {pattern!r} is not a regular expression: {error}") from None


def _examples(names: Sequence[str], pattern: str, kind: str = "linear layer") -> str:
    endings = sorted({re.search(r"[^.]*(\.(weight|bias))?$", name)[0] for name in names})  # type: ignore[index]
    close = difflib.get_close_matches(pattern, endings, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}the model's {kind}s end in {', '.join(endings)}"


def layer_number(name: str) -> int | None:
    """The block that a module belongs to: the first number in its name ("model.layers.3.mlp.up_proj" -> 3)."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def target_names(names: Sequence[str], config: LoraConfig) -> list[str]:
    """The modules, among a model's linear layers in order, that `config` adapts.

    Raises MiniloraError if a pattern of target_modules, exclude_modules or layers_to_transform matches nothing, or
    nothing is left.
    """
    if config.target_modules == ALL_LINEAR:
        chosen = {name for name in names if not matches(name, HEAD)}
    else:
        chosen = set(selected(names, config.target_modules, "target_modules"))
    if config.exclude_modules:
        chosen -= set(selected(names, config.exclude_modules, "exclude_modules"))
    if config.layers_to_transform is not None:
        wanted = set(config.layers_to_transform)
        missing = wanted - {layer_number(name) for name in chosen}
        if missing:
            have = sorted({number for name in names if (number := layer_number(name)) is not None})
            span = f"{have[0]} to {have[-1]}" if have else "none"
            raise MiniloraError(
                f"layers_to_transform has {min(missing)}, which no targeted layer is in (layers: {span})"
            )
        chosen = {name for name in chosen if layer_number(name) in wanted}
    if not chosen:
        raise MiniloraError(
            f"no linear layer is left to adapt: target_modules {config.target_modules!r} less the exclusions is empty"
        )
    return [name for name in names if name in chosen]


def shortest_patterns(adapted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names that select just `adapted` among `names`: a last part where all modules that end so are, else in full."""
    left_out = {name.rpartition(".")[2] for name in set(names) - set(adapted)}
    return sorted({name if (last := name.rpartition(".")[2]) in left_out else last for name in adapted})


def pattern_value(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first key, a regular expression for the end of the name, that matches (PEFT's rank_pattern)."""
    for pattern, value in patterns.items():
        if re.match(rf"^(.*\.)?({pattern})$", name):
            return value
    return default


def check_patterns(names: Sequence[str], patterns: Mapping[str, Any], field: str) -> None:
    """MiniloraError if a key of rank_pattern or alpha_pattern matches none of the adapted modules."""
    for pattern in patterns:
        try:
            used = any(pattern_value(name, {pattern: True}, False) for name in names)
        except re.error as error:
            raise MiniloraError(f"{field} {pattern!r} is not a regular expression: {error}") from None
        if not used:
            raise MiniloraError(f"{field} {pattern!r} matches none of the adapted layers; {_examples(names, pattern)}")
