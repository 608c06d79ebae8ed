"""Keeping little from forward to backward: a layer's input that a cheap kernel can make again is made again.

A norm's or an activation's output is needed twice, in forward and in the backward pass of the layer that reads it (dA =
vᵀ x). `remember` notes how it is made; `keep` is what that layer's closure holds: the recipe, or the array itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from ...backend import Array

KEEP_BELOW = 1 << 24  # bytes: making an array again that is smaller costs more time than keeping it costs memory

_recipes: dict[int, tuple[weakref.ref, Callable[[], Array]]] = {}


def remember(array: Array, recipe: Callable[[], Array]) -> None:
    """Say how `array` is made, until it is gone."""
    key = id(array)
    _recipes[key] = weakref.ref(array, lambda _: _recipes.pop(key, None)), recipe


def keep(array: Array) -> Callable[[], Array]:
    """What a closure holds to have `array` later."""
    known = _recipes.get(id(array))
    if known is not None and known[0]() is array and array.nbytes >= KEEP_BELOW:
        return known[1]
    return lambda: array
