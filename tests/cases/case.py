"""What a case is: how to draw calls of a primitive, and the same function composed of other primitives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


@dataclass
class Call:
    """One call of a primitive: its inputs by position, and its options. Floating arrays are float64 NumPy arrays.

    An input that is a floating array is differentiable; the rest (None, numbers, Booleans) is passed on as it is.
    """

    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def differentiable(self) -> tuple[bool, ...]:
        return tuple(isinstance(value, np.ndarray) and value.dtype.kind == "f" for value in self.inputs)


@dataclass(frozen=True)
class Case:
    """How a primitive is tested.

    calls: a strategy for `Call`s. composition: takes the primitive's arguments and computes the same from other
    primitives.
    float32: the relative error, in norm, that float32 may have against float64, forward and backward.
    frozen: positions that never need a gradient (the base's W and b in lora_linear).
    setting: a context that the primitive is called in.
    """

    calls: st.SearchStrategy[Call]
    composition: Callable[..., Any]
    float32: float = 1e-5
    frozen: tuple[int, ...] = ()
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext


def examples(share: float) -> settings:
    """This share of the profile's examples, for tests that take long over each."""
    return settings(max_examples=max(2, int(settings.default.max_examples * share)))


def for_each(calls: st.SearchStrategy[Call], count: int, body: Callable[[Call], None]) -> None:
    """body(call) for `count` calls, the same ones every time."""
    quiet = settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def run(call: Call) -> None:
        body(call)

    quiet(given(call=calls)(run))()


# --- values -----------------------------------------------------------------------------------------------------------

sizes = st.sampled_from((2, 3, 1, 5, 8))
seeds = st.integers(0, 2**32 - 1)
generators = st.builds(np.random.default_rng, seeds)


@st.composite
def shapes(draw: st.DrawFn, least: int = 0, most: int = 3, empty: bool = True) -> tuple[int, ...]:
    """Shapes with `least` to `most` axes, some of length 1, and now and then (`empty`) one of length 0."""
    shape = [draw(sizes) for _ in range(draw(st.integers(least, most)))]
    if empty and shape and draw(st.integers(0, 9)) == 9:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    return tuple(shape)


@st.composite
def broadcasting(draw: st.DrawFn, count: int = 2) -> tuple[tuple[int, ...], ...]:
    """`count` shapes that broadcast together: axes left out in front, axes of length 1."""
    full = draw(shapes())
    result = []
    for _ in range(count):
        start = draw(st.integers(0, len(full)))
        ones = draw(st.sets(st.integers(0, 2)))
        result.append(tuple(1 if axis in ones else size for axis, size in enumerate(full))[start:])
    return tuple(result)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape))


def positive(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values in 0.4 … 2.5, even in the logarithm."""
    return np.asarray(np.exp(rng.uniform(-0.9, 0.9, shape)))


def nonzero(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values of either sign, no nearer to zero than 0.4."""
    return np.asarray(positive(rng, *shape) * rng.choice([-1.0, 1.0], shape))
