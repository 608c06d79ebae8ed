"""Compiling the .cu files beside this one, once per dtype and per set of constants, and launching what they hold."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from ...backend import Array

C_NAMES = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float"}
THREADS = 256


def text_of(file: str) -> str:
    """A file beside this one, with what it includes in the place of the include: CuPy keeps what it has compiled by the
    text alone, and would not see that an included file has changed.
    """
    text = (Path(__file__).parent / file).read_text()
    return re.sub(r'^#include "(.+)"$', lambda include: text_of(include[1]), text, flags=re.MULTILINE)


@cache
def module(file: str, dtype: str, **constants: int) -> Any:
    """The compiled file for activations of `dtype`; constants become macros."""
    text = text_of("common.cuh") + text_of(f"{file}.cu")
    defines = [f"-DACTIVATION={C_NAMES[dtype]}", *(f"-D{name}={value}" for name, value in constants.items())]
    return cupy.RawModule(code=text, options=("--std=c++17", *defines))


@cache
def function(file: str, name: str, dtype: str, **constants: int) -> Any:
    """One kernel of a file: called as function(grid, block, arguments)."""
    return module(file, dtype, **constants).get_function(name)


def fits(*arrays: Array) -> bool:
    """Whether these are CuPy arrays of one dtype that the kernels know, contiguous, and 16-byte packs divide the last
    axis.
    """
    first = arrays[0]
    return (
        isinstance(first, cupy.ndarray)
        and first.dtype.name in C_NAMES
        and first.ndim > 0
        and first.size > 0
        and all(isinstance(array, cupy.ndarray) and array.dtype == first.dtype for array in arrays)
        and all(array.shape[-1] % wide(first) == 0 and array.flags.c_contiguous for array in arrays)
        and all(array.data.ptr % 16 == 0 for array in arrays)
    )


def wide(array: Array) -> int:
    """Values of the array's dtype in 16 bytes."""
    return 16 // array.dtype.itemsize


def over_packs(file: str, name: str, size: int, example: Array, *arguments: Any) -> None:
    """Launch an elementwise kernel with a thread for each 16 bytes of `size` values."""
    threads = -(-size // wide(example))
    kernel = function(file, name, example.dtype.name)
    kernel((-(-threads // THREADS),), (THREADS,), (*arguments,))


def pointer(array: Array | None) -> Any:
    """An argument that is an array, or the null pointer for None."""
    return np.uint64(0) if array is None else array


def ready(gradient: Array) -> Array:
    """A gradient as the kernels read it."""
    return cupy.ascontiguousarray(gradient)


def columns(matrix: Array, start: int, shape: tuple[int, ...]) -> Array:
    """Some columns of a contiguous matrix (rows, width), from `start`, in `shape` (..., columns).

    No view in the eyes of the tape, so that nobody copies it: the columns must be nobody else's to write to.
    """
    item = matrix.itemsize
    strides = [item]
    step = matrix.shape[1] * item
    for size in reversed(shape[:-1]):
        strides.append(step)
        step *= size
    return cupy.ndarray(shape, matrix.dtype, matrix.data + start * item, strides=tuple(reversed(strides)))
