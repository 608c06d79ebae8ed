"""DoRA: the update changes directions, a trained magnitude gives each output its length.

Liu et al. 2024, "DoRA: weight-decomposed low-rank adaptation"; PEFT's `use_dora`. With V = W + s B A (out, in), and n
the norms of its rows (the paper's columns: it writes W transposed):

    W' = m / n ⊙ V,   n_i = ‖V_i‖,   m (out,) trained, m = ‖W‖ at first, where B = 0: so W' = W

Backward takes n for a constant, as section 4.3 of the paper proposes: without it the gradient of V loses its component
along V, and memory is needed for the norm's own backward. With c = m / n, g = ∂L/∂y and y = x W'ᵀ + b:

    dB = s (c ⊙ g)ᵀ u,   dA = (s (c ⊙ g) B)ᵀ x,   dx = (c ⊙ g) V,   dm = Σ g ⊙ (x Vᵀ) / n, over tokens

which is LoRA's backward on c ⊙ g: the layer is `ops.lora_linear` (its kernels too) under `ops.with_magnitude`.

ΔW = W' − W has full rank, so there are no factors of it: a weighted sum of DoRA adapters is exact when they are applied
or merged, and cannot be had as one low-rank adapter. Axes: in and out the layer's widths, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from ... import ops
from ...backend import Array, array_module, cast, compute_dtype, matmul
from ...errors import MiniloraError
from ...nn import Linear
from ...ops import CompressedWeight
from ...ops.linalg import times_transposed
from ...tensor import Tensor
from ..layer import LoraLayer

BLOCK = 256  # rows of W at a time, where float64 copies are made of it


class DoraLayer(LoraLayer):
    """W' = m / ‖W + s B A‖ ⊙ (W + s B A), the norm by rows. Dropout is on the input of the whole change, as in PEFT."""

    def __init__(self, module: Linear, *how: Any) -> None:
        super().__init__(module, *how)
        self.base_squares: tuple[Array, Array] | None = None  # a frozen W, and the squared norms of its rows
        self.held: Array | None = None  # norms that are not to follow A and B, inside constants_held
        self.magnitude = Tensor(self.norm(module), requires_grad=True)

    def parameters(self) -> dict[str, Tensor]:
        return super().parameters() | {"lora_magnitude_vector": self.magnitude}

    def factors(self) -> NoReturn:
        raise MiniloraError(
            "a DoRA adapter's ΔW has full rank, expected one of two low-rank factors: apply the adapter, or merge it"
        )

    def forward(self, linear: Linear, x: Tensor, weight: float) -> Tensor:
        if weight != 1:
            return ops.linear(x, linear.weight, linear.bias) + self.update(linear, x, x, weight)
        z = ops.lora_linear(x, linear.weight, None, self.lora_A, self.lora_B, scale=self.scale)  # x Vᵀ
        return ops.with_magnitude(z, self.magnitude, linear.bias, norm=self.norm(linear))

    def update(self, linear: Linear, x: Tensor, dropped: Tensor, weight: float) -> Tensor:
        base = ops.linear(dropped, linear.weight)
        z = base + ops.low_rank(dropped, self.lora_A, self.lora_B, scale=self.scale)
        change = ops.with_magnitude(z, self.magnitude, None, norm=self.norm(linear)) - base
        return change if weight == 1 else change * weight

    def delta(self, base: Array) -> Array:
        lora_A, lora_B = (tensor.data.astype(base.dtype) for tensor in (self.lora_A, self.lora_B))
        direction = base + matmul(lora_B * base.dtype.type(self.scale), lora_A)
        norm = _root(_squares(direction), _squares(base), base.dtype)
        return (self.magnitude.data.astype(base.dtype) / norm)[:, None] * direction - base

    @contextmanager
    def constants_held(self, linear: Linear) -> Iterator[None]:
        self.held = self.norm(linear)
        try:
            yield
        finally:
            self.held = None

    def norm(self, linear: Linear) -> Array:
        """n (out,), in A's dtype, without forming V.

        ‖V_i‖² = ‖W_i‖² + 2 s (W Aᵀ)_i · B_i + s² B_i (A Aᵀ) B_iᵀ: a product of W with r rows, and ‖W_i‖², made once for
        a frozen W. Where the terms cancel (V_i much shorter than W_i) the relative error is about ε ‖W_i‖² / ‖V_i‖², ε
        that of A's dtype; a V_i of which nothing is left gets a norm of √ε ‖W_i‖, so nothing divides by zero.
        """
        if self.held is not None:
            return self.held
        A, B, s = self.lora_A.data, self.lora_B.data, self.scale
        A64, B64 = A.astype(np.float64), B.astype(np.float64)
        cross = (times_transposed(A, linear.weight.data).T * B64).sum(axis=1)
        update = s * s * (matmul(B64, matmul(A64, A64.T)) * B64).sum(axis=1)
        base = self._squares_of(linear)
        return _root(base + 2 * s * cross + update, base, A.dtype)

    def _squares_of(self, linear: Linear) -> Array:
        """‖W_i‖² (out,) in float64; kept for as long as W is the same array and frozen."""
        weight = linear.weight
        if weight.requires_grad or self.base_squares is None or self.base_squares[0] is not weight.data:
            self.base_squares = (weight.data, _squares(weight.data))
        return self.base_squares[1]


def _root(squares: Array, base: Array, dtype: np.dtype) -> Array:
    """√squares in `dtype`, at least √ε times √base, and above 0."""
    xp, limits = array_module(squares), np.finfo(dtype)
    return xp.sqrt(xp.maximum(squares, limits.eps * base + limits.tiny)).astype(dtype)


def _squares(weight: Any) -> Array:
    """The squared norms of the rows of W (out, in), array or CompressedWeight, summed in float64: (out,)."""
    dense = weight.dense() if isinstance(weight, CompressedWeight) else weight
    wide = compute_dtype(dense.dtype)
    blocks = (cast(dense[start : start + BLOCK], wide).astype(np.float64) for start in range(0, len(dense), BLOCK))
    return array_module(dense).concatenate([(block * block).sum(axis=1) for block in blocks])
