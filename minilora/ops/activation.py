"""The elementwise non-linearities of the MLPs: SiLU, its product with the up projection (SwiGLU), and tanh-GELU."""

from __future__ import annotations

import math

from ..backend import Array, array_module
from ..tensor import primitive


def sigmoid(x: Array) -> Array:
    """σ(x) = 1 / (1 + e⁻ˣ), from e^−|x| so that nothing overflows."""
    xp = array_module(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1, e) / (1 + e)


@primitive
def silu(x: Array):
    """y = x σ(x);  dx = dy · σ (1 + x (1 − σ))   (Elfwing et al. 2018)."""

    def vjp(dy):
        s = sigmoid(x)
        return dy * (s * (1 + x * (1 - s)))

    return x * sigmoid(x), vjp


@primitive
def silu_mul(gate: Array, up: Array):
    """h = silu(gate) · up: the gated half of SwiGLU   (Shazeer 2020, "GLU variants improve transformer").

    gate, up, h (..., F). With σ = σ(gate):
        dgate = dh · up · σ (1 + gate (1 − σ))
        dup   = dh · gate σ
    σ is made again in backward: only gate and up are kept.
    """
    h = gate * sigmoid(gate) * up

    def vjp(dh):
        s = sigmoid(gate)
        return dh * up * (s * (1 + gate * (1 - s))), dh * (gate * s)

    return h, vjp


@primitive
def gelu_tanh(x: Array):
    """y = ½ x (1 + t), t = tanh(c (x + 0.044715 x³)), c = √(2/π)   (Hendrycks & Gimpel 2016; GPT-2's "gelu_new").

    dx = dy · (½ (1 + t) + ½ x (1 − t²) c (1 + 3 · 0.044715 x²)).
    """
    xp = array_module(x)
    c = math.sqrt(2 / math.pi)

    def inner_tanh() -> Array:
        return xp.tanh(c * (x + 0.044715 * x * x * x))

    def vjp(dy):
        t = inner_tanh()
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (c * (1 + 3 * 0.044715 * x * x)))

    return 0.5 * x * (1 + inner_tanh()), vjp
