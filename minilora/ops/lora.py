"""The LoRA primitive: a frozen linear layer with a trained low-rank update, and its gradients derived by hand.

Axes: N tokens, in and out the layer's widths, r the rank.
"""

from __future__ import annotations

from typing import Any

from ..backend import Array, array_module, cast
from ..backend import matmul as product
from ..tensor import primitive
from .linalg import rows, times, times_transposed, unread


def scaled(lora_B: Array, scale: float, dtype: Any) -> Array:
    """s · B in the activations' dtype: an adapter is float32 beside bfloat16 activations, and is rounded once."""
    return cast(lora_B * lora_B.dtype.type(scale), dtype)


@primitive
def lora_linear(
    x: Array,
    weight: Any,
    bias: Array | None,
    lora_A: Array,
    lora_B: Array,
    *,
    scale: float,
    value: bool = True,
    needs: tuple[bool, ...],
):
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ   (Hu et al. 2021, "LoRA: low-rank adaptation of large language models", equation
    3).

    x (..., in), W (out, in) frozen, b (out,) or None, A (r, in), B (out, r), s = alpha / r -> y (..., out).
    With u = x Aᵀ (N, r) kept from forward and g = ∂L/∂y (N, out):
        v  = s · g B          (N, r)
        dA = vᵀ x             (r, in)
        dB = s · gᵀ u         (out, r)
        dx = g W + v A        (N, in)    only if something below is trained
    ∂L/∂W = gᵀ x is never formed, not even as a temporary: every product here has r in its shape, or W as a factor.
    value: False where only the gradients are asked for; y is zero then.
    """
    shape_x = x.shape
    tokens = rows(x)  # (N, in)
    lora_A, scaled_B = cast(lora_A, x.dtype), scaled(lora_B, scale, x.dtype)
    u = product(tokens, lora_A.T)  # (N, r)
    shape_y = (*shape_x[:-1], weight.shape[0])
    if value:
        y = times_transposed(tokens, weight)  # (N, out)
        y += product(u, scaled_B.T)
        if bias is not None:
            y += bias
        y = y.reshape(shape_y)
    else:
        y = unread(shape_y, x)
    tokens = tokens if needs[3] else None
    u = u if needs[4] else None

    def vjp(dy):
        g = rows(dy)
        v = product(g, scaled_B) if needs[0] or needs[3] else None
        dx = (times(g, weight) + product(v, lora_A)).reshape(shape_x) if needs[0] else None
        d_lora_A = product(v.T, tokens) if needs[3] else None
        d_lora_B = product(g.T, u) * scale if needs[4] else None
        return dx, None, (g.sum(axis=0) if needs[2] else None), d_lora_A, d_lora_B

    return y, vjp


@primitive
def low_rank(x: Array, lora_A: Array, lora_B: Array, *, scale: float, needs: tuple[bool, bool, bool]):
    """y = s · (x Aᵀ) Bᵀ: the update alone, for layers where it reads another input than W does (dropout) or is one of
    several.

    Shapes and gradients as in `lora_linear`, without W's terms.
    """
    shape_x = x.shape
    tokens = rows(x)
    lora_A, scaled_B = cast(lora_A, x.dtype), scaled(lora_B, scale, x.dtype)
    u = product(tokens, lora_A.T)
    y = product(u, scaled_B.T)
    tokens = tokens if needs[1] else None
    u = u if needs[2] else None

    def vjp(dy):
        g = rows(dy)
        v = product(g, scaled_B) if needs[0] or needs[1] else None
        dx = product(v, lora_A).reshape(shape_x) if needs[0] else None
        return dx, (product(v.T, tokens) if needs[1] else None), (product(g.T, u) * scale if needs[2] else None)

    return y.reshape(*shape_x[:-1], lora_B.shape[0]), vjp


@primitive
def dropout(x: Array, *, probability: float, seed: int | tuple[int, ...]):
    """y = x · m / (1 − p), m zero with probability p;  dx = dy · m / (1 − p)   (Srivastava et al. 2014).

    The mask is a function of the seed alone: backward, and a checkpointed forward, draw the same one again and none is
    kept.
    """
    xp, shape, dtype = array_module(x), x.shape, x.dtype

    def mask() -> Array:
        kept = xp.random.default_rng(seed).random(shape, dtype="float32") >= probability
        return kept.astype(dtype) / dtype.type(1 - probability)

    def vjp(dy):
        return dy * mask()

    return x * mask(), vjp
