"""One adapter for each row of the batch: one pass over W for all of them, then each adapter's rows together.

`AdapterSlot` calls this where the selection has rows. Axes: B batch, T time, out the layer's width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .. import ops
from ..backend import Array, resident
from ..nn import Linear
from ..tensor import Tensor

if TYPE_CHECKING:
    from .layer import AdapterSlot, Selection


@lru_cache(maxsize=4096)
def places(rows: tuple[str | None, ...], name: str | None, device: str) -> Array:
    """Which rows of the batch adapter `name` has, on the device."""
    return resident(np.array([row for row, owner in enumerate(rows) if owner == name]), device)


def by_row(slot: AdapterSlot, linear: Linear, x: Tensor, selection: Selection) -> Tensor:
    """The layer's output for x (B, T, in), each row under its own adapter."""
    assert selection.rows is not None
    if len(selection.rows) != x.shape[0]:
        raise ValueError(f"set_adapter(rows=...) names {len(selection.rows)} rows, and the batch has {x.shape[0]}")
    together = _in_one_call(slot, linear, x, selection.rows)
    if together is not None:
        return together
    y = linear.base(x)  # (B, T, out)
    for name in dict.fromkeys(selection.rows):
        if name in slot.layers:
            index = places(selection.rows, name, x.device)
            layer, own = slot.layers[name], ops.select_rows(x, index=index)
            update = layer.update(linear, own, slot.dropped(layer, own, selection.of(name)), 1.0)
            y = ops.add_rows(y, update, index=index)
    return y


def _in_one_call(slot: AdapterSlot, linear: Linear, x: Tensor, rows: tuple[str | None, ...]) -> Tensor | None:
    """The same by one primitive, where there is a kernel for it."""
    if not ops.lora_rows.kernels or not isinstance(linear, Linear) or linear.weight.requires_grad:
        return None
    parts = slot.low_rank_parts()
    if parts is None:
        return None
    names = [name for name in dict.fromkeys(rows) if name in slot.layers]
    inputs = [x, linear.weight, linear.bias, *(factor for part in parts for factor in part[:2])]
    options = {
        "scales": tuple(slot.layers[name].scale for name in names),
        "owners": tuple(names.index(name) if name in names else None for name in rows),
    }
    return ops.lora_rows(*inputs, **options) if ops.lora_rows.has_kernel_for(*inputs, **options) else None
