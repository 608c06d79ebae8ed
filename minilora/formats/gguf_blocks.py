"""Matrices that stay in GGUF's blocks in memory: `BlockWeight`, a frozen weight of 4.5 to 8.5 bits an entry.

A block is 32 consecutive entries of a row: an integer q for each, a float16 scale d for all, in Q4_1 a minimum m too.
    Q8_0   w = d · q          q in −128 … 127
    Q4_0   w = d · (q − 8)    q in 0 … 15, two to a byte: byte j has entry j in its low half and j + 16 in its high half
    Q4_1   w = d · q + m      q in 0 … 15
A product decodes W tile by tile, each used while it is in the cache: W is never there as a whole. The integers are held
with the rows of W along the last axis, so that decoding is a few passes over long contiguous runs.
Source: ggml-quants.c of https://github.com/ggml-org/ggml (dequantize_row_* and quantize_row_*_ref)

Axes: N tokens, in and out the layer's widths, K = in / 32 blocks of a row.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import FLOAT_DTYPES, Array, array_module, cast, matmul, to_device
from ..execution import in_parts
from ..ops import CompressedWeight
from .gguf import GGUFEntry

BLOCK = 32  # entries
TILE = 1 << 18  # entries that are decoded at a time: one MiB in float32, so that a core's cache holds them
TILE_ON_A_GPU = 1 << 24


@dataclass(frozen=True)
class Form:
    """One kind of block. zero: what is taken off every q; has_minimum: whether m follows d in a block's bytes."""

    name: str
    bits: int
    zero: int = 0
    has_minimum: bool = False

    @property
    def header(self) -> int:
        """Bytes of a block before its integers: d, and m."""
        return 4 if self.has_minimum else 2

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.header + BLOCK * self.bits // 8

    def decode(self, quants: Array, scales: Array) -> Array:
        """(K, bytes, n) integers and (K, 1 or 2, n) float16 scales -> (in, n) float32, as `gguf.dequantize`."""
        if self.bits == 8:
            values = quants.astype(np.float32)
        else:
            values = array_module(quants).empty((len(quants), BLOCK, quants.shape[2]), np.float32)
            values[:, : BLOCK // 2] = quants & 15
            values[:, BLOCK // 2 :] = quants >> 4
            if self.zero:
                values -= self.zero
        wide = scales.astype(np.float32)
        values *= wide[:, :1]
        if self.has_minimum:
            values += wide[:, 1:]
        return values.reshape(-1, quants.shape[2])

    def encode(self, values: Array) -> tuple[Array, Array]:
        """(in, n) float32 -> integers and scales as `decode` takes them, bit for bit those of `gguf.quantize`.

        Q8_0: d = max |w| / 127. Q4_0: d = w* / −8 with w* the entry of largest size, so that it has q = 0. Q4_1:
        m = min w and d = (max w − m) / 15. q is the nearest integer (halves away from zero).
        """
        xp = array_module(values)
        blocks = values.reshape(-1, BLOCK, values.shape[1])  # (K, 32, n)
        if self.has_minimum:
            low = blocks.min(axis=1, keepdims=True)
            d = (blocks.max(axis=1, keepdims=True) - low) / np.float32(15)
            scales = xp.concatenate([d, low], axis=1)
            blocks = blocks - low
        elif self.bits == 4:
            largest = xp.abs(blocks).argmax(axis=1)[:, None]
            d = xp.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
            scales = d
        else:
            d = xp.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
            scales = d
        inverse = xp.where(d == 0, np.float32(0), np.float32(1) / xp.where(d == 0, np.float32(1), d))
        q = blocks * inverse
        if self.bits == 8:
            whole = xp.floor(xp.abs(q))
            whole += xp.floor(2 * (xp.abs(q) - whole))
            return (xp.sign(q) * whole).astype(np.int8), scales.astype(np.float16)
        q += np.float32(self.zero + 0.5)
        q = xp.clip(xp.trunc(q), 0, 15).astype(np.uint8)
        return q[:, : BLOCK // 2] | (q[:, BLOCK // 2 :] << 4), scales.astype(np.float16)


FORMS = {
    form.name: form
    for form in (Form("Q8_0", 8), Form("Q4_0", 4, zero=8), Form("Q4_1", 4, has_minimum=True))
}  # fmt: skip


class BlockWeight(CompressedWeight):
    """A frozen (out, in) matrix in GGUF's blocks; it stands for the float32 values that `gguf.dequantize` gives.

    quants (K, bytes, out), scales (K, 1 or 2, out) float16: NumPy or CuPy arrays. A GGUF's Q4_1 costs 5 bits an entry,
    Q4_0 4.5, Q8_0 8.5.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, form: Form, quants: Array, scales: Array) -> None:
        self.form, self.quants, self.scales = form, quants, scales
        self.shape = (quants.shape[2], BLOCK * len(quants))
        self.size, self.nbytes = math.prod(self.shape), quants.nbytes + scales.nbytes
        self.storage = quants

    @classmethod
    def from_rows(cls, form: Form, rows: np.ndarray, device: str = "cpu") -> BlockWeight:
        """A GGUF tensor's bytes, (out, bytes of a row) uint8, held on the device."""
        blocks = rows.reshape(len(rows), -1, form.nbytes)  # (out, K, bytes)
        quants, scales = blocks[:, :, form.header :], blocks[:, :, : form.header]
        held = np.ascontiguousarray(quants.transpose(1, 2, 0))
        wide = np.ascontiguousarray(np.ascontiguousarray(scales).view(np.float16).transpose(1, 2, 0))
        return cls(form, to_device(held.view(np.int8) if form.bits == 8 else held, device), to_device(wide, device))

    def __str__(self) -> str:
        return self.form.name

    @property
    def T(self) -> _Transposed:
        """Wᵀ, for checkpoints that hold a layer's weight as (in, out): there to be turned back."""
        return _Transposed(self)

    def rows(self) -> Array:
        """The bytes as a GGUF file has them, (out, bytes of a row) uint8."""
        xp = array_module(self.quants)
        scales = xp.ascontiguousarray(self.scales.transpose(2, 0, 1)).view(np.uint8)  # (out, K, 2 or 4)
        quants = xp.ascontiguousarray(self.quants.transpose(2, 0, 1)).view(np.uint8)
        return xp.concatenate([scales, quants], axis=2).reshape(self.shape[0], -1)

    def tile(self, blocks: slice, rows: Any) -> Array:
        """Wᵀ at some blocks of some rows (a slice, or an array of their numbers): (32 · blocks, rows) float32."""
        return self.form.decode(self.quants[blocks, :, rows], self.scales[blocks, :, rows])

    def __getitem__(self, rows: Any) -> Array:
        """W's rows at a slice or at an array of integers (...): (..., in) float32."""
        if isinstance(rows, slice):
            return self.tile(slice(None), rows).T
        return self.tile(slice(None), rows.reshape(-1)).T.reshape(*rows.shape, self.shape[1])

    def matmul(self, x: Array) -> Array:
        """x Wᵀ, (N, in) -> (N, out), a tile of whole rows of W at a time."""
        y = array_module(x).empty((len(x), self.shape[0]), x.dtype)

        def some_rows(a: int, b: int) -> None:
            y[:, a:b] = matmul(x, cast(self.tile(slice(None), slice(a, b)), x.dtype))

        self._in_tiles(some_rows, self.shape[0], self.shape[1])
        return y

    def matmul_t(self, g: Array) -> Array:
        """g W, (N, out) -> (N, in): for some columns of W at a time the sum over tiles, in the order of the rows."""
        result = array_module(g).empty((len(g), self.shape[1]), g.dtype)

        def some_blocks(a: int, b: int) -> None:
            columns = result[:, a * BLOCK : b * BLOCK]
            step = max(BLOCK, self._tile_entries() // (BLOCK * (b - a)))
            for start in range(0, self.shape[0], step):
                part = slice(start, start + step)
                term = matmul(g[:, part], cast(self.tile(slice(a, b), part), g.dtype).T)
                if start == 0:
                    columns[...] = term
                else:
                    columns += term

        in_parts(some_blocks, len(self.quants), len(self.quants), array_module(self.quants))
        return result

    def dense(self) -> Array:
        """W itself, (out, in) float32."""
        result = array_module(self.quants).empty(self.shape, np.float32)

        def some_rows(a: int, b: int) -> None:
            result[a:b] = self[a:b]

        self._in_tiles(some_rows, self.shape[0], self.shape[1])
        return result

    def recoded(self, matrix: Array) -> BlockWeight:
        """The nearest matrix in this form to another (out, in) one: each block is rounded on its own."""
        xp = array_module(matrix)
        quants, scales = xp.empty_like(self.quants), xp.empty_like(self.scales)

        def some_rows(a: int, b: int) -> None:
            with np.errstate(over="ignore", invalid="ignore"):  # of a scale that float16 cannot hold: the caller looks
                quants[:, :, a:b], scales[:, :, a:b] = self.form.encode(cast(matrix[a:b], self.dtype).T)

        self._in_tiles(some_rows, self.shape[0], self.shape[1])
        return BlockWeight(self.form, quants, scales)

    def _in_tiles(self, fn: Any, rows: int, width: int) -> None:
        in_parts(fn, rows, max(BLOCK, self._tile_entries() // width), array_module(self.quants))

    def _tile_entries(self) -> int:
        return TILE if array_module(self.quants) is np else TILE_ON_A_GPU


class _Transposed:
    """A BlockWeight under its transpose's shape (in, out), from which `.T` gives it back."""

    def __init__(self, weight: BlockWeight) -> None:
        self.T, self.shape, self.dtype, self.storage = weight, weight.shape[::-1], weight.dtype, weight.storage


def held_in_blocks(entry: GGUFEntry, device: str) -> BlockWeight | _Transposed | None:
    """A GGUF's tensor as it is stored, on the device; None where it is no matrix in blocks of one of FORMS.

    Blocks of other types are decoded to float32 by the caller, which is said once.
    """
    if len(entry.shape) != 2 or entry.dtype in FLOAT_DTYPES:
        return None
    if entry.dtype not in FORMS:
        warnings.warn(
            f"{entry.path} has {entry.dtype} tensors, which are decoded to float32: "
            f"{', '.join(FORMS)} are what can be held as stored",
            stacklevel=3,
        )
        return None
    weight = BlockWeight.from_rows(FORMS[entry.dtype], entry.stored(), device)
    return weight.T if entry.transposed else weight
