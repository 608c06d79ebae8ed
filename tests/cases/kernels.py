"""What is asked of a kernel: where it applies, it is the primitive's definition, forward and backward, in its dtype."""

from __future__ import annotations

from collections.abc import Sequence

from minilora.backend import dtype_of
from minilora.tensor import PRIMITIVES, definitions_only

from .case import Call, Case
from .check import assert_close, in_dtype, norm, on_device, run

# Relative error in norm against the definition in float64. A float64 kernel computes as the definition does.
BOUNDS = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def check_kernels(name: str, case: Case, call: Call, device: str, dtypes: Sequence[str] = tuple(BOUNDS)) -> set[str]:
    """Compare each kernel of a primitive that applies to this call with the definition; the names of those compared."""
    primitive = PRIMITIVES[name]
    kind = device.partition(":")[0]
    compared = set()
    for dtype in dtypes if primitive.kernels else ():
        narrow = in_dtype(on_device(call, device), dtype)
        for kernel in primitive.kernels:
            if kernel.device != kind or not kernel.applies(*narrow.inputs, **narrow.options):
                continue
            # The definition on the very values that the kernel sees, in float64.
            with case.setting():
                with definitions_only():
                    values, gradients, cotangents = run(primitive, in_dtype(narrow, "float64"))
                alone = type(primitive).__new__(type(primitive))
                alone.__dict__.update(primitive.__dict__, kernels=[kernel])
                given = [array.astype(dtype_of(dtype)) for array in cotangents]
                found, found_gradients, _ = run(alone, narrow, given)
            bound = max(BOUNDS[dtype], case.float32) if dtype == "float32" else BOUNDS[dtype]
            assert_close(found, values, bound, f"{kernel.name} in {dtype}: value")
            assert_close(
                found_gradients,
                gradients,
                bound,
                f"{kernel.name} in {dtype}: gradient of input",
                0.1 * norm(*cotangents),
            )
            assert all(g.dtype == x.dtype for g, x in zip(found_gradients, narrow.inputs, strict=True) if g is not None)
            compared.add(kernel.name)
    return compared
