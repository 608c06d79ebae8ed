"""How work is run, whatever it computes: in parts, for many arrays at once, and what one pass keeps.

Each is a list of ways, of which the last is taken; the kernels add theirs. Results are the same with any of them, to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from .backend import Array


def _in_order(fn: Callable[[int, int], None], n: int, most: int) -> None:
    for start in range(0, n, most):
        fn(start, min(start + most, n))


cpu_runner = [_in_order]  # the CPU kernels' spreads the parts over the cores


def in_parts(fn: Callable[[int, int], None], n: int, most: int, library: ModuleType = np) -> None:
    """fn(start, stop) for parts of at most `most` that cover 0 … n; a part must not touch what another one writes."""
    (cpu_runner[-1] if library is np else _in_order)(fn, n, most)


many_arrays: list[Any] = []  # modules with an optimiser's work over many arrays in one launch: kernels/cuda/lists.py


def all_at_once(gradients: Sequence[Array], *others: Array) -> Any:
    """The module that works on all of these arrays in one launch, or None where they are taken one after another."""
    if not many_arrays or not gradients:
        return None
    able = many_arrays[-1].fused(*gradients, parts=True) and many_arrays[-1].fused(*others)
    return many_arrays[-1] if able else None


pass_contexts: list[Callable[[Any], AbstractContextManager[Any]]] = [nullcontext]


def one_pass(network: Any) -> AbstractContextManager[Any]:
    """A context for one forward pass of a network, in which none of its trained parameters changes: what is derived
    from them is made once.
    """
    return pass_contexts[-1](network)
