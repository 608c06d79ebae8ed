"""Rotary position embedding: pairs of a head's values turned by an angle that grows with the position."""

from __future__ import annotations

from ..backend import Array, array_module, cast
from ..tensor import primitive


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn each pair (x_i, x_{i+d/2}) by the angle of the given cosine and sine; x (B, T, H, d), cos (·, T, 1, d/2)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = array_module(x).concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return cast(turned, x.dtype)  # the tables are float32 for bfloat16 activations


@primitive
def rotary(x: Array, *, cos: Array, sin: Array):
    """y = x with each pair turned by its position's angle;  dx = dy turned back, since a rotation's transpose is its
    inverse.

    x, y (B, T, H, d); cos, sin (B or 1, T, 1, d/2) in x's dtype or a wider one. Pairs are (i, i + d/2), as Hugging Face
    lays them out (Su et al. 2021, "RoFormer", equation 34).
    """

    def vjp(dy):
        return rotate(dy, cos, -sin)

    return rotate(x, cos, sin), vjp
