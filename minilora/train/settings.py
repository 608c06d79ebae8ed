"""Settings in a TOML file: what `--config` reads, and what a run leaves behind as minilora.toml, which reads back.

Keys are the command line's long options (`batch_size` or `batch-size`), and some that only a file has: `betas`, `eps`,
`layers` (numbers of the blocks to adapt), `rank_pattern` and `alpha_pattern` (fields of `LoraConfig`).
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MiniloraError
from ..lora import LoraConfig
from ..lora.targets import ALL_LINEAR
from .config import TrainConfig

if TYPE_CHECKING:
    from ..model import Model

RUN_KEYS = ("model", "data", "adapter", "device", "dtype")
ADAPTER_KEYS = {  # the option, and the field of LoraConfig
    "rank": "r",
    "alpha": "alpha",
    "dropout": "dropout",
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "variant": "variant",
    "init": "init",
    "modules_to_save": "modules_to_save",
    "bias": "bias",
}
TRAIN_KEYS = tuple(field.name for field in fields(TrainConfig))
KEYS = (*RUN_KEYS, *ADAPTER_KEYS, *TRAIN_KEYS)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, by option; MiniloraError for a key that is none, naming the closest that is."""
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise MiniloraError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MiniloraError(f"{path} is not TOML: {error}") from error
    settings = {}
    for key, value in found.items():
        option = key.replace("-", "_")
        if option not in KEYS:
            close = difflib.get_close_matches(option, KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(KEYS)}"
            raise MiniloraError(f"{path} has the key {key!r}, which is no setting: {hint}")
        if option in settings:
            raise MiniloraError(f"{path} has {key!r} twice, with - and with _: leave one out")
        if option in RUN_KEYS and not isinstance(value, str):
            raise MiniloraError(f"{path} has {key} = {value!r}, expected a text in quotes")
        settings[option] = value
    return settings


def settings_text(settings: Mapping[str, Any]) -> str:
    """The settings as TOML, in the order of KEYS; those that are None are left out."""
    lines = ["# The settings of this run: `minilora train --config THIS_FILE --out ELSEWHERE` does it again."]
    for key in KEYS:
        value = settings.get(key)
        if key == "max_grad_norm" and value is None:
            value = 0
        if value is not None and value != {}:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def described(model: Model, data: object) -> dict[str, Any]:
    """What can be told of model, data and adapter by looking at them."""
    settings: dict[str, Any] = {"model": model.source, "device": model.device}
    if isinstance(data, str | Path):
        settings["data"] = str(data)
    for name in model.active_adapters:
        settings |= adapter_settings(model.adapters[name])
    return settings


def adapter_settings(config: LoraConfig) -> dict[str, Any]:
    """The options that make this LoraConfig."""
    return {option: getattr(config, field) for option, field in ADAPTER_KEYS.items()}


def lora_config(settings: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig that the settings make, defaults for the rest."""
    values = {field: settings[option] for option, field in ADAPTER_KEYS.items() if settings.get(option) is not None}
    for field in ("target_modules", "exclude_modules"):
        if isinstance(values.get(field), str):
            values[field] = parse_targets(values[field])
    if isinstance(values.get("modules_to_save"), str):
        values["modules_to_save"] = names_in(values["modules_to_save"])
    return LoraConfig(**values)


def train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """The TrainConfig that the settings make, defaults for the rest; max_grad_norm = 0 means no clipping."""
    values = {key: settings[key] for key in TRAIN_KEYS if settings.get(key) is not None}
    if values.get("max_grad_norm") == 0:
        values["max_grad_norm"] = None
    return TrainConfig(**values)


def parse_targets(text: str) -> str | list[str]:
    """ "all-linear", a regular expression for the whole name, or endings of names separated by commas.

    It is a regular expression if it has any of the characters \\ ^ $ * + ? | ( ) [ ] { }, which no module's name has.
    """
    if text.lower() == ALL_LINEAR or re.search(r"[\\^$*+?|()\[\]{}]", text):
        return text
    return names_in(text)


def names_in(text: str) -> list[str]:
    """The names in a text that separates them by commas; MiniloraError where there is none."""
    if not (names := [part.strip() for part in text.split(",") if part.strip()]):
        raise MiniloraError(f"found no name in {text!r}, expected endings of modules' names with commas between")
    return names


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    raise TypeError(f"{value!r} has no form in TOML")
