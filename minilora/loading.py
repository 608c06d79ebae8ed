"""Models from files, and models from nothing: `load_model` and `new_model`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .backend import FLOAT_DTYPES, Array, activation_dtype, cast, compute_dtype, dtype_of, to_device, use_device
from .errors import MiniloraError
from .model import Model
from .models import family_of
from .nn import Weights

STORED = "stored"  # for load_model's dtype: as the file has it


def load_model(path: str | Path, device: str = "cpu", dtype: str | None = None) -> Model:
    """A pretrained model: a Hugging Face directory, a GGUF file, "mini" (in the package), "smollm2", or a hub id.

    dtype: "float32", "float64", "float16" or "bfloat16" to hold the weights in; "stored" as they are in the file: a
    directory's are mapped, not copied, and matrices in a GGUF's blocks (Q8_0, Q4_0, Q4_1) stay in them, which takes a
    fraction of the memory and some time per pass. None is "stored" for a directory and "float32" for GGUF. Raises
    MiniloraError for anything missing, truncated or unsupported.
    """
    from .formats.checkpoint import find_model, open_checkpoint
    from .formats.gguf import GGUFEntry
    from .formats.gguf_blocks import held_in_blocks

    use_device(device)
    wanted = None if dtype in (None, STORED) else dtype_of(dtype, STORED)
    checkpoint = open_checkpoint(find_model(path))
    if dtype is None and checkpoint.format == "gguf":
        wanted = np.dtype(np.float32)
    family = family_of(checkpoint.config)
    config = family.read_config(checkpoint.config)
    tensors = family.network.by_own_names(checkpoint.tensors)
    used: set[str] = set()

    def source(name: str, shape: tuple[int, ...]) -> Array:
        if name not in tensors:
            raise MiniloraError(
                f"{checkpoint.path} has no tensor {name}, which its configuration calls for: is the file complete?"
            )
        entry = tensors[name]
        if tuple(entry.shape) != shape:
            raise MiniloraError(
                f"{checkpoint.path}: {name} has shape {tuple(entry.shape)}, its configuration calls for {shape}"
            )
        used.add(name)
        if isinstance(entry, GGUFEntry) and wanted is None and (blocks := held_in_blocks(entry, device)) is not None:
            return blocks
        array = entry.array()
        if array.dtype.name not in FLOAT_DTYPES:
            raise MiniloraError(
                f"{checkpoint.path}: {name} is stored as {array.dtype}, expected one of {', '.join(FLOAT_DTYPES)}: "
                "take the model's original weights"
            )
        array = array if wanted is None else cast(array, wanted)
        return to_device(array, device)

    stored = {entry.dtype for entry in checkpoint.tensors.values()}
    dtype_of_network = compute_dtype(
        wanted if wanted is not None else np.dtype("float64" if stored == {"float64"} else "float32")
    )
    network = family.network(config, Weights(source), dtype_of_network)
    network.compute_in(activation_dtype(wanted or network.lm_head.weight.dtype, device))
    unused = sorted(name for name in tensors if name not in used and not family.network.ignores(name, config))
    if unused:
        raise MiniloraError(
            f"{checkpoint.path} has {len(unused)} tensors that a {config.model_type} model has no place for, "
            f"first {unused[0]}"
        )
    return Model(network, checkpoint.tokenizer, generation_config=checkpoint.generation_config, source=str(path))


def new_model(
    config: Mapping[str, Any], seed: int = 0, device: str = "cpu", dtype: str = "float32", std: float = 0.02
) -> Model:
    """A model with random weights (normal, deviation `std`; norms 1, biases 0) from a config.json's contents."""
    use_device(device)
    family = family_of(dict(config))
    random = np.random.default_rng(seed)
    held = dtype_of(dtype)

    def source(name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith("bias"):
            values = np.zeros(shape)
        elif len(shape) == 1:
            values = np.ones(shape)
        else:
            values = random.normal(0.0, std, shape)
        return to_device(values.astype(held), device)

    network = family.network(family.read_config(dict(config)), Weights(source), activation_dtype(held, device))
    return Model(network, None, source=f"a random {config['model_type']}")
