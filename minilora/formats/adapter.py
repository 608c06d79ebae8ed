"""Reading an adapter whatever tool wrote it: a PEFT directory, an mlx-lm directory, or a GGUF file of llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import MiniloraError
from ..lora.config import LoraConfig
from ..models.config import ModelConfig
from . import gguf_adapter, mlx, peft


def read_adapter(
    path: str | Path, base: ModelConfig, head_is_tied: bool = False
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The configuration and the tensors, by PEFT's keys, of the adapter at `path`, for a base with this config.

    Which format it is, its files say: adapter_config.json with `peft_type` is PEFT's and with `lora_parameters`
    mlx-lm's; a file is a GGUF. Raises MiniloraError for a missing, malformed or unsupported adapter.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            raise MiniloraError(f"{path} is the adapter's tensors alone: give the directory that it lies in")
        return gguf_adapter.read_adapter(path, base)
    if mlx.is_mlx_adapter(path):
        return mlx.read_adapter(path, head_is_tied)
    return peft.read_adapter(path)
