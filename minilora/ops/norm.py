"""Normalisation over the last axis, also with the residual addition that comes before it in a decoder block.

Statistics are taken in at least float32, whatever the dtype of x.
"""

from __future__ import annotations

from typing import Any

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


def _with_residual(norm: Any, x: Array, delta: Array | None, parameters: tuple[Array, ...], eps: float, needs: Any):
    """s = x + delta and y = norm(s, parameters): what `add_rms_norm` and `add_layer_norm` share."""
    s = x if delta is None else x + delta
    y, norm_vjp = norm.definition(s, *parameters, eps=eps, needs=(needs[0] or needs[1], *needs[2:]))

    def vjp(ds, dy):
        dx, *dparameters = norm_vjp(dy)
        total = None if dx is None else ds + dx
        return (total if needs[0] else None), (total if needs[1] else None), *dparameters

    return (s, y), vjp


@primitive
def add_rms_norm(x: Array, delta: Array | None, weight: Array, *, eps: float, needs: tuple[bool, bool, bool]):
    """s = x + delta (x for None) and y = rms_norm(s): a step of the residual stream with the norm that reads it.

    x, delta (..., D), w (D,) -> s, y (..., D). With ds and dy the gradients of the two results:
        dx = ddelta = ds + (rms_norm's dx for dy),  dw as in rms_norm
    """
    return _with_residual(rms_norm, x, delta, (weight,), eps, needs)


@primitive
def add_layer_norm(
    x: Array, delta: Array | None, weight: Array, bias: Array, *, eps: float, needs: tuple[bool, bool, bool, bool]
):
    """s = x + delta (x for None) and y = layer_norm(s); shapes and gradients as in `add_rms_norm` and `layer_norm`."""
    return _with_residual(layer_norm, x, delta, (weight, bias), eps, needs)
