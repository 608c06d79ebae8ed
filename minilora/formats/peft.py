"""Adapters in PEFT's directory format: adapter_config.json and adapter_model.safetensors, read and written.

Only what changes the numbers is understood; a config that asks for anything else is refused by the name of its key.
Keys are PEFT's: `base_model.model.<module>.lora_A.weight` (r, in), `.lora_B.weight` (out, r), with DoRA also
`.lora_magnitude_vector` (out,); trained biases and whole modules keep their own names behind `base_model.model.`.
Source: https://huggingface.co/docs/peft (checkpoint format; LoraConfig)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiniloraError
from ..files import Content, atomic_write_all, json_bytes, not_there, read_json_object
from ..lora.config import LoraConfig
from ..lora.values import PEFT_PREFIX
from .safetensors import open_safetensors, tensor_file

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

# adapter_config.json as this PEFT release writes it, for an adapter that uses none of its further features.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Keys that may hold anything, besides those that become a LoraConfig: notes, and settings of how A and B started.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
_UNDERSTOOD = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha",
    "lora_dropout", "modules_to_save", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
# Ways to start A and B that leave the base as it is, and "pissa", whose change of the base follows from the base alone.
# The others (olora, corda, loftq, pissa_niter_N from random directions ...) change its weights in ways of their own.
_INITIALISATIONS = {
    True: "kaiming",
    False: "kaiming",
    "gaussian": "gaussian",
    "eva": "kaiming",
    "orthogonal": "kaiming",
    "pissa": "pissa",
}


def read_adapter(path: str | Path) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The configuration and the tensors (by PEFT's keys, dtypes as stored, own memory) of an adapter directory.

    Raises MiniloraError for a missing or malformed file and for a config that asks for something unsupported.
    """
    path = Path(path)
    config = lora_config(read_adapter_config(path), path / CONFIG_FILE)
    if not (path / TENSOR_FILE).exists() and (path / "adapter_model.bin").exists():
        raise MiniloraError(
            f"{path} holds adapter_model.bin, a pickle that could run code, expected {TENSOR_FILE}: "
            "load it with PEFT and save it again"
        )
    tensors = {}
    for key, entry in open_safetensors(path / TENSOR_FILE).items():
        if not key.startswith(PEFT_PREFIX):
            raise MiniloraError(f"{path / TENSOR_FILE}: found the key {key}, expected it to start with {PEFT_PREFIX}")
        tensors[key] = np.array(entry.array())
    return config, tensors


def write_adapter(
    path: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    base_model: str,
    fan_in_fan_out: bool = False,
    module_names: Sequence[str] | None = None,
) -> None:
    """Write an adapter directory that PEFT loads, atomically; other files in it are left alone.

    tensors: by PEFT's keys. base_model: the path or hub id that the adapter belongs to. fan_in_fan_out: the base keeps
    its weights as (in, out) (GPT-2). module_names: what "target_modules" is to list, full names or suffixes; by default
    what `config` says, with "all-linear" written out as the names of the modules in `tensors`.
    Raises MiniloraError where the disk refuses; the old files are then whole.
    """
    path = Path(path)
    files = adapter_files(config, tensors, base_model, fan_in_fan_out, module_names)
    atomic_write_all({path / name: content for name, content in files.items()})


def adapter_files(
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    base_model: str,
    fan_in_fan_out: bool = False,
    module_names: Sequence[str] | None = None,
) -> dict[str, Content]:
    """The files of `write_adapter` by name, for whoever writes them together with others."""
    targets: str | Sequence[str] = config.target_modules if module_names is None else module_names
    if targets == "all-linear":
        targets = sorted(
            {key.removeprefix(PEFT_PREFIX).rpartition(".lora_A.")[0] for key in tensors if ".lora_A." in key}
        )
    written = _DEFAULTS | {
        "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in config.alpha_pattern.items()},
        "base_model_name_or_path": base_model,
        "bias": config.bias,
        "exclude_modules": _json_names(config.exclude_modules),
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layers_to_transform": None if config.layers_to_transform is None else list(config.layers_to_transform),
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": _json_names(config.modules_to_save),
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": _json_names(targets),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    return {TENSOR_FILE: tensor_file(dict(sorted(tensors.items()))), CONFIG_FILE: json_bytes(written)}


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """adapter_config.json as it stands; raises MiniloraError where `path` is no adapter directory."""
    path = Path(path)
    if not path.exists():
        raise not_there(path, "an adapter: a directory (PEFT, mlx-lm) or a .gguf file")
    if not (path / CONFIG_FILE).exists():
        found = "is a model, not an adapter" if (path / "config.json").exists() else "is no adapter"
        raise MiniloraError(f"{path} {found}: expected a directory with {CONFIG_FILE} and {TENSOR_FILE}")
    return read_json_object(path / CONFIG_FILE)


def lora_config(written: Mapping[str, Any], source: Path) -> LoraConfig:
    """What an adapter_config.json means; `source` names it in errors.

    Raises MiniloraError for a method other than LoRA, a feature that is not supported, or a malformed value.
    """
    if (method := written.get("peft_type")) != "LORA":
        raise MiniloraError(f'{source}: peft_type is "{method}", expected "LORA"')
    if (task := written.get("task_type")) not in (None, "CAUSAL_LM"):
        raise MiniloraError(f'{source}: task_type is "{task}", expected "CAUSAL_LM"')
    for key, value in written.items():
        harmless = not value or (key in _DEFAULTS and value == _DEFAULTS[key])
        if key not in _UNDERSTOOD | _WITHOUT_EFFECT and not harmless:
            raise MiniloraError(f"{source}: {key} is {value!r:.60}, which is not supported; expected it unset")
    initialisation = written.get("init_lora_weights", True)
    if not isinstance(initialisation, bool | str) or initialisation not in _INITIALISATIONS:
        raise MiniloraError(
            f"{source}: init_lora_weights is {initialisation!r}, which changes the base weights too and is not "
            "supported; convert the adapter to plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if written.get("layers_pattern") not in (None, "", [], "layers", ["layers"], "h", ["h"]):
        raise MiniloraError(f'{source}: layers_pattern is {written["layers_pattern"]!r}, expected "layers" or none')
    fields = _Fields(written, source)
    if (targets := fields.names("target_modules")) is None:
        raise MiniloraError(f"{source}: target_modules is missing, expected the names of the adapted modules")
    modules_to_save = fields.names("modules_to_save")
    if isinstance(modules_to_save, str):
        raise MiniloraError(f"{source}: modules_to_save is {modules_to_save!r}, expected a list of names")
    values = {
        "r": fields.value("r", int),
        "alpha": fields.value("lora_alpha", int | float),
        "dropout": fields.value("lora_dropout", int | float),
        "target_modules": targets,
        "exclude_modules": fields.names("exclude_modules"),
        "layers_to_transform": fields.layers("layers_to_transform"),
        "rank_pattern": fields.value("rank_pattern", dict),
        "alpha_pattern": fields.value("alpha_pattern", dict),
        "use_rslora": fields.value("use_rslora", bool),
        "use_dora": fields.value("use_dora", bool),
        "init": _INITIALISATIONS[initialisation],
        "bias": fields.value("bias", str),
        "modules_to_save": modules_to_save,
    }
    try:
        return LoraConfig(**values)
    except MiniloraError as error:
        raise MiniloraError(f"{source}: {error}") from None


class _Fields:
    """adapter_config.json's values, each type-checked when it is asked for; a missing or null one is PEFT's default."""

    def __init__(self, written: Mapping[str, Any], source: Path):
        self.written = written
        self.source = source

    def value(self, key: str, kind: Any) -> Any:
        value = self.written.get(key)
        value = _DEFAULTS[key] if value is None else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise MiniloraError(f"{self.source}: {key} is {value!r:.60}, expected e.g. {_DEFAULTS[key]!r}")
        return value

    def names(self, key: str) -> str | list[str] | None:
        value = self.written.get(key)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise MiniloraError(f"{self.source}: {key} is {value!r:.60}, expected a list of module names or a pattern")
        return value or None

    def layers(self, key: str) -> list[int] | None:
        value = self.written.get(key)
        layers = [value] if isinstance(value, int) else value
        if layers is None:
            return None
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise MiniloraError(f"{self.source}: {key} is {value!r:.60}, expected a list of layer numbers")
        return layers or None


def _json_names(names: str | Sequence[str] | None) -> str | list[str] | None:
    return names if names is None or isinstance(names, str) else list(names)


def _whole(number: float) -> float:
    """PEFT writes alpha as a whole number where it is one."""
    return int(number) if float(number).is_integer() else number
