"""Normalisation over the last axis.

Statistics are taken in at least float32, whatever the dtype of x.
"""

from __future__ import annotations

from ..backend import Array, array_module, cast, compute_dtype
from ..tensor import primitive


@primitive
def rms_norm(x: Array, weight: Array, *, eps: float, needs: tuple[bool, bool]):
    """y = n · w with n = x / ρ and ρ = √(mean(x²) + eps)   (Zhang & Sennrich 2019, "Root mean square layer
    normalization").

    x (..., D), w (D,) -> y (..., D). With g = dy · w:
        dx = (g − n · mean(g · n)) / ρ      since ∂ρ/∂x = x / (D ρ)
        dw = Σ dy · n over tokens
    Only x and 1/ρ (one number a token) are kept; n is made again.
    """
    xp, dtype = array_module(x), x.dtype
    wide = cast(x, compute_dtype(dtype))
    inverse = 1 / xp.sqrt(xp.mean(wide * wide, axis=-1, keepdims=True) + eps)  # 1/ρ, (..., 1)
    y = cast(wide * inverse, dtype) * cast(weight, dtype)

    def vjp(dy):
        n = cast(x, inverse.dtype) * inverse
        dy = cast(dy, inverse.dtype)
        dx = dweight = None
        if needs[0]:
            g = dy * cast(weight, inverse.dtype)
            dx = cast((g - n * xp.mean(g * n, axis=-1, keepdims=True)) * inverse, dtype)
        if needs[1]:
            dweight = (dy * n).reshape(-1, n.shape[-1]).sum(axis=0)
        return dx, dweight

    return y, vjp


@primitive
def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, bool, bool]):
    """y = n · w + b with n = (x − μ) / σ and σ = √(var(x) + eps)   (Ba et al. 2016, "Layer normalization").

    x (..., D), w and b (D,) -> y (..., D). With g = dy · w:
        dx = (g − mean(g) − n · mean(g · n)) / σ
        dw = Σ dy · n,  db = Σ dy over tokens
    Kept: x, μ and 1/σ.
    """
    xp, dtype = array_module(x), x.dtype
    wide = cast(x, compute_dtype(dtype))
    mean = xp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    inverse = 1 / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + eps)  # 1/σ, (..., 1)
    y = cast(centred * inverse, dtype) * cast(weight, dtype) + cast(bias, dtype)

    def vjp(dy):
        n = (cast(x, inverse.dtype) - mean) * inverse
        dy = cast(dy, inverse.dtype)
        dx = dweight = dbias = None
        if needs[0]:
            g = dy * cast(weight, inverse.dtype)
            means = xp.mean(g, axis=-1, keepdims=True) + n * xp.mean(g * n, axis=-1, keepdims=True)
            dx = cast((g - means) * inverse, dtype)
        if needs[1]:
            dweight = (dy * n).reshape(-1, n.shape[-1]).sum(axis=0)
        if needs[2]:
            dbias = dy.reshape(-1, n.shape[-1]).sum(axis=0)
        return dx, dweight, dbias

    return y, vjp
