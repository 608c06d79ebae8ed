"""Causal attention in bfloat16 without a (T, T) matrix: three launches forward and backward together, and one more with
segments.

What it computes: ops/attention.py. The kernels and their roofline: attention_forward.cu and attention_backward.cu, and
their tiling attention.cuh. Head widths of 64 and 128, queries and keys of one length; every other case (a KV cache, a
window, float32) runs the definition.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from ... import ops
from ...backend import Array
from .source import function, pointer, ready

WARPS = 4  # of a block
SPAN = 32  # tokens that share a range of segment numbers


class Tiling(NamedTuple):
    """How a kernel cuts up its work: 16 m rows a warp, `tile` streamed rows at a time, `blocks` on a multiprocessor."""

    m: int
    tile: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a block: queries, or keys in the dk-dv kernel."""
        return 16 * self.m * WARPS


TILINGS = {
    64: {"FORWARD": Tiling(2, 64, 3), "DQ": Tiling(2, 32, 3), "DKDV": Tiling(2, 32, 2)},
    128: {"FORWARD": Tiling(2, 64, 2), "DQ": Tiling(2, 32, 2), "DKDV": Tiling(1, 64, 2)},
}
STREAMED = {"FORWARD": 4, "DQ": 4, "DKDV": 4}  # two arrays, two buffers
OWN = {"FORWARD": 1, "DQ": 2, "DKDV": 2}  # arrays whose rows stay


@cache
def kernel(name: str, width: int, device: int) -> Any:
    """A kernel for heads of `width`, with its shared memory allowed on that device."""
    file = "attention_backward" if name in ("attention_dq", "attention_dkdv") else "attention_forward"
    macros = {
        f"{kind}_{field.upper()}": value
        for kind, tiling in TILINGS[width].items()
        for field, value in tiling._asdict().items()
    }
    compiled = function(file, name, "bfloat16", HEAD=width, **macros)
    if name != "segment_ranges":
        compiled.max_dynamic_shared_size_bytes = shared_bytes(name, width)
    return compiled


def shared_bytes(name: str, width: int) -> int:
    """Shared memory of a block: its own rows and the streamed tiles, and for dk and dv two tiles of lse and delta."""
    kind = name.removeprefix("attention_").upper()
    tiling = TILINGS[width][kind]
    numbers = 4 * 4 * tiling.tile if kind == "DKDV" else 0
    return 2 * width * (OWN[kind] * tiling.rows + STREAMED[kind] * tiling.tile) + numbers


def launch(name: str, columns: int, q: Array, *arguments: Any) -> None:
    """Run a kernel with `columns` times as many blocks as its rows cut the length into."""
    tokens, width = q.shape[1], q.shape[3]
    rows = TILINGS[width][name.removeprefix("attention_").upper()].rows
    run = kernel(name, width, q.device.id)
    run((columns, -(-tokens // rows)), (32 * WARPS,), arguments, shared_mem=shared_bytes(name, width))


def with_strides(*arrays: Array) -> list[Any]:
    """Each array and its strides of batch, token and head in elements."""
    result: list[Any] = []
    for array in arrays:
        result += [array, *(np.int64(stride // array.itemsize) for stride in array.strides[:3])]
    return result


def numbers_and_ranges(segments: Array | None, q: Array) -> tuple[Any, Any]:
    """The segments as int32, and the least and greatest of each span of tokens; null pointers without segments."""
    if segments is None:
        return pointer(None), pointer(None)
    given = cupy.ascontiguousarray(segments)
    batch, tokens = given.shape
    spans = -(-tokens // SPAN)
    numbers, ranges = cupy.empty((batch, tokens), np.int32), cupy.empty((batch, spans, 2), np.int32)
    run = kernel("segment_ranges", q.shape[3], q.device.id)
    run((-(-spans // 8), batch), (256,), (given, np.int32(given.itemsize), numbers, ranges, np.int32(tokens)))
    return numbers, ranges


def readable(x: Array) -> bool:
    """Whether rows of x can be copied 16 bytes at a time."""
    return (
        isinstance(x, cupy.ndarray)
        and x.ndim == 4
        and x.size > 0
        and x.dtype.name == "bfloat16"
        and x.strides[3] == x.itemsize
        and x.data.ptr % 16 == 0
        and all(stride % 16 == 0 for stride in x.strides[:3])
    )


def applies(
    q: Array, k: Array, v: Array, *, scale: float, segments: Array | None = None, window: int | None = None
) -> bool:
    """Segment numbers are taken to fit in 32 bits: they number the segments of a row."""
    return (
        all(readable(x) for x in (q, k, v))
        and q.shape[3] in TILINGS
        and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])
        and q.shape[2] % k.shape[2] == 0
        and scale > 0
        and (window is None or window >= q.shape[1])
        and (
            segments is None
            or (
                isinstance(segments, cupy.ndarray)
                and segments.shape == q.shape[:2]
                and segments.dtype.name in ("int32", "int64")
            )
        )
        and int(q.device.compute_capability) >= 80
    )


@ops.attention.kernel("cuda", applies)
def attention(q: Array, k: Array, v: Array, *, scale: float, segments: Array | None = None, window: int | None = None):
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    o = cupy.empty(q.shape, q.dtype)
    lse = cupy.empty((batch, heads, tokens), np.float32)
    inputs = with_strides(q, k, v)
    sizes = (
        *numbers_and_ranges(segments, q), np.int32(tokens), np.int32(heads), np.int32(kv_heads), np.float32(scale)
    )  # fmt: skip
    launch("attention_forward", batch * heads, q, *inputs, o, lse, *sizes)

    def vjp(do):
        do = ready(do)
        delta = cupy.empty(lse.shape, lse.dtype)
        dq, dk, dv = room_for_gradients(q, k, v)
        dq_token, dkv_token = (np.int64(gradient.strides[1] // gradient.itemsize) for gradient in (dq, dk))
        launch("attention_dq", batch * heads, q, *inputs, o, do, lse, delta, dq, dq_token, *sizes)
        launch("attention_dkdv", batch * kv_heads, q, *inputs, do, lse, delta, dk, dv, dkv_token, *sizes)
        return dq, dk, dv

    return o, vjp


def room_for_gradients(q: Array, k: Array, v: Array) -> list[Array]:
    """Arrays for dq, dk and dv: columns of one matrix where q, k and v are that, so that what made the three from one
    array (GPT-2's `unstack`) has its gradient as it is.
    """
    parts = (q, k, v)
    if not in_columns(*parts):
        return [cupy.empty(x.shape, x.dtype) for x in parts]
    data = cupy.empty(sum(x.size for x in parts), q.dtype).data
    gradients = []
    for x in parts:
        gradients.append(cupy.ndarray(x.shape, x.dtype, data, strides=x.strides))
        data = data + x.shape[2] * x.shape[3] * x.itemsize
    return gradients


def in_columns(*parts: Array) -> bool:
    """Whether the parts (B, T, H_i, d) are the columns of one contiguous (B, T, Σ H_i d) array, one after the other."""
    first, item = parts[0], parts[0].itemsize
    _, tokens, _, width = first.shape
    row = sum(x.shape[2] for x in parts) * width * item
    address = first.data.ptr
    for x in parts:
        if x.data.ptr != address or x.strides != (tokens * row, row, width * item, item):
            return False
        address += x.shape[2] * width * item
    return True
