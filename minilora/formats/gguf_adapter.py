"""Adapters as llama.cpp loads them (--lora): a GGUF file of A and B matrices, read and written.

llama.cpp adds (alpha / r) · B (A x) to the output of the base tensor T, with T.lora_a (r, in), T.lora_b (out, r), one
alpha for the file and r from B's shape. So a layer whose scale is not alpha / r (rsLoRA, alpha_pattern) has the factor
folded into its B, and where the rows of T are permuted (q and k of a Llama), those of B are too. Of the embedding A is
stored as (V, r): a token's row is looked up in it.
Left out: DoRA and trained biases, which llama.cpp does not know.
Source: convert_lora_to_gguf.py and llama-adapter.cpp of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf.constants import LlamaFileType

from ..errors import MiniloraError
from ..lora.config import LoraConfig
from ..models.config import ModelConfig
from .gguf_file import GGUFFile, open_gguf
from .gguf_names import ARCHITECTURE_OF, ARCHITECTURES, permute_rows, restore_rows
from .gguf_write import POSITIONS, Source, write_gguf
from .updates import Update, most_common, peft_adapter, updates_of

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"


def write_adapter(
    path: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, np.ndarray],
    base: ModelConfig,
    head_is_tied: bool,
    name: str = "",
) -> None:
    """Write an adapter as a GGUF file for llama.cpp, atomically. Matrices become float32.

    tensors: by PEFT's keys. name: what llama.cpp shows.
    Raises MiniloraError for an adapter that llama.cpp cannot apply and where the disk refuses.
    """
    updates = updates_of(config, tensors, "llama.cpp")
    architecture = ARCHITECTURES[ARCHITECTURE_OF[base.model_type]]
    instead = "merge it instead (minilora export --format gguf --merged)"
    if config.use_dora:
        raise MiniloraError(f"the adapter uses DoRA, which llama.cpp's adapters do not know: {instead}")
    named: dict[str, Update] = {}
    for module, update in updates.items():
        theirs = architecture.tensor(f"{module}.weight")
        if theirs is None or theirs == POSITIONS:
            raise MiniloraError(f"the adapter changes {module}, to which llama.cpp applies none: {instead}")
        if head_is_tied and theirs in (_EMBEDDING, _HEAD):
            raise MiniloraError(
                f"the adapter changes {module} of a base with a tied head, where llama.cpp keeps one tensor for both "
                f"and can adapt neither: {instead}"
            )
        named[theirs] = update
    alpha = most_common([update.scale * update.rank for update in named.values()])
    matrices: dict[str, np.ndarray] = {}
    for theirs, update in named.items():
        same = update if update.scale * update.rank == alpha else update.scaled_to(alpha / update.rank)
        heads = architecture.permuted_heads(theirs, base.num_attention_heads, base.num_key_value_heads)
        lora_B = same.lora_B if heads is None else permute_rows(same.lora_B, heads)
        matrices[f"{theirs}.lora_a"] = same.lora_A.T if theirs == _EMBEDDING else same.lora_A
        matrices[f"{theirs}.lora_b"] = lora_B
    metadata = {
        "general.type": "adapter",
        "general.name": name,
        "general.file_type": int(LlamaFileType.ALL_F32),
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    sources = {key: Source.of(np.ascontiguousarray(array, np.float32)) for key, array in matrices.items()}
    write_gguf(path, architecture.name, metadata, sources)


def read_adapter(path: str | Path, base: ModelConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The configuration, and the tensors by PEFT's keys, of a GGUF adapter for a base with this config.

    Raises MiniloraError for a file that is no LoRA adapter, or one of another architecture.
    """
    file = open_gguf(path)
    architecture = ARCHITECTURES[ARCHITECTURE_OF[base.model_type]]
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", None)):
        if (found := file.metadata.get(key)) != (wanted := expected or architecture.name):
            raise MiniloraError(f'{path}: {key} is {found!r}, expected "{wanted}": a LoRA adapter for this base')
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise MiniloraError(f"{path}: adapter.lora.alpha is {alpha!r}, expected a number")
    updates: dict[str, Update] = {}
    for theirs, (lora_a, lora_b) in _pairs(file).items():
        if (module := architecture.module(theirs)) is None:
            raise MiniloraError(f"{path}: tensor {theirs} belongs to no {architecture.name} model")
        heads = architecture.permuted_heads(theirs, base.num_attention_heads, base.num_key_value_heads)
        if heads is not None and lora_b.shape[0] % (2 * heads):
            raise MiniloraError(f"{path}: {theirs}.lora_b has {lora_b.shape[0]} rows, expected {heads} equal heads")
        lora_B = lora_b if heads is None else restore_rows(lora_b, heads)
        lora_A = lora_a.T if theirs == _EMBEDDING else lora_a
        if lora_A.shape[0] != lora_B.shape[1]:
            raise MiniloraError(
                f"{path}: {theirs} has lora_a {lora_a.shape} and lora_b {lora_b.shape}, expected one rank of both"
            )
        # An alpha of 0 is llama.cpp's "no scale".
        scale = alpha / lora_A.shape[0] if alpha else 1.0
        updates[module.removesuffix(".weight")] = Update(lora_A, lora_B, scale, theirs == _EMBEDDING)
    if not updates:
        raise MiniloraError(f"{path} holds no lora_a and lora_b, expected an adapter's matrices")
    if not alpha:
        alpha = most_common([float(update.rank) for update in updates.values()])
        updates = {module: update.scaled_to(alpha / update.rank) for module, update in updates.items()}
    return peft_adapter(updates, alpha=alpha)


def _pairs(file: GGUFFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{base tensor: (lora_a, lora_b)}, own memory."""
    stems: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in file.tensors.items():
        found = re.fullmatch(r"(.+\.weight)\.lora_([ab])", name)
        if found is None or len(tensor.shape) != 2:
            raise MiniloraError(f"{file.path}: found {name} of shape {tensor.shape}, expected lora_a and lora_b")
        stems.setdefault(found[1], {})[found[2]] = np.array(tensor.array())
    for stem, pair in stems.items():
        if len(pair) != 2:
            raise MiniloraError(f"{file.path}: {stem} has lora_{next(iter(pair))} only, expected lora_a and lora_b")
    return {stem: (pair["a"], pair["b"]) for stem, pair in stems.items()}
