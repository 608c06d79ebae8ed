"""Adapters of mlx-lm: adapter_config.json and adapters.safetensors, read and written.

mlx-lm computes y = W x + scale · (x lora_a) lora_b: its matrices are PEFT's transposed, lora_a (in, r) = Aᵀ and
lora_b (r, out) = Bᵀ, and its `scale` is the factor itself, alpha / r. One rank and one scale hold for all layers: lower
ranks are filled up with zeros and a factor goes into lora_b, so every ΔW stays what it was. DoRA's magnitude is `m`.
Left out: fine_tune_type "full", experts (three-dimensional matrices).
Source: mlx_lm/tuner/lora.py, dora.py and utils.py (load_adapters) of https://github.com/ml-explore/mlx-lm
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiniloraError
from ..files import Content, atomic_write_all, json_bytes, read_json_object
from ..lora.config import LoraConfig
from ..models.config import ModelConfig
from .safetensors import open_safetensors, tensor_file
from .updates import Update, most_common, peft_adapter, updates_of

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapters.safetensors"

_TOKENS = ("embed_tokens", "wte")  # the embedding that a tied head shares
_EMBEDDINGS = (*_TOKENS, "wpe")
_HEAD = "lm_head"
_BLOCK = re.compile(r"(?:model\.layers|model\.h)\.(\d+)\.(.+)")
# mlx-lm's GPT-2 names its network "model", Hugging Face's "transformer".
_GPT2_NAMES = ("model.h.", "model.wte", "model.wpe")


def is_mlx_adapter(path: Path) -> bool:
    """Whether a directory's adapter_config.json is mlx-lm's: PEFT's says `peft_type`, mlx-lm's `lora_parameters`."""
    if not (path / CONFIG_FILE).exists():
        return (path / TENSOR_FILE).exists() or (path / "adapters.npz").exists()
    config = read_json_object(path / CONFIG_FILE)
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_adapter(
    path: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    base: ModelConfig,
    head_is_tied: bool,
    base_model: str,
) -> None:
    """Write an adapter directory for mlx-lm, atomically; other files in it are left alone. Tensors become float32.

    tensors: by PEFT's keys. base_model: the path or hub id that the adapter belongs to.
    Raises MiniloraError for an adapter that mlx-lm cannot apply (see `_check`) and where the disk refuses.
    """
    updates = updates_of(config, tensors, "mlx-lm")
    _check(updates, base, head_is_tied)
    if head_is_tied:  # checked: if there, it is the embedding's
        updates.pop(_HEAD, None)
    rank = max(update.rank for update in updates.values())
    scale = most_common([update.scale for update in updates.values()])
    arrays: dict[str, np.ndarray] = {}
    for name, update in updates.items():
        same = update.scaled_to(scale).padded_to(rank)
        theirs = name.replace("transformer.", "model.") if base.model_type == "gpt2" else name
        arrays[f"{theirs}.lora_a"], arrays[f"{theirs}.lora_b"] = same.lora_A.T, same.lora_B.T
        if update.magnitude is not None:
            arrays[f"{theirs}.m"] = update.magnitude
    layers, keys = _layers_and_keys(sorted({key.rpartition(".")[0] for key in arrays}), base.num_hidden_layers)
    settings = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": config.dropout, "keys": keys},
        "model": base_model,
        "num_layers": layers,
    }
    files: dict[str, Content] = {
        TENSOR_FILE: tensor_file(
            {name: array.astype(np.float32) for name, array in sorted(arrays.items())}, {"format": "mlx"}
        ),
        CONFIG_FILE: json_bytes(settings),
    }
    atomic_write_all({Path(path) / name: content for name, content in files.items()})


def _check(updates: Mapping[str, Update], base: ModelConfig, head_is_tied: bool) -> None:
    """MiniloraError where mlx-lm has no such layer, or would apply the update to more than the layer it belongs to."""
    instead = "merge the adapter instead (minilora merge): mlx-lm reads the directory"
    embedding = next((update for name, update in updates.items() if name.endswith(_TOKENS)), None)
    head = updates.get(_HEAD)
    if base.model_type == "gpt2" and not head_is_tied:
        raise MiniloraError("mlx-lm's GPT-2 has a tied head, this base has a head of its own: expected a tied one")
    if not head_is_tied or (embedding is None and head is None):
        return
    if head is None:
        raise MiniloraError(
            "the adapter changes the embedding of a tied base and not its head, expected both: mlx-lm applies an "
            f"embedding's adapter to the tied head as well; {instead}"
        )
    together = (
        embedding is not None
        and embedding.scale == head.scale
        and np.array_equal(embedding.lora_A.T, head.lora_B)
        and np.array_equal(embedding.lora_B.T, head.lora_A)
    )
    if not together:
        raise MiniloraError(
            "the adapter changes the head of a tied base by another update than its embedding, expected one for both: "
            f"mlx-lm has no head of its own there; {instead}"
        )


def _layers_and_keys(modules: Sequence[str], blocks: int) -> tuple[int, list[str]]:
    """(num_layers, keys) with which mlx-lm adapts just these modules.

    It looks for the keys within the last num_layers blocks, and for each as a full name. So the same modules in each of
    the last blocks are named once, as mlx-lm's own training does it; anything else by its full names.
    """
    by_block: dict[int, set[str]] = {}
    others = []
    for module in modules:
        if found := _BLOCK.fullmatch(module):
            by_block.setdefault(int(found[1]), set()).add(found[2])
        else:
            others.append(module)
    if not by_block:
        return blocks, others
    first = min(by_block)
    same = by_block[first]
    if all(by_block.get(block) == same for block in range(first, blocks)):
        return blocks - first, sorted(same) + others
    return blocks, list(modules)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_adapter(path: str | Path, head_is_tied: bool = False) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The configuration, and the tensors by PEFT's keys, of an mlx-lm adapter directory.

    head_is_tied: whether the base's is: mlx-lm then applies an embedding's adapter to the head as well, so that it
    becomes two of PEFT's. Raises MiniloraError for a missing or malformed file and for what is no low-rank adapter.
    """
    path = Path(path)
    source = path / CONFIG_FILE
    settings = read_json_object(source)
    if (kind := settings.get("fine_tune_type", "lora")) not in ("lora", "dora"):
        raise MiniloraError(f'{source}: fine_tune_type is "{kind}", expected "lora" or "dora"')
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise MiniloraError(f"{source}: lora_parameters is {parameters!r:.60}, expected rank, scale and dropout")
    scale, dropout = _number(parameters, "scale", source), _number(parameters, "dropout", source, 0.0)
    if not (path / TENSOR_FILE).exists() and (path / "adapters.npz").exists():
        raise MiniloraError(f"{path} holds adapters.npz of an early mlx-lm, expected {TENSOR_FILE}: train it again")
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in open_safetensors(path / TENSOR_FILE).items():
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b", "m") or len(entry.shape) != (1 if part == "m" else 2):
            raise MiniloraError(
                f"{path / TENSOR_FILE}: found {name} of shape {entry.shape}, expected matrices lora_a and lora_b of "
                "linear and embedding layers (and m with DoRA)"
            )
        parts.setdefault(_hugging_face_name(module), {})[part] = np.array(entry.array())
    updates = {}
    for module, found in parts.items():
        wanted = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
        if found.keys() != wanted or found["lora_a"].shape[1] != found["lora_b"].shape[0]:
            shapes = ", ".join(f"{part} {array.shape}" for part, array in found.items())
            raise MiniloraError(
                f"{path / TENSOR_FILE}: {module} has {shapes}; expected {', '.join(sorted(wanted))}, lora_a (in, r) "
                "and lora_b (r, out)"
            )
        embedding = module.endswith(_EMBEDDINGS)
        lora_A, lora_B = found["lora_a"].T, found["lora_b"].T
        updates[module] = Update(lora_A, lora_B, scale, embedding, found.get("m"))
        if head_is_tied and module.endswith(_TOKENS):
            updates[_HEAD] = Update(lora_B.T, lora_A.T, scale, magnitude=found.get("m"))
    if len(ranks := {update.rank for update in updates.values()}) != 1:
        raise MiniloraError(
            f"{path / TENSOR_FILE}: found matrices of rank {', '.join(map(str, sorted(ranks))) or 'none'}, expected one"
        )
    return peft_adapter(updates, alpha=scale * ranks.pop(), dropout=dropout)


def _hugging_face_name(module: str) -> str:
    return module.replace("model.", "transformer.", 1) if module.startswith(_GPT2_NAMES) else module


def _number(parameters: Mapping[str, Any], key: str, source: Path, default: float | None = None) -> float:
    value = parameters.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise MiniloraError(f"{source}: lora_parameters.{key} is {value!r:.60}, expected a number")
    return float(value)
