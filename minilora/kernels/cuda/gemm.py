"""Matrix products through cuBLAS, called by ctypes: y = alpha a b + beta y, any mix of transposed views, no copies.

CuPy's own `matmul` refuses to be captured into a CUDA graph, takes bfloat16 in two axes only, cannot add to its result
and costs twice the host time. Accumulation is in float32 (float64 for float64). `backend.matmul` comes here for every
array of CuPy's.

Axes: m rows of the result, n its columns, k what is summed over.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from functools import cache, lru_cache
from typing import Any

import cupy
import numpy as np

from ...backend import Array, gpu_products
from ...errors import MiniloraError
from .branches import lane

KINDS = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType_t
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77  # cublasComputeType_t
WORKSPACE = 32 << 20  # bytes: what cuBLAS asks for on Hopper
BRANCH_WORKSPACE = 8 << 20  # bytes of a branch's (branches.py): its products are narrow
LIBRARIES = ("libcublas.so.13", "libcublas.so.12", "libcublas.so.11")


@cache
def library() -> Any:
    """The cuBLAS that CuPy has loaded."""
    cupy.cuda.device.get_cublas_handle()  # loads it, where the process has not yet
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise MiniloraError(f"found none of {', '.join(LIBRARIES)}, expected the cuBLAS that CuPy uses: reinstall CuPy")


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS failed with status {status}")


class Handle:
    """A cuBLAS handle of one device, with a workspace of its own so that its calls can be captured into a graph."""

    def __init__(self, workspace: int) -> None:
        self.value = ctypes.c_void_p()
        check(library().cublasCreate_v2(ctypes.byref(self.value)))
        self.size = workspace
        self.workspace = cupy.get_default_memory_pool().malloc(workspace)
        self.stream: int | None = None

    def on_current_stream(self) -> ctypes.c_void_p:
        stream = cupy.cuda.get_current_stream().ptr
        if stream != self.stream:
            check(library().cublasSetStream_v2(self.value, ctypes.c_void_p(stream)))
            # Setting the stream goes back to a workspace of cuBLAS's own, which a capture must not see.
            size = ctypes.c_size_t(self.size)
            check(library().cublasSetWorkspace_v2(self.value, ctypes.c_void_p(self.workspace.ptr), size))
            self.stream = stream
        return self.value


@cache
def handle_of(device: int, branch: int = 0) -> Handle:
    """The handle of a device's main line, or of a branch: two products at a time must not share a workspace."""
    with cupy.cuda.Device(device):
        return Handle(BRANCH_WORKSPACE if branch else WORKSPACE)


def compute_type(dtype: np.dtype) -> int:
    """How products of this dtype are accumulated. CUPY_TF32=1 lets those of float32 use tf32 factors, as in CuPy."""
    if dtype == np.float64:
        return COMPUTE_64F
    fast = dtype == np.float32 and os.environ.get("CUPY_TF32") == "1"
    return COMPUTE_32F_FAST_TF32 if fast else COMPUTE_32F


@lru_cache(maxsize=256)
def constant(value: float, double: bool) -> Any:
    """alpha or beta where cuBLAS reads it: on the host, in the dtype of the accumulation."""
    return ctypes.byref(ctypes.c_double(value) if double else ctypes.c_float(value))


def layout(x: Array) -> tuple[int, int] | None:
    """(transposed, leading dimension) of the last two axes, or None where neither of them is contiguous."""
    rows, columns = x.shape[-2:]
    item = x.dtype.itemsize
    down, along = x.strides[-2] // item, x.strides[-1] // item
    if (along == 1 or columns == 1) and (down >= columns or rows == 1):
        return 0, max(down if rows > 1 else columns, columns, 1)
    if (down == 1 or rows == 1) and (along >= rows or columns == 1):
        return 1, max(along if columns > 1 else rows, rows, 1)
    return None


def laid_out(x: Array) -> tuple[Array, int, int]:
    """x, or a contiguous copy of it where cuBLAS could not read it, with its layout."""
    found = layout(x)
    if found is None:
        x = cupy.ascontiguousarray(x)
        found = layout(x)
        assert found is not None
    return x, *found


def gemm(
    a: Array, b: Array, out: Array | None = None, alpha: float = 1.0, beta: float = 0.0, dtype: Any = None
) -> Array:
    """out = alpha · a b + beta · out for a (m, k), b (k, n) of one float dtype; out (m, n) in `dtype` (a's) if not
    given.
    """
    (m, k), n = a.shape, b.shape[1]
    if out is None:
        out = cupy.empty((m, n), a.dtype if dtype is None else dtype)
    found = layout(out)
    assert found is not None, "the result of a product must have a contiguous axis"
    if found[0]:  # cuBLAS writes the transposed result as it is stored
        gemm(b.T, a.T, out.T, alpha, beta)
        return out
    if not m or not n or not k:
        if beta == 0:
            out[...] = 0
        return out
    a, flip_a, lead_a = laid_out(a)
    b, flip_b, lead_b = laid_out(b)
    double = a.dtype == np.float64
    kind = KINDS[a.dtype.name]
    # cuBLAS counts by columns: what it sees is outᵀ = bᵀ aᵀ, and a row-major matrix is its own transpose there.
    check(
        library().cublasGemmEx(
            handle_of(out.device.id, lane()).on_current_stream(), flip_b, flip_a, n, m, k, constant(alpha, double),
            ctypes.c_void_p(b.data.ptr), kind, lead_b, ctypes.c_void_p(a.data.ptr), kind, lead_a,
            constant(beta, double), ctypes.c_void_p(out.data.ptr), KINDS[out.dtype.name], found[1],
            compute_type(a.dtype), -1,
        )
    )  # fmt: skip
    return out


def collapsed(x: Array, leading: tuple[int, ...]) -> int | None:
    """The one stride, in values, that goes through the leading axes of x, or None where there is no single one."""
    steps = [(size, stride // x.dtype.itemsize) for size, stride in zip(leading, x.strides[:-2], strict=True)]
    steps = [(size, stride) for size, stride in steps if size > 1]
    for (_, outer), (size, inner) in itertools.pairwise(steps):
        if outer != size * inner:
            return None
    return steps[-1][1] if steps else 0


def batched(a: Array, b: Array, out: Array) -> None:
    """out = a b for arrays of the same leading axes (broadcast already), in as few calls as their strides allow."""
    leading = out.shape[:-2]
    if not leading:
        gemm(a, b, out)
        return
    shapes = [layout(x) for x in (a, b, out)]
    steps = [collapsed(x, leading) for x in (a, b, out)]
    if None in shapes or shapes[2][0] or not a.shape[-1] or None in steps:  # type: ignore[index]
        axis = one_by_one(a, b, out)
        for index in range(leading[axis]):
            part = (slice(None),) * axis + (index,)
            batched(a[part], b[part], out[part])
        return
    (flip_a, lead_a), (flip_b, lead_b), (_, lead) = shapes  # type: ignore[misc]
    step_a, step_b, step = (ctypes.c_longlong(value) for value in steps)  # type: ignore[arg-type]
    (m, n), k = out.shape[-2:], a.shape[-1]
    double, kind = a.dtype == np.float64, KINDS[a.dtype.name]
    check(
        library().cublasGemmStridedBatchedEx(
            handle_of(out.device.id, lane()).on_current_stream(), flip_b, flip_a, n, m, k, constant(1.0, double),
            ctypes.c_void_p(b.data.ptr), kind, lead_b, step_b, ctypes.c_void_p(a.data.ptr), kind, lead_a, step_a,
            constant(0.0, double), ctypes.c_void_p(out.data.ptr), KINDS[out.dtype.name], lead, step,
            int(np.prod(leading)), compute_type(a.dtype), -1,
        )
    )  # fmt: skip


def one_by_one(*arrays: Array) -> int:
    """The leading axis to go through one by one: the shortest that leaves the others with one stride, or the first."""
    leading = arrays[0].shape[:-2]
    for axis in sorted(range(len(leading)), key=leading.__getitem__):
        rest = (slice(None),) * axis + (0,)
        shorter = leading[:axis] + leading[axis + 1 :]
        if all(collapsed(x[rest], shorter) is not None for x in arrays):
            return axis
    return 0


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b as `cupy.matmul` has it, for two float arrays of one dtype."""
    if a.dtype != b.dtype or a.dtype.name not in KINDS or min(a.ndim, b.ndim) < 2:
        return cupy.matmul(a, b, out=out)
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"cannot multiply shapes {a.shape} and {b.shape}")
    leading = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if out is None:
        out = cupy.empty((*leading, a.shape[-2], b.shape[-1]), a.dtype)
    if out.size:
        a = cupy.broadcast_to(a, (*leading, *a.shape[-2:]))
        b = cupy.broadcast_to(b, (*leading, *b.shape[-2:]))
        batched(a, b, out)
    return out


gpu_products.append(product)
