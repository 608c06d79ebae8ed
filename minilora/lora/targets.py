"""Which layers an adapter goes to, and which modules it trains whole: PEFT's matching rules, where a pattern without a
match is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..errors import MiniloraError
from .config import LoraConfig

ALL_LINEAR = "all-linear"
HEAD = "lm_head"  # the one linear layer that "all-linear" leaves out
LAYER = "linear layer or embedding"


def matches(name: str, pattern: str) -> bool:
    """Whether a list's entry names this module: it is the name, or its end after a dot ("self_attn.q_proj")."""
    return name == pattern or name.endswith(f".{pattern}")


def selected(names: Sequence[str], patterns: str | Iterable[str], field: str, kind: str = LAYER) -> list[str]:
    """The names that a list (by suffix) or a string (a regular expression for all of it) selects, in their order.

    Raises MiniloraError for a pattern that selects none; `field` and `kind` say in it what was asked for, of what.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        whole = isinstance(patterns, str)
        hits = {name for name in names if (_fullmatch(pattern, name, field) if whole else matches(name, pattern))}
        if not hits:
            raise MiniloraError(f"{field} {pattern!r} matches no {kind}; {_examples(names, pattern)}")
        found |= hits
    return [name for name in names if name in found]


def _fullmatch(pattern: str, name: str, field: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise MiniloraError(f"{field} {pattern!r} is not a regular expression: {error}") from None


def _examples(names: Sequence[str], pattern: str) -> str:
    endings = sorted({re.search(r"[^.]*(\.(weight|bias))?$", name)[0] for name in names})  # type: ignore[index]
    close = difflib.get_close_matches(pattern, endings, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}the model's names end in {', '.join(endings)}"


def layer_number(name: str) -> int | None:
    """The block that a module belongs to: the first number in its name ("model.layers.3.mlp.up_proj" -> 3)."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def target_names(
    names: Sequence[str], config: LoraConfig, embeddings: Collection[str] = (), saved: Collection[str] = ()
) -> list[str]:
    """The modules, among a model's linear layers and embeddings in order, that `config` adapts.

    embeddings: those that "all-linear" leaves out, like the head. saved: modules that are trained whole, which wins.
    A module that target_modules gives in full is adapted whatever layers_to_transform says, as in PEFT.
    Raises MiniloraError if a pattern of target_modules, exclude_modules or layers_to_transform matches nothing, or
    nothing is left.
    """
    targets, in_full = config.target_modules, set()
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        chosen = {name for name in names if not matches(name, HEAD) and name not in embeddings}
    else:
        chosen = set(selected(names, targets, "target_modules"))
        in_full = chosen.intersection([] if isinstance(targets, str) else targets)
    if config.exclude_modules:
        chosen -= set(selected(names, config.exclude_modules, "exclude_modules"))
    chosen -= set(saved)
    if config.layers_to_transform is not None:
        wanted = set(config.layers_to_transform)
        missing = wanted - {layer_number(name) for name in chosen}
        if missing:
            have = sorted({number for name in names if (number := layer_number(name)) is not None})
            span = f"{have[0]} to {have[-1]}" if have else "none"
            raise MiniloraError(
                f"layers_to_transform has {min(missing)}, which no targeted layer is in (layers: {span})"
            )
        chosen = {name for name in chosen if layer_number(name) in wanted or name in in_full}
    if not chosen:
        less = "the exclusions and modules_to_save" if saved else "the exclusions"
        raise MiniloraError(
            f"no {LAYER} is left to adapt: target_modules {config.target_modules!r} less {less} is empty"
        )
    return [name for name in names if name in chosen]


def saved_names(names: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """The modules that modules_to_save names, and all below them, among those of a model: "norm" is every module whose
    name ends so ("input_layernorm" too, as in PEFT), "mlp" is each MLP with its layers.

    Raises MiniloraError for a pattern that matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if pattern and name.endswith(pattern)]
        if not hits:
            raise MiniloraError(f"modules_to_save {pattern!r} matches no module; {_examples(names, pattern)}")
        found.update(name for name in names if any(f"{name}.".startswith(f"{hit}.") for hit in hits))
    return [name for name in names if name in found]


def shortest_patterns(adapted: Sequence[str], names: Sequence[str], by_layer: bool = False) -> list[str]:
    """Names that select just `adapted` among `names`: a last part where all modules that end so are, else in full.

    by_layer: layers_to_transform is written beside them, which modules outside the layers need their full names for.
    """
    in_full = {name.rpartition(".")[2] for name in set(names) - set(adapted)}
    if by_layer:
        in_full |= {name.rpartition(".")[2] for name in adapted if layer_number(name) is None}
    return sorted({name if (last := name.rpartition(".")[2]) in in_full else last for name in adapted})


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
