"""What is asked of a kernel: where it applies, it is the primitive's definition, forward and backward, in its dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minilora.backend import dtype_of
from minilora.tensor import PRIMITIVES, Kernel, Primitive, definitions_only

from .case import Call, Case
from .check import assert_close, in_dtype, norm, on_device, only_what_needs_it, run, same_for_any_strides

# Relative error in norm against the definition in float64. A float64 kernel computes as the definition does.
BOUNDS = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def check_kernels(
    name: str,
    case: Case,
    call: Call,
    device: str,
    dtypes: Sequence[str] = tuple(BOUNDS),
    record: Callable[[str, str, float], None] = lambda kernel, dtype, error: None,
) -> set[str]:
    """Compare each kernel of a primitive that applies to this call with the definition; the names of those compared.

    record: told of each kernel's error in each dtype.
    """
    kind = device.partition(":")[0]
    compared = set()
    for dtype in dtypes:
        narrow = in_dtype(on_device(call, device), dtype)
        for kernel in PRIMITIVES[name].kernels:
            if kernel.device == kind and kernel.applies(*narrow.inputs, **narrow.options):
                with case.setting():
                    record(kernel.name, dtype, _check_kernel(kernel, case, PRIMITIVES[name], narrow, dtype))
                compared.add(kernel.name)
    return compared


def _check_kernel(kernel: Kernel, case: Case, primitive: Primitive, call: Call, dtype: str) -> float:
    """Value and gradients against the definition, on the values that the kernel sees, in float64; and its manners."""
    alone = Primitive(primitive.definition)
    alone.kernels = [kernel]
    with definitions_only():
        values, gradients, cotangents = run(primitive, in_dtype(call, "float64"))
    given = [array.astype(dtype_of(dtype)) for array in cotangents]
    found, found_gradients, _ = run(alone, call, given)
    bound = max(BOUNDS[dtype], case.float32) if dtype == "float32" else BOUNDS[dtype]
    forward = assert_close(found, values, bound, f"{kernel.name} in {dtype}: value")
    what = f"{kernel.name} in {dtype}: gradient of input"
    backward = assert_close(found_gradients, gradients, bound, what, 0.1 * norm(*cotangents))
    assert all(g.dtype == x.dtype for g, x in zip(found_gradients, call.inputs, strict=True) if g is not None)
    same_for_any_strides(alone, call, found, found_gradients, given, bound)
    only_what_needs_it(alone, call, found_gradients, given, bound)
    return max(forward, backward)
