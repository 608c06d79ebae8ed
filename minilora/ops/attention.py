"""Causal self-attention with grouped queries, segments and a sliding window: the definition, which forms all scores.

Axes: B batch, T queries, S keys (S ≥ T: earlier ones come from a KV cache), H query heads, K key-value heads, G = H / K
queries to each, d head width.
"""

from __future__ import annotations

from ..backend import Array, array_module, cast, compute_dtype
from ..backend import matmul as product
from ..tensor import primitive


def visible(queries: int, keys: int, segments: Array | None, window: int | None, xp) -> Array:
    """Which keys each query sees: itself and what came before, in its own segment, at most window − 1 back.

    Returns a Boolean (1 or B, 1, 1, T, S). The queries are the last T of the S positions.
    """
    position = xp.arange(keys)
    distance = position[keys - queries :, None] - position[None, :]  # (T, S): how far back the key lies
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    seen = seen[None]
    if segments is not None:
        seen = seen & (segments[:, keys - queries :, None] == segments[:, None, :])
    return seen[:, None, None]


@primitive
def attention(q: Array, k: Array, v: Array, *, scale: float, segments: Array | None = None, window: int | None = None):
    """o = softmax(scale · q kᵀ, over visible keys) v, per head   (Vaswani et al. 2017; grouped queries: Ainslie et al.
    2023).

    q (B, T, H, d), k and v (B, S, K, d) -> o (B, T, H, d); segments (B, S) integers or None.
    With P the probabilities and row sums over keys:
        dv = Pᵀ do
        dP = do vᵀ
        dS = P · (dP − Σ_s P dP),  and Σ_s P dP = Σ_d do · o   (Dao et al. 2022, "FlashAttention", appendix B)
        dq = scale · dS k,  dk = scale · dSᵀ q
    dk and dv add up over the G queries that share a key-value head. Kept: q, k, v, o and the row's log-sum-exp; P is
    made again.
    """
    xp, dtype = array_module(q), q.dtype
    wide = compute_dtype(dtype)
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    mask = visible(queries, keys, segments, window, xp)

    def grouped(x: Array) -> Array:  # (B, T, H, d) -> (B, K, G, T, d)
        return cast(x, wide).reshape(batch, queries, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)

    def shared(x: Array) -> Array:  # (B, S, K, d) -> (B, K, 1, S, d)
        return cast(x, wide).transpose(0, 2, 1, 3)[:, :, None]

    def ungrouped(x: Array) -> Array:  # (B, K, G, T, d) -> (B, T, H, d)
        return cast(x.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, width), dtype)

    def scores() -> Array:  # (B, K, G, T, S)
        return xp.where(mask, scale * product(grouped(q), shared(k).swapaxes(-1, -2)), -xp.inf)

    s = scores()
    top = s.max(axis=-1, keepdims=True)
    logsumexp = top + xp.log(xp.exp(s - top).sum(axis=-1, keepdims=True))  # (B, K, G, T, 1)
    o = ungrouped(product(xp.exp(s - logsumexp), shared(v)))
    del s, top

    def vjp(do):
        p = xp.exp(scores() - logsumexp)
        do_ = grouped(do)
        dv = product(p.swapaxes(-1, -2), do_).sum(axis=2)  # (B, K, S, d)
        ds = p * (product(do_, shared(v).swapaxes(-1, -2)) - (do_ * grouped(o)).sum(axis=-1, keepdims=True))
        dq = scale * product(ds, shared(k))
        dk = scale * product(ds.swapaxes(-1, -2), grouped(q)).sum(axis=2)
        return ungrouped(dq), cast(dk.transpose(0, 2, 1, 3), dtype), cast(dv.transpose(0, 2, 1, 3), dtype)

    return o, vjp
