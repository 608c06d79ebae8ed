"""`plan`: full fine-tuning and LoRA of a model side by side, and what each fits on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..backend import dtype_of
from ..errors import MiniloraError
from ..files import not_there, read_json_object
from ..formats.checkpoint import NAMES, find_model, open_checkpoint
from ..lora import LoraConfig
from ..models import family_of
from .machines import MACHINES, Machine
from .memory import Memory, Step, step_memory
from .named import named_config, unknown

_FILE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in a safetensors header


@dataclass(frozen=True)
class Column:
    """One way to train: lora None is full fine-tuning. file: the safetensors file that it leaves behind, in bytes."""

    lora: LoraConfig | None
    memory: Memory
    file: int

    @property
    def share(self) -> float:
        """Trained parameters as a part of the base's."""
        return self.memory.trained / self.memory.parameters

    def fits(self, machine: Machine, mapped: int = 0) -> bool:
        return self.memory.peak + mapped <= machine.usable


@dataclass(frozen=True)
class Plan:
    """A model's ways to be trained: full fine-tuning first, then LoRA at each rank.

    held: the dtype that a frozen base is held in. length: of a row, in tokens. stored: bytes of the model's own file,
    None for a name. mapped: those of them that stay in memory beside converted
    weights, because some tensors of the file are used as they lie there (the system may drop them).
    """

    name: str
    held: str
    step: Step
    length: int
    columns: tuple[Column, ...]
    stored: int | None = None
    mapped: int = 0


def plan(
    model: str | Path | Mapping[str, Any],
    loras: Sequence[LoraConfig] = (LoraConfig(),),
    step: Step | None = None,
    dtype: str | None = None,
    file_dtype: str = "float32",
) -> Plan:
    """What training takes, for a name ("llama-7b"), a directory with config.json, a GGUF file, "smollm2", or a config.

    loras: an adapter for each column beside full fine-tuning. dtype: what a frozen base is held in; by default float32
    on the CPU and bfloat16 on a GPU. file_dtype: what the adapter is saved in. Raises MiniloraError for a model that is
    not found or not supported, and for targets, lengths and dtypes that cannot be.
    """
    step = step or Step()
    held = dtype or ("bfloat16" if step.device == "cuda" else "float32")
    if file_dtype not in _FILE_NAMES:
        raise MiniloraError(f"file_dtype is {file_dtype!r}, expected one of {', '.join(_FILE_NAMES)}")
    if not loras:
        raise MiniloraError("found no adapter to plan, expected at least one LoraConfig")
    name, config, sizes = ("a config", dict(model), None) if isinstance(model, Mapping) else _find(model, held)
    columns = []
    for lora in (None, *loras):
        memory, shapes = step_memory(config, lora, step, dtype_of(held))
        columns.append(Column(lora, memory, file_bytes(shapes, file_dtype if lora else held)))
    stored, mapped = sizes or (None, 0)
    length = step.row_length(family_of(config).read_config(config).max_position_embeddings)
    return Plan(name, held, step, length, tuple(columns), stored, mapped if step.device == "cpu" else 0)


def fitting(plan: Plan) -> dict[Machine, tuple[bool, ...]]:
    """For each machine of the plan's device, whether each column's peak has room on it."""
    return {
        machine: tuple(column.fits(machine, plan.mapped) for column in plan.columns)
        for machine in MACHINES[plan.step.device]
    }


def file_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Bytes of a safetensors file with these tensors: 8, a JSON header filled up to a multiple of 8, the values."""
    itemsize, header, offset = dtype_of(dtype).itemsize, {"__metadata__": {"format": "pt"}}, 0
    entries: dict[str, Any] = dict(header)
    for name, shape in sorted(shapes.items()):
        end = offset + prod(shape) * itemsize
        entries[name] = {"dtype": _FILE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def matrix_of(name: str) -> tuple[int, int] | None:
    """(out, in) of a matrix that is given as 4096x4096 or 4096×11008, else None."""
    found = re.fullmatch(r"([1-9]\d*)\s*[x×]\s*([1-9]\d*)", name)
    return (int(found[1]), int(found[2])) if found else None


def adapter_parameters(shape: tuple[int, int], rank: int) -> int:
    """Of A (r, in) and B (out, r): r (in + out)."""
    return rank * sum(shape)


def _find(model: str | Path, held: str) -> tuple[str, dict[str, Any], tuple[int, int] | None]:
    """A model's name, the contents of its config.json, and what its file and the mapped part of it have in bytes."""
    path = Path(model).expanduser()
    if not path.exists() and str(model) not in NAMES:
        if (config := named_config(str(model))) is None:
            raise unknown(str(model)) if path.name == str(model) else not_there(path, "a model directory or .gguf file")
        return str(model), config, None
    if path.is_dir() and (path / "config.json").exists() and not any(path.glob("*.safetensors*")):
        return str(model), read_json_object(path / "config.json"), None  # a config alone is enough
    if path.is_file() and path.name.endswith(".json"):
        return str(model), read_json_object(path), None
    checkpoint = open_checkpoint(find_model(model))
    entries = checkpoint.tensors.values()
    copied = sum(entry.nbytes for entry in entries if entry.dtype != held)
    as_they_lie = any(entry.dtype == held for entry in entries)
    return str(model), checkpoint.config, (sum(entry.nbytes for entry in entries), copied if as_they_lie else 0)
