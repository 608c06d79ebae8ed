"""DoRA's primitive: the magnitude of each output, over a norm that backward takes for a constant.

`lora/variants/dora.py` has the norm and what surrounds it. Axes: N tokens, out the layer's width.
"""

from __future__ import annotations

from ..backend import Array, cast
from ..tensor import primitive
from .linalg import rows


@primitive
def with_magnitude(z: Array, magnitude: Array, bias: Array | None, *, norm: Array, needs: tuple[bool, bool, bool]):
    """y = m / n ⊙ z + b, with n constant (Liu et al. 2024, "DoRA: weight-decomposed low-rank adaptation", equation 5
    and section 4.3).

    z (..., out) = x Vᵀ, of the directions V = W + s B A; m (out,) trained; n (out,) the norms of V's rows; b (out,) or
    None -> y (..., out). With g = ∂L/∂y and c = m / n:
        dz = c ⊙ g                     (..., out)    from here on it is LoRA's backward
        dm = Σ g ⊙ z / n, over tokens  (out,)
        db = Σ g, over tokens          (out,)
    Kept for dm is z. Its one alternative is to make it again, a product with W more where a step has two; from the kept
    y, (y − b) / c has no digits where m is near 0 or b large.
    """
    factor, dtype = magnitude / norm, z.dtype  # activations may be narrower than what is trained
    y = cast(z, factor.dtype) * factor
    if bias is not None:
        y += bias
    z = z if needs[1] else None

    def vjp(dy):
        g = cast(dy, factor.dtype)
        dz = cast(g * factor, dtype) if needs[0] else None
        d_magnitude = rows(g * cast(z, g.dtype)).sum(axis=0) / norm if needs[1] else None
        return dz, d_magnitude, (rows(g).sum(axis=0) if needs[2] else None)

    return cast(y, dtype), vjp
