"""Hugging Face's safetensors files: checked by the `safetensors` library, then memory-mapped: opening copies nothing.

A file is 8 bytes (little-endian header length), a JSON header {name: {dtype, shape, data_offsets}}, then the raw
tensors. A large model is several such files and an index that says which tensor lies in which.
Source: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import MiniloraError
from ..files import Content, atomic_write_all, json_bytes, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # the size at which Hugging Face starts a new file

_DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsEntry:
    """One tensor of a safetensors file, not read yet. `dtype` is NumPy's name ("float32", "bfloat16", ...)."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int  # of the first byte, from the start of the file
    data: mmap.mmap

    def array(self) -> np.ndarray:
        """A read-only view of the mapped file, as stored; raises MiniloraError for a dtype that NumPy lacks."""
        if self.dtype not in _DTYPE_NAMES.values():
            raise MiniloraError(f"{self.path}: tensor {self.name} has dtype {self.dtype}, which is not supported")
        return np.ndarray(self.shape, numpy_dtype(self.dtype), buffer=self.data, offset=self.offset)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name; "bfloat16" and the float8 types come from ml_dtypes."""
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def open_safetensors(path: str | Path) -> dict[str, SafetensorsEntry]:
    """The tensors of one file, by name; raises MiniloraError for a missing, truncated or malformed one."""
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is missing"
        raise MiniloraError(f"{path} {found}, expected a safetensors file: download or save it again")
    try:
        # Checks the header's size and JSON, that dtypes, shapes and byte ranges agree, and that these fill the file.
        with safetensors.safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except safetensors.SafetensorError as error:
        raise MiniloraError(f"{path} is not a whole safetensors file ({error}); download or save it again") from error
    except OSError as error:
        raise MiniloraError(f"cannot read {path}: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        dtype = _DTYPE_NAMES.get(info["dtype"], info["dtype"])
        entries[name] = SafetensorsEntry(
            name, path, tuple(info["shape"]), dtype, end - start, 8 + header_bytes + start, data
        )
    return entries


def open_model_tensors(directory: str | Path) -> dict[str, SafetensorsEntry]:
    """The tensors of a model directory, from `model.safetensors` or the files that its index names.

    Raises MiniloraError where there is neither, or where the index and the files disagree.
    """
    directory = Path(directory)
    if (directory / SINGLE_FILE).exists():
        return open_safetensors(directory / SINGLE_FILE)
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        pickles = sorted(file.name for file in directory.glob("*.bin"))
        found = f"only {pickles[0]}, a pickle that could run code; convert it" if pickles else "neither; save the model"
        raise MiniloraError(f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found} as safetensors")
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
        raise MiniloraError(
            f'{index_path}: expected "weight_map" to give a file name of this directory for each tensor'
        )
    shards = {file: open_safetensors(directory / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise MiniloraError(f"{index_path} says that tensor {name} is in {file}, which does not hold it")
    return {name: shards[file][name] for name, file in weight_map.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The notes in a file's header ({} for none); raises MiniloraError for a missing, truncated or malformed file."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise MiniloraError(f"{path} is not a whole safetensors file ({error}); download or save it again") from error
    except OSError as error:
        raise MiniloraError(f"cannot read {path}: {error.strerror or error}") from error


def save_tensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, atomically; `metadata` defaults to {"format": "pt"}, which transformers demands.

    Raises MiniloraError where the disk is full or a dtype has no name in the format.
    """
    atomic_write_all({Path(path): tensor_file(tensors, metadata)})


def save_checkpoint_tensors(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    shard_bytes: int = SHARD_BYTES,
    beside: Mapping[str, Content] | None = None,
) -> None:
    """Write a model's tensors as Hugging Face does: one file, or shards of at most `shard_bytes` bytes and an index.

    `beside` are further files of the directory by name (its config, its tokenizer): all are complete on the disk before
    the first takes its place. Tensor files of an earlier save that these do not replace are then removed, for a reader
    would prefer them; anything else in the directory is left alone.
    """
    directory = Path(directory)
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, array in tensors.items():
        if shards[-1] and filled + array.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    files: dict[str, Content] = dict(beside or {})
    if len(shards) == 1:
        files[SINGLE_FILE] = tensor_file(shards[0])
    else:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            files[file] = tensor_file(shard)
            weight_map.update(dict.fromkeys(shard, file))
        total = sum(array.nbytes for array in tensors.values())
        files[INDEX_FILE] = json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})
    atomic_write_all({directory / name: content for name, content in files.items()})
    for path in directory.iterdir():
        ours = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name)
        if ours and path.name not in files:
            path.unlink()


def tensor_file(tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> Content:
    """A function that writes `tensors` to the path it is given, for `atomic_write`."""
    for name, array in tensors.items():
        if array.dtype.name not in _DTYPE_NAMES.values():
            raise MiniloraError(f"tensor {name} has dtype {array.dtype}, which a safetensors file cannot hold")

    def write(path: Path) -> None:
        contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        path.touch()
        permissions = path.stat().st_mode  # as the user's umask has them; the library would leave the owner's alone
        try:
            safetensors.numpy.save_file(contiguous, path, metadata=metadata or {"format": "pt"})
            path.chmod(permissions)
        except safetensors.SafetensorError as error:
            system = re.search(
                r"os error (\d+)", str(error)
            )  # the library keeps a full disk's number only in its message
            if system is None:
                raise
            raise OSError(int(system[1]), os.strerror(int(system[1]))) from error

    return write


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value
