"""An adapter's arrays from a file: every Tensor finds its own, by name and shape, and nothing is left over."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from ..backend import cast, to_numpy
from ..errors import MiniloraError
from ..nn import Module
from ..ops import CompressedWeight
from ..tensor import Tensor

PEFT_PREFIX = "base_model.model."  # PEFT's keys are this, the module's path, a dot and the name within the layer


def fitting(values: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A copy, for training to write into, of the array of this key; MiniloraError where it is missing or too large."""
    if key not in values:
        raise MiniloraError(f"the adapter has no tensor {key}, which its configuration calls for")
    if values[key].shape != shape:
        raise MiniloraError(
            f"the adapter's {key} has shape {values[key].shape}, expected {shape}: is it another model's?"
        )
    return np.array(values[key], dtype)


def check_nothing_is_left(values: Mapping[str, np.ndarray], known: Collection[str], network: Module) -> None:
    """MiniloraError if a file has a tensor that is none of the adapter's, and no repetition of what is known.

    known: the adapter's keys, without PEFT's prefix.
    """
    plain = {key.removeprefix(PEFT_PREFIX): value for key, value in values.items()}
    extra = sorted(key for key in plain.keys() - set(known) if not repeats(key, plain[key], plain, network))
    if extra:
        raise MiniloraError(
            f"the adapter has {len(extra)} tensors that fit no layer of this model, first {PEFT_PREFIX}{extra[0]}: "
            "is it another model's?"
        )


def repeats(key: str, value: np.ndarray, values: Mapping[str, np.ndarray], network: Module) -> bool:
    """Whether a tensor of an adapter's file only says again what is known, as some that PEFT writes do.

    These are the base's own weight of an adapted embedding or head (`base_layer.weight`), and beside bias="all" the
    biases of modules that are saved whole (`original_module.bias`, `modules_to_save.bias`). key: without PEFT's prefix.
    """
    path, _, attribute = key.rpartition(".")
    module, _, kind = path.rpartition(".")
    if kind == "modules_to_save":
        again = values.get(f"{module}.{attribute}")
        return again is not None and np.array_equal(value, again)
    if kind not in ("base_layer", "original_module"):
        return False
    base = getattr(dict(network.named_modules()).get(module), attribute, None)
    if not isinstance(base, Tensor) or isinstance(base.data, CompressedWeight) or value.shape != base.shape:
        return False
    return np.array_equal(cast(value, base.dtype), to_numpy(base))
