"""Looking up rows of a table, with a gradient that has the same bits every time. What it computes: ops/embedding.py;
the kernel: rows.cu.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ... import ops
from ...backend import Array, cast, compute_dtype
from .source import function, ready

THREADS = 256
DTYPES = ("float32", "float64", "bfloat16", "float16")


def applies(weight: Any, *, tokens: Array, dtype: Any = None) -> bool:
    return isinstance(weight, cupy.ndarray) and weight.dtype.name in DTYPES and isinstance(tokens, cupy.ndarray)


@ops.embedding.kernel("cuda", applies)
def embedding(weight: Array, *, tokens: Array, dtype: Any = None):
    shape, before = weight.shape, weight.dtype

    def vjp(dy):
        wide = compute_dtype(before)  # the sums' dtype
        dweight = cupy.zeros(shape, wide)
        index = tokens.reshape(-1).astype(np.int64, copy=False)
        values = ready(cast(dy, wide).reshape(-1, shape[1]))
        if values.size:
            add_rows = function("rows", f"add_rows_{wide.name}", "float32")
            arguments = (dweight, index, values, np.int32(len(index)), np.int32(shape[1]))
            add_rows((len(index),), (THREADS,), arguments)
        return cast(dweight, before)

    return cast(weight[tokens], before if dtype is None else dtype), vjp
