"""Looking up rows of a table by token."""

from __future__ import annotations

from typing import Any

from ..backend import Array, add_at, array_module, cast
from ..tensor import primitive


@primitive
def embedding(weight: Any, *, tokens: Array, dtype: Any = None):
    """y = W[tokens], in `dtype` (W's own for None);  dW has dy added up at the rows that were looked up.

    W (V, D), tokens any integer shape (...) -> y (..., D). A frozen W costs nothing in backward.
    """
    xp, shape, before = array_module(weight), weight.shape, weight.dtype

    def vjp(dy):
        dweight = xp.zeros(shape, before)
        add_at(dweight, tokens.reshape(-1), cast(dy, before).reshape(-1, shape[1]))
        return dweight

    return cast(weight[tokens], before if dtype is None else dtype), vjp
