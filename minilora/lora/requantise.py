"""Merging into compressed weights, where W' cannot take the place of W as it is: the caller says what becomes of it.

"dequantise" makes it a float32 matrix, which loses nothing; "requantise" compresses it again, and what that loses is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ..backend import Array, array_module
from ..errors import MiniloraError
from ..ops import CompressedWeight
from ..tensor import Tensor

CHOICES = ("dequantise", "requantise")


class Rounding(NamedTuple):
    """What compressing a merged W' again lost. error: ‖Q − W'‖ / ‖W'‖; update: ‖W' − W‖ / ‖W'‖, to compare with
    (Frobenius norms). An error above the update says that little of the adapter is left in this layer.
    """

    error: float
    update: float


def check_choice(quantised: str | None, bases: Mapping[str, Tensor]) -> None:
    """MiniloraError for a choice that is none of CHOICES, and for none where one of the weights is compressed."""
    if quantised not in (None, *CHOICES):
        raise MiniloraError(f"quantised is {quantised!r}, expected {' or '.join(map(repr, CHOICES))}")
    for name, base in bases.items():
        if isinstance(base.data, CompressedWeight) and quantised is None:
            raise MiniloraError(
                f'{name} is quantised ({base.data}), so merging needs a choice: quantised="dequantise" makes the '
                'adapted weights float32, "requantise" rounds them to blocks again and reports the error'
            )


def compressed_again(held: CompressedWeight, merged: Array, base: Array) -> tuple[CompressedWeight, Array, Rounding]:
    """W' in the form that W is held in, the values that it then stands for, and what that lost; arrays (out, in)."""
    compressed = held.recoded(merged)
    values = compressed.dense()
    whole = _norm(merged) or 1.0
    return compressed, values, Rounding(_norm(values - merged) / whole, _norm(merged - base) / whole)


def _norm(matrix: Array) -> float:
    flat = matrix.reshape(-1)
    return math.sqrt(float(array_module(flat).vdot(flat, flat)))
