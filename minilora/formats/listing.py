"""What a model, an adapter or a tensor file holds, without reading a single tensor: names, shapes, dtypes, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import MiniloraError
from ..files import read_json_object
from . import mlx
from .checkpoint import TensorEntry
from .gguf_file import open_gguf
from .peft import CONFIG_FILE, TENSOR_FILE, read_adapter_config
from .safetensors import open_model_tensors, open_safetensors


@dataclass(frozen=True)
class Listing:
    """`tensors` by the names in the files themselves; `config` is config.json, adapter_config.json or GGUF's metadata.

    GGUF's metadata comes without its lists (the vocabulary and its merges).
    """

    path: Path
    kind: Literal["model", "adapter", "tensors"]
    format: Literal["safetensors", "gguf", "peft", "mlx"]
    config: dict[str, Any]
    tensors: Mapping[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(entry.nbytes for entry in self.tensors.values())


def list_tensors(path: str | Path) -> Listing:
    """List a model directory, an adapter directory (PEFT, mlx-lm), a .gguf or a .safetensors file.

    Raises MiniloraError where `path` is none of these, or a file is truncated or malformed.
    """
    path = Path(path)
    if mlx.is_mlx_adapter(path):
        config = read_json_object(path / mlx.CONFIG_FILE)
        return Listing(path, "adapter", "mlx", config, open_safetensors(path / mlx.TENSOR_FILE))
    if (path / CONFIG_FILE).exists():
        return Listing(path, "adapter", "peft", read_adapter_config(path), open_safetensors(path / TENSOR_FILE))
    if path.is_dir():
        config = read_json_object(path / "config.json") if (path / "config.json").exists() else {}
        return Listing(path, "model", "safetensors", config, open_model_tensors(path))
    if not path.exists():
        raise MiniloraError(f"{path} does not exist, expected a model, an adapter, a .gguf or a .safetensors file")
    if path.suffix == ".safetensors":
        return Listing(path, "tensors", "safetensors", {}, open_safetensors(path))
    file = open_gguf(path)
    scalars = {key: value for key, value in file.metadata.items() if not isinstance(value, list)}
    kind: Literal["model", "adapter"] = "adapter" if scalars.get("general.type") == "adapter" else "model"
    return Listing(path, kind, "gguf", scalars, file.tensors)
