"""Which array library an array belongs to, and the few things the two libraries do differently.

NumPy and CuPy share one interface, so the engine is written once: `xp = array_module(x)` and then `xp.exp(x)`. This
file holds the rest: devices, the floating-point types, matrix products (every one in the engine goes through `matmul`),
and copies to and from the host. It knows nothing of gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from .errors import MiniloraError

Array = Any  # numpy.ndarray or cupy.ndarray: neither library is typed well enough for more

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")


def _cupy() -> ModuleType | None:
    """CuPy if somebody has imported it: an array can only be CuPy's when it is."""
    return sys.modules.get("cupy")


def array_module(*arrays: Array) -> ModuleType:
    """cupy if any of the arguments is an array of CuPy's, else numpy; numbers and None may be among them."""
    cupy = _cupy()
    if cupy is not None and any(isinstance(array, cupy.ndarray) for array in arrays):
        return cupy
    return np


# --- dtypes ---------------------------------------------------------------------------------------------------------


def dtype_of(name: str, *others: str) -> np.dtype:
    """The dtype called "float64", "float32", "float16" or "bfloat16" (the last from ml_dtypes: NumPy has none).

    others: what the caller takes besides, which the MiniloraError for any other name lists too.
    """
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise MiniloraError(
                "bfloat16 needs the package ml_dtypes, which is not installed: pip install ml_dtypes"
            ) from None
        return np.dtype(ml_dtypes.bfloat16)
    if name not in FLOAT_DTYPES:
        raise MiniloraError(f"dtype is {name!r}, expected one of {', '.join((*FLOAT_DTYPES, *others))}")
    return np.dtype(name)


def activation_dtype(dtype: np.dtype, device: str) -> np.dtype:
    """What a network computes in whose weights are `dtype`: bfloat16 for bfloat16 on a GPU, else `compute_dtype`.

    A CPU has no bfloat16 arithmetic, and float16 overflows. Sums and statistics are float32 all the same.
    """
    return dtype if dtype.name == "bfloat16" and device.startswith("cuda") else compute_dtype(dtype)


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that a sum over values of `dtype` is taken in: float64 stays float64, everything else float32."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def cast(array: Array, dtype: np.dtype) -> Array:
    """`array` in another float dtype; the same object when nothing changes. Rounds to nearest even."""
    if array.dtype == dtype:
        return array
    if array.dtype.name == "bfloat16" and dtype == np.float32 and array_module(array) is np:
        # A bfloat16 is the upper half of a float32: widening is a shift, several times faster than a conversion.
        wide = np.asarray(array).view(np.uint16).astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    return array.astype(dtype)


# --- devices --------------------------------------------------------------------------------------------------------


@cache
def parse_device(device: str) -> tuple[str, int]:
    """("cpu", 0) or ("cuda", index) from "cpu", "cuda" or "cuda:1"; MiniloraError when it is not there to be used."""
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return "cpu", 0
    if kind != "cuda" or (index and not index.isdigit()):
        raise MiniloraError(f"device is {device!r}, expected cpu, cuda or cuda:N")
    number = int(index or 0)
    try:
        import cupy
    except ImportError:
        raise MiniloraError(
            f"device {device!r} needs CuPy, not installed here: pip install 'minilora[cuda12]' or 'minilora[cuda13]'"
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise MiniloraError(f"device {device!r}: CuPy finds no usable GPU ({error}); use --device cpu") from None
    if number >= count:
        raise MiniloraError(f"device {device!r}: there are {count} GPUs, numbered from 0; use cuda:{max(count - 1, 0)}")
    for load in gpu_loaders:
        load()
    return "cuda", number


gpu_loaders: list[Callable[[], Any]] = []  # run when a GPU is first asked for: the GPU kernels register themselves so


def device_of(array: Array) -> str:
    """ "cpu", or "cuda:N" for an array of CuPy's; of a compressed weight, that of its `storage`."""
    array = getattr(array, "storage", array)
    return "cpu" if array_module(array) is np else f"cuda:{array.device.id}"


def to_device(array: Array, device: str) -> Array:
    """`array` on the device; the same object when it is there already."""
    kind, index = parse_device(device)
    if kind == "cpu":
        return to_numpy(array)
    import cupy

    with cupy.cuda.Device(index):
        return cupy.asarray(array)


def resident(array: Array, device: str) -> Array:
    """`array` on the device to stay: not in memory that a recorded step (kernels/cuda/graph.py) writes over."""
    kind, index = parse_device(device)
    if kind == "cpu":
        return to_numpy(array)
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(index), cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
        return cupy.array(array)


def on_device(device: str) -> Any:
    """A context in which new arrays of CuPy's land on the device (does nothing for the CPU)."""
    kind, index = parse_device(device)
    if kind == "cpu":
        return nullcontext()
    import cupy

    return cupy.cuda.Device(index)


def use_device(device: str) -> None:
    """Let new arrays of CuPy's and its kernels land on the device from here on (nothing to do for the CPU)."""
    kind, index = parse_device(device)
    if kind == "cuda":
        sys.modules["cupy"].cuda.Device(index).use()


def to_numpy(array: Any) -> np.ndarray:
    """A NumPy array with the values of an array or Tensor (no copy where it is NumPy's already)."""
    if hasattr(array, "requires_grad"):  # a Tensor; arrays of either library have a `data` too, which is another thing
        array = array.data
    cupy = _cupy()
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy.asnumpy(array)
    return np.asarray(array)


# --- arithmetic that all of the engine shares ------------------------------------------------------------------------


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b for equal dtypes, broadcasting over leading axes: every matrix product of the engine comes through here."""
    if array_module(a, b) is np:
        return np.matmul(a, b, out=out)
    return gpu_products[-1](a, b, out)


def _cupy_product(a: Array, b: Array, out: Array | None) -> Array:
    return sys.modules["cupy"].matmul(a, b, out=out)


gpu_products = [_cupy_product]  # the last one computes products on a GPU; the GPU kernels add theirs


def add_at(target: Array, index: Array, values: Array) -> None:
    """target[index] += values along the first axis, repeated indices adding up (the transpose of target[index])."""
    if target.dtype.name == "bfloat16":  # of which neither library has the operation: the sums are taken wider
        wide = cast(target, np.dtype(np.float32))
        add_at(wide, index, cast(values, wide.dtype))
        target[...] = cast(wide, target.dtype)
        return
    array_module(target).add.at(target, index, values)  # CuPy's additions are atomic, so their order is not fixed
