"""Several primitives in one call, for kernels that are faster together: no maths of their own.

A norm with the residual addition before it; LoRA layers that read the same x; a LoRA layer with an adapter for each row
of the batch. Each definition calls those of ops/norm.py and ops/lora.py.
"""

from __future__ import annotations

from typing import Any

from ..backend import Array
from ..tensor import primitive
from .linalg import linear
from .lora import lora_linear, low_rank
from .norm import layer_norm, rms_norm


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


def one_after_another(
    each: Any, x: Array, *layers: Any, scales: tuple[float, ...], value: bool = True, needs: tuple[bool, ...]
):
    """`lora_linears` a layer at a time; each: `lora_linear`'s definition, or what stands in for it."""
    parts = []
    for index, scale in enumerate(scales):
        weight, bias, lora_A, lora_B = layers[4 * index : 4 * index + 4]
        mine = (needs[0], *needs[4 * index + 1 : 4 * index + 5])
        if lora_A is None:
            parts.append(linear.definition(x, weight, bias, value=value, needs=(needs[0], False, mine[2])))
        else:
            parts.append(each(x, weight, bias, lora_A, lora_B, scale=scale, value=value, needs=mine))

    def vjp(*dys):
        dx, grads = None, []
        for (_, layer_vjp), dy in zip(parts, dys, strict=True):
            mine, *rest = layer_vjp(dy)
            if needs[0]:
                dx = mine if dx is None else dx + mine
            grads += [*rest, None, None][:4]
        return dx, *grads

    return tuple(y for y, _ in parts), vjp


@primitive
def lora_linears(x: Array, *layers: Any, scales: tuple[float, ...], value: bool = True, needs: tuple[bool, ...]):
    """y_i = x W_iᵀ + b_i + s_i · (x A_iᵀ) B_iᵀ for layers that read the same x (q, k and v; gate and up).

    layers: W, b (or None), A, B of each layer in turn, A and B None for a layer without an adapter; scales: s of each.
    Shapes, gradients and `value` as in `lora_linear`; dx is the sum over the layers.
    """
    return one_after_another(lora_linear.definition, x, *layers, scales=scales, value=value, needs=needs)


@primitive
def lora_rows(
    x: Array,
    weight: Any,
    bias: Array | None,
    *factors: Array,
    scales: tuple[float, ...],
    owners: tuple[int | None, ...],
    needs: tuple[bool, ...],
):
    """`lora_linear` with an adapter for each row of the batch: y_b = x_b Wᵀ + bias + s_k (x_b A_kᵀ) B_kᵀ with
    k = owners[b], without the last term for None.

    x (B, ..., in); factors A_0, B_0, A_1, B_1, …; one scale for each adapter. Gradients as in `lora_linear`, those of
    A_k and B_k from their own rows.
    """
    mine = [[row for row, owner in enumerate(owners) if owner == k] for k in range(len(scales))]
    y, base_vjp = linear.definition(x, weight, bias, needs=(needs[0], False, needs[2]))
    parts = []
    for k, index in enumerate(mine):
        A, B, wanted = factors[2 * k], factors[2 * k + 1], (needs[0], *needs[2 * k + 3 : 2 * k + 5])
        update, update_vjp = low_rank.definition(x[index], A, B, scale=scales[k], needs=wanted)
        y[index] += update
        parts.append(update_vjp)

    def vjp(dy):
        dx, _, dbias = base_vjp(dy)
        grads = []
        for index, update_vjp in zip(mine, parts, strict=True):
            d_own, *d_factors = update_vjp(dy[index])
            grads += d_factors
            if needs[0]:
                dx[index] += d_own
        return dx, None, dbias, *grads

    return y, vjp
