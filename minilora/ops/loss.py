"""Cross-entropy: from logits, and fused with the head so that the (N, V) matrix of logits is never held whole.

Axes: N labelled tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from ..backend import Array, array_module, cast, compute_dtype
from ..backend import matmul as product
from ..tensor import primitive
from .linalg import times, times_transposed

CHUNK_ENTRIES = 1 << 23  # logits held at a time: 32 MiB in float32


def softmax_and_losses(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Each row's probabilities (N, V), and −ln of the label's (N,). Overwrites `logits` with the former."""
    xp = array_module(logits)
    row = xp.arange(len(labels))
    logits -= logits.max(axis=1, keepdims=True)
    at_label = logits[row, labels]
    xp.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    logits /= total
    return logits, xp.log(total[:, 0]) - at_label


@primitive
def cross_entropy(logits: Array, *, labels: Array, weights: Array):
    """L = Σ_n weight_n · (ln Σ_v e^{z_nv} − z_n,label);  dz = dL · weight · (softmax(z) − onehot(label)).

    logits z (N, V), labels (N,) integers, weights (N,) -> a scalar in at least float32. A mean has weights 1/N.
    """
    xp, dtype = array_module(logits), logits.dtype
    wide = compute_dtype(dtype)
    p, losses = softmax_and_losses(logits.astype(wide), labels)

    def vjp(dloss):
        factor = (weights * dloss)[:, None]
        dz = p * factor
        dz[xp.arange(len(labels)), labels] -= factor[:, 0]
        return cast(dz, dtype)

    return (losses * weights).sum().astype(wide), vjp


@primitive
def linear_cross_entropy(x: Array, weight: Any, *, labels: Array, weights: Array, needs: tuple[bool, bool]):
    """L = cross_entropy(x Wᵀ, labels, weights), a chunk of tokens at a time, its gradients made in the same pass.

    x (N, D), W (V, D), labels (N,), weights (N,) -> a scalar. With dz = weight · (softmax(z) − onehot(label)) for each
    chunk:
        dx = dz W,  dW = dzᵀ x
    so that backward only multiplies by dL: logits live for one chunk, and what is kept has the size of x.
    """
    xp, dtype = array_module(x), x.dtype
    wide = compute_dtype(dtype)
    count, vocabulary = x.shape[0], weight.shape[0]
    chunk = max(1, CHUNK_ENTRIES // vocabulary)
    loss = xp.zeros((), wide)
    dx = xp.empty(x.shape, dtype) if needs[0] else None
    dweight = xp.zeros(weight.shape, wide) if needs[1] else None
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        p, losses = softmax_and_losses(cast(times_transposed(x[part], weight), wide), labels[part])
        loss = loss + (losses * weights[part]).sum()
        if not any(needs):
            continue
        p[xp.arange(len(losses)), labels[part]] -= 1
        p *= weights[part, None]
        if dx is not None:
            dx[part] = times(cast(p, dtype), weight)
        if dweight is not None:
            dweight += product(p.T, cast(x[part], wide))

    def vjp(dloss):
        return (None if dx is None else cast(dx * dloss, dtype)), (None if dweight is None else dweight * dloss)

    return loss.astype(wide), vjp
