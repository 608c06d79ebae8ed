"""The GGUF container: metadata, the table of tensors, and the mapped bytes. What they mean for a model is in gguf.py.

The types, block sizes and dequantisation are those of the `gguf` package. The header is read here and not by its
`GGUFReader`, which takes 2 s for SmolLM2's 98,000 strings (0.1 s here) and loops for ever on an array count that a
damaged file has made huge: here each read is checked against the end of the file.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from ..errors import MiniloraError
from .safetensors import numpy_dtype

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip
_PLAIN_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file, not read yet. `shape` is NumPy's order (rows first; GGUF stores it reversed).

    `dtype` is NumPy's name for plain floats ("float32", "bfloat16") and GGML's for blocks ("Q4_1", "Q6_K").
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    nbytes: int
    offset: int  # of the first byte, from the start of the file
    data: mmap.mmap

    @property
    def dtype(self) -> str:
        return _PLAIN_DTYPES.get(self.type.name, self.type.name)

    def stored(self) -> np.ndarray:
        """A read-only view of the mapped bytes: plain floats as `shape`, blocks as uint8 (..., bytes of a row)."""
        if self.type.name in _PLAIN_DTYPES:
            return np.ndarray(self.shape, numpy_dtype(self.dtype), buffer=self.data, offset=self.offset)
        block_values, block_bytes = GGML_QUANT_SIZES[self.type]
        row_bytes = self.shape[-1] // block_values * block_bytes
        return np.ndarray((*self.shape[:-1], row_bytes), np.uint8, buffer=self.data, offset=self.offset)

    def array(self) -> np.ndarray:
        """Plain floats as a view of the file, blocks as new float32; rows in the file's order."""
        return self.decode(self.stored())

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Plain floats as they are, blocks as float32; rows may have been reordered since `stored()`."""
        if self.type.name in _PLAIN_DTYPES:
            return stored
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                return dequantize(stored, self.type)
        except NotImplementedError as error:
            raise MiniloraError(
                f"{self.path}: tensor {self.name} is stored as {self.type.name}, which cannot be dequantised here; "
                "expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K or Q6_K, for instance"
            ) from error


@dataclass(frozen=True)
class GGUFFile:
    """What the header says: `metadata` as Python values (arrays as lists), `tensors` by GGUF name in file order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def open_gguf(path: str | Path) -> GGUFFile:
    """Read the header and map the rest; raises MiniloraError for a missing, truncated or malformed file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                begin = "is empty" if not path.stat().st_size else "does not start with the letters GGUF"
                raise MiniloraError(f"{path} is not a GGUF file: it {begin}; download or save it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise MiniloraError(f"cannot read {path}: {error.strerror or error}") from error
    reader = _HeaderReader(path, data)
    version = reader.scalar("I")
    if version not in _VERSIONS:
        found = f"version {version}" if version & 0xFFFF else "a big-endian file"
        raise MiniloraError(
            f"{path}: found {found}, expected little-endian GGUF version 2 or 3; convert the model again"
        )
    tensor_count, metadata_count = reader.scalar("Q"), reader.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = reader.string()
        if key in metadata:
            raise reader.malformed(f"metadata key {key!r} occurs twice")
        metadata[key] = reader.value()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.malformed(f"general.alignment is {alignment!r}, expected a power of two")
    table: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int, int]] = {}
    for _ in range(tensor_count):
        name = reader.string()
        if name in table:
            raise reader.malformed(f"tensor {name!r} occurs twice")
        table[name] = reader.tensor_info(name)
    start = -(-reader.position // alignment) * alignment
    tensors = {}
    for name, (shape, type_, nbytes, offset) in table.items():
        if start + offset + nbytes > len(data):
            raise reader.truncated(f"the data of tensor {name}")
        tensors[name] = GGUFTensor(name, path, shape, type_, nbytes, start + offset, data)
    return GGUFFile(path, metadata, tensors)


class _HeaderReader:
    """A cursor over the file that refuses to step past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.position = 4  # behind the magic

    def malformed(self, what: str) -> MiniloraError:
        return MiniloraError(f"{self.path} is a malformed GGUF file: {what}; download or convert it again")

    def truncated(self, what: str) -> MiniloraError:
        return MiniloraError(
            f"{self.path} is truncated or damaged: {len(self.data)} bytes end before {what}; download it again"
        )

    def scalar(self, format: str) -> Any:
        size = struct.calcsize(f"<{format}")
        self.position += size
        if self.position > len(self.data):
            raise self.truncated("the header")
        return struct.unpack_from(f"<{format}", self.data, self.position - size)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        self.position += length
        if self.position > len(self.data):
            raise self.truncated("a text of the header")
        try:
            return str(self.data[self.position - length : self.position], "utf-8")
        except UnicodeDecodeError as error:
            raise self.malformed(f"a text before byte {self.position} is not UTF-8") from error

    def value(self) -> Any:
        type_ = self._value_type()
        if type_ is GGUFValueType.STRING:
            return self.string()
        if type_ is not GGUFValueType.ARRAY:
            return self.scalar(_SCALAR_FORMATS[type_])
        item_type, count = self._value_type(), self.scalar("Q")
        if item_type is GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if item_type is GGUFValueType.ARRAY:
            raise self.malformed("arrays of arrays are not supported")
        dtype = np.dtype(f"<{_SCALAR_FORMATS[item_type]}")
        if self.position + count * dtype.itemsize > len(self.data):
            raise self.truncated("an array of the header")
        self.position += count * dtype.itemsize
        return np.ndarray(count, dtype, buffer=self.data, offset=self.position - count * dtype.itemsize).tolist()

    def tensor_info(self, name: str) -> tuple[tuple[int, ...], GGMLQuantizationType, int, int]:
        """(shape, type, bytes, offset from the start of the data)."""
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.malformed(f"tensor {name} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        shape = tuple(reversed([self.scalar("Q") for _ in range(dimensions)]))
        if 0 in shape:
            raise self.malformed(f"tensor {name} has shape {shape}, which is empty")
        number, offset = self.scalar("I"), self.scalar("Q")
        try:
            type_ = GGMLQuantizationType(number)
        except ValueError as error:
            raise self.malformed(f"tensor {name} has the unknown type number {number}") from error
        block_values, block_bytes = GGML_QUANT_SIZES[type_]
        if shape[-1] % block_values:
            raise self.malformed(f"{name} has rows of {shape[-1]} values, no multiple of {type_.name}'s {block_values}")
        return shape, type_, math.prod(shape) // block_values * block_bytes, offset

    def _value_type(self) -> GGUFValueType:
        number = self.scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.malformed(f"unknown metadata type {number} before byte {self.position}") from error
