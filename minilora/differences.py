"""Derivatives from differences of function values, each with an estimate of how far off it may be.

A function of named arrays is reduced to a number, f = Σ c·fn() with a fixed random cotangent c. Its derivative along
a step comes from central differences

    D(h) = (f(x + h) − f(x − h)) / 2h = f' + h² f'''/6 + h⁴ f⁽⁵⁾/120 + …

at h, h/2, h/4 …, extrapolated to h = 0 (Richardson 1911) in Ridders' table, whose neighbouring columns bound the
truncation that is left (Ridders 1982, "Accurate computation of F'(x) and F'(x) F''(x)"; Press et al., Numerical
Recipes, section 5.7). Rounding adds noise(f) / h, about eps·|f| / h: the noise floor. It is measured, not assumed,
from fourth differences of f over tiny steps (Moré & Wild 2011, "Estimating computational noise"). Everything stays on
the library that the arrays belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from .backend import Array, array_module
from .tensor import Tensor

EPS = float(np.finfo(np.float64).eps)
FIRST_STEP = 2.0**-7  # of the scale of what is moved
LEVELS = 11  # halvings, down to 2^-17 of the scale: about eps^(1/3), the best step of a plain central difference
PRECISION = 1e-8  # relative uncertainty at which a table is fine enough
NOISE_PROBES = 8


@dataclass(frozen=True)
class Derivative:
    """A numeric derivative, and what is known of its error.

    uncertainty: truncation (from the table) plus rounding. hidden: what outputs that did not move in any bit may hide
    below their last bit. still: nothing moved at all. kink: the one-sided slopes keep apart, by `jump`, however small
    the step.
    """

    value: float
    uncertainty: float
    hidden: float = 0.0
    still: bool = False
    kink: bool = False
    jump: float = 0.0


class Differences:
    """f = Σ c·fn() as a function of `leaves`, which are moved in place and put back, bit for bit.

    fn: returns arrays, the same at every call. leaves: float64 Tensors that fn reads.
    """

    def __init__(self, fn: Callable[[], list[Array]], leaves: Mapping[str, Tensor], rng: np.random.Generator) -> None:
        self.fn, self.leaves, self.rng = fn, leaves, rng
        self.scales = {label: scale(leaf.data) for label, leaf in leaves.items()}
        self.base = fn()
        self.cotangents = [random_like(array, rng) for array in self.base]
        self.noise = self._measure_noise()
        self.total_noise = math.sqrt(inner(self.noise, self.noise))
        parts = [c * y for c, y in zip(self.cotangents, self.base, strict=True)]
        self.relative_noise = self.total_noise / (math.sqrt(inner(parts, parts)) or 1.0)

    def along_entry(self, label: str, index: tuple[int, ...], of_itself: bool = False) -> Derivative:
        """∂f/∂(one entry of a leaf); of_itself: with steps on the scale of the entry, not of its array."""
        array = self.leaves[label].data
        own, step = float(array[index]), float(self.scales[label][index])
        if of_itself:
            step = 0.6 * (abs(own) or step)

        def sides(t: float) -> tuple[list[Array], list[Array], float]:
            above, below = own + t * step, own - t * step
            array[index] = above
            up = self.fn()
            array[index] = below
            return up, self.fn(), above - below  # the width as it was rounded, not 2·t·step

        try:
            return self._extrapolate(sides)
        finally:
            array[index] = own

    def along(self, steps: Mapping[str, Array], reach: float = 1.0) -> Derivative:
        """d/dt f(leaves + t·steps), a direction through several leaves; reach: the largest step, in FIRST_STEPs."""
        with moved(self.leaves, steps) as move:

            def sides(t: float) -> tuple[list[Array], list[Array], float]:
                move(reach * t)
                up = self.fn()
                move(-reach * t)
                return up, self.fn(), 2 * reach * t

            return self._extrapolate(sides)

    def random_direction(self, labels: Sequence[str]) -> dict[str, Array]:
        """A step for each entry of these leaves: its own size (its scale, where it is zero), with a random sign.

        So no entry changes its sign on the way, and none leaves a domain that ends at zero.
        """
        steps = {}
        for label in labels:
            array = self.leaves[label].data
            xp = array_module(array)
            signs = xp.asarray(self.rng.choice([-1.0, 1.0], array.shape))
            steps[label] = signs * xp.where(array == 0, self.scales[label], xp.abs(array))
        return steps

    def _extrapolate(self, sides: Callable[[float], tuple[list[Array], list[Array], float]]) -> Derivative:
        """Ridders' table, until it is precise enough or rounding has overtaken truncation."""
        value, uncertainty, noise, hidden = math.nan, math.inf, 0.0, 0.0
        last: list[float] = []
        jumps: list[float] = []
        width = math.nan
        for level in range(LEVELS):
            with np.errstate(all="ignore"):  # a step may leave the function's domain
                up, down, width = sides(FIRST_STEP * 0.5**level)
            change = inner(self.cotangents, [high - low for high, low in zip(up, down, strict=True)])
            if level == 0:
                if all(bool((high == low).all()) for high, low in zip(up, down, strict=True)):
                    return Derivative(0.0, 0.0, hidden=4 * self.total_noise / width, still=True)
                stirred = [part * (high != low) for part, high, low in zip(self.noise, up, down, strict=True)]
                noise = math.sqrt(inner(stirred, stirred))  # outputs that do not move bring no rounding with them
                hidden = 4 * self.total_noise / width
            if not math.isfinite(change):
                last = []
                continue
            bend = [(high - base) - (base - low) for high, base, low in zip(up, self.base, down, strict=True)]
            jumps.append(abs(inner(self.cotangents, bend)) / width)  # half the difference of the two one-sided slopes
            row = [change / width]
            rounding = 4 * noise / width  # σ√2 / width, at most 5/3 of it after extrapolation, and some room
            overtaken = False
            for column, previous in enumerate(last):
                row.append(row[-1] + (row[-1] - previous) / (4.0 ** (column + 1) - 1.0))
                truncation = max(abs(row[-1] - row[-2]), abs(row[-1] - previous))
                if truncation + rounding < uncertainty:
                    value, uncertainty = row[-1], truncation + rounding
                overtaken |= truncation <= rounding
            last = row
            if overtaken or uncertainty <= PRECISION * abs(value):
                break
        # The slopes of a smooth function approach each other as h (by 1/2 for each halving), those at a kink do not.
        kink = len(jumps) > 1 and jumps[-1] > 0.75 * jumps[-2] and jumps[-1] > 32 * noise / width
        return Derivative(value, uncertainty, hidden, kink=kink, jump=jumps[-1] if jumps else 0.0)

    def _measure_noise(self) -> list[Array]:
        """|c|·σ for every output, σ the standard deviation of its rounding, and at least eps·|y|.

        A fourth difference of values with independent roundings has variance 70σ² (Moré & Wild 2011, equation 2.4).
        Steps of 2^-16 of the scale leave of the function itself only h⁴ f⁗, which is below eps, and are wide enough
        to show where an intermediate result absorbed small changes (1 + 1e-12); random factors keep them off the grid
        of such a rounding.
        """
        variances = [array * 0 for array in self.base]
        for _ in range(NOISE_PROBES):
            steps = {
                label: step * (self.rng.uniform(1.0, 2.0) * 2.0**-16)
                for label, step in self.random_direction(list(self.leaves)).items()
            }
            with moved(self.leaves, steps) as move, np.errstate(all="ignore"):
                fourth = [6 * base for base in self.base]
                for t, weight in ((-2.0, 1.0), (-1.0, -4.0), (1.0, -4.0), (2.0, 1.0)):
                    move(t)
                    fourth = [total + weight * array for total, array in zip(fourth, self.fn(), strict=True)]
            variances = [v + _finite(d**2) / (70 * NOISE_PROBES) for v, d in zip(variances, fourth, strict=True)]
        return [
            abs(c) * array_module(y).maximum(variance**0.5, EPS * abs(y))
            for c, y, variance in zip(self.cotangents, self.base, variances, strict=True)
        ]


# --- arithmetic on lists of arrays ------------------------------------------------------------------------------------


@contextmanager
def moved(leaves: Mapping[str, Tensor], steps: Mapping[str, Array]) -> Iterator[Callable[[float], None]]:
    """Inside, move(t) sets the leaves to their values + t·steps; on leaving they hold their own bits again."""
    kept = {label: leaves[label].data.copy() for label in steps}

    def move(t: float) -> None:
        for label, step in steps.items():
            leaves[label].data[...] = kept[label] + t * step

    try:
        yield move
    finally:
        for label, array in kept.items():
            leaves[label].data[...] = array


def tangent(fn: Callable[[], list[Array]], leaves: Mapping[str, Tensor], steps: Mapping[str, Array]) -> list[Array]:
    """J·steps for the whole output, extrapolated twice: (D(4h) − 20 D(2h) + 64 D(h)) / 45, error O(h⁶)."""
    differences = []
    with moved(leaves, steps) as move:
        for h in (FIRST_STEP / 4, FIRST_STEP / 8, FIRST_STEP / 16):
            move(h)
            up = fn()
            move(-h)
            differences.append([(high - low) / (2 * h) for high, low in zip(up, fn(), strict=True)])
    return [(coarse - 20 * middle + 64 * fine) / 45 for coarse, middle, fine in zip(*differences, strict=True)]


def scale(array: Array) -> Array:
    """The step that matters to each entry: |x|, and at least the median of the non-zero |x| (1 when all are 0)."""
    xp = array_module(array)
    size = xp.abs(array)
    nonzero = size[size > 0]
    return xp.maximum(size, float(xp.median(nonzero)) if nonzero.size else 1.0)


def random_like(array: Array, rng: np.random.Generator) -> Array:
    """Standard normal float64 values in the shape and on the device of `array`."""
    return array_module(array).asarray(rng.standard_normal(array.shape))


def _finite(array: Array) -> Array:
    """Zero where a step left the function's domain."""
    xp = array_module(array)
    return xp.where(xp.isfinite(array), array, 0.0)


def inner(left: Sequence[Array], right: Sequence[Array]) -> float:
    """Σ left · right over all arrays."""
    return math.fsum(float((a * b).sum()) for a, b in zip(left, right, strict=True))


def distance(a: Sequence[Array], b: Sequence[Array]) -> float:
    """‖a − b‖ / ‖b‖ (‖a − b‖ where b is zero); infinite for other shapes."""
    if [array.shape for array in a] != [array.shape for array in b]:
        return math.inf
    difference = [x - y for x, y in zip(a, b, strict=True)]
    return math.sqrt(inner(difference, difference)) / (math.sqrt(inner(b, b)) or 1.0)


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same values, NaN being equal to NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
