"""Is one derivative right? The analytic value a beside the numeric value n with its uncertainty u, and a verdict.

a comes from one backward pass, n and u from `differences`. With m = max(|a|, |n|), a comparison is

    wrong           |a − n| > rtol·m + 8u
    inconclusive    8u > m / 4: the gradient lies below the noise floor. Counted, never as passed
    checked         otherwise: a wrong sign or a factor of two (|a − n| ≥ m / 2) would have been seen, at any magnitude

Entries below the floor are compared once more together, along the direction of their signs, where they add up. An
entry with a = 0 exactly that moves no bit of the output is `zero` (masked out, say); one at a kink of the function is
inconclusive.

rtol = 1e-7: right gradients of smooth functions agree with extrapolated differences to 1e-9 or better
(docs/gradients.md), and the smallest mistakes of interest (a forgotten ε, a constant with a wrong digit) are 1e-6.
The factor 8 is room for u, which is itself an estimate; that no right gradient fails and no wrong one passes is what
tests/test_gradcheck.py holds.

A `Finding` is one comparison, a `Report` counts many, and a `Comparison` makes them. Which entries and directions are
compared, and of what, is gradcheck.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from .backend import Array, array_module, to_numpy
from .differences import PRECISION, Derivative, Differences, distance, inner, same_bits
from .errors import MiniloraError
from .tensor import Tensor, backward, no_grad

RTOL = 1e-7
SAFETY = 8.0  # uncertainties that a right gradient may be off by


class GradientError(AssertionError):
    """An analytic gradient is wrong. An AssertionError: the mistake is in the code under test, not in its input.

    finding: the worst comparison, or None where no single one is to blame. report: all of it.
    """

    def __init__(self, message: str, finding: Finding | None, report: Report) -> None:
        super().__init__(message)
        self.finding, self.report = finding, report


@dataclass(frozen=True)
class Finding:
    """One comparison: of the entry `index` of the input called `input`, or along a direction when index is None."""

    input: str
    index: tuple[int, ...] | None
    analytic: float
    numeric: float
    uncertainty: float
    verdict: str  # "checked", "zero", "inconclusive" or "wrong"

    @property
    def error(self) -> float:
        """|a − n| / max(|a|, |n|): 0.5 for a factor of two, 2 for a wrong sign."""
        magnitude = max(abs(self.analytic), abs(self.numeric))
        return abs(self.analytic - self.numeric) / magnitude if magnitude else 0.0

    def __str__(self) -> str:
        place = "along a direction" if self.index is None else f"entry {self.index}"
        return (
            f"input {self.input}, {place}: analytic {self.analytic:.10g}, numeric {self.numeric:.10g} "
            f"± {self.uncertainty:.1g} (relative error {self.error:.2g})"
        )


@dataclass
class Report:
    """What a check saw: how many entries were checked, zero, inconclusive, how many directions, and what was wrong.

    error: the largest relative error in norm, ‖a − n‖ / max(‖a‖, ‖n‖), over the checked entries of an input, and over
    the directions (Higham 2002, "Accuracy and stability of numerical algorithms", section 6.2), where n is known to
    1e-8.
    noise: the rounding noise of the function, relative to its values: near 1e-16, more where terms cancel; 1e-8 says
    that something inside computes in float32.
    """

    name: str
    checked: int = 0
    zero: int = 0
    inconclusive: int = 0
    directions_checked: int = 0
    directions_inconclusive: int = 0
    error: float = 0.0
    noise: float = 0.0
    wrong: list[Finding] = field(default_factory=list)

    @property
    def conclusive(self) -> bool:
        """Whether something was decided, or no entry was there to decide about."""
        return bool(self.checked or self.directions_checked or self.wrong) or self.inconclusive + self.zero == 0

    def add(self, findings: Sequence[Finding]) -> None:
        """Take in the comparisons of one input's entries, or of directions."""

        def count(entries: bool, verdict: str) -> int:
            return sum((finding.index is not None) == entries and finding.verdict == verdict for finding in findings)

        self.checked += count(True, "checked")
        self.zero += count(True, "zero")
        self.inconclusive += count(True, "inconclusive")
        self.directions_checked += count(False, "checked")
        self.directions_inconclusive += count(False, "inconclusive")
        self.wrong += [finding for finding in findings if finding.verdict == "wrong"]
        decided = [f for f in findings if f.verdict == "checked" and f.uncertainty <= PRECISION * abs(f.numeric)]
        if decided:
            size = max(math.hypot(*(f.analytic for f in decided)), math.hypot(*(f.numeric for f in decided)))
            self.error = max(self.error, math.hypot(*(f.analytic - f.numeric for f in decided)) / size)

    def raise_if_wrong(self) -> None:
        """GradientError that names the worst comparison, or says that none could be decided."""
        if self.wrong:
            worst = max(self.wrong, key=lambda finding: (finding.index is not None, finding.error))
            decided = self.checked + self.directions_checked + len(self.wrong)
            message = f"the gradient of {self.name} is wrong: {worst}; {len(self.wrong)} of {decided} comparisons fail"
            raise GradientError(message, worst, self)
        if not self.conclusive:
            message = (
                f"the gradient of {self.name} could not be checked: {self.inconclusive} entries are undecided (below "
                f"the noise floor, or at kinks) and {self.zero} move nothing; choose inputs that matter to the value"
            )
            raise GradientError(message, None, self)


class Comparison:
    """A function of `leaves`, its analytic gradients, and its differences."""

    def __init__(self, name: str, fn: Callable[[], Any], leaves: dict[str, Tensor], rtol: float, seed: int) -> None:
        require_leaves(name, leaves)
        self.name, self.leaves, self.rtol = name, leaves, rtol
        self.rng = np.random.default_rng(seed)
        before = {label: leaf.data.copy() for label, leaf in leaves.items()}
        value = values_of(fn)
        changed = [label for label, leaf in leaves.items() if not same_bits(leaf.data, before[label])]
        if changed:
            self._refuse(f"{name} changes its input {changed[0]} in place")
        self.numeric = Differences(lambda: values_of(fn), leaves, self.rng)
        if distance(value, self.numeric.base) > 1e-12:
            raise MiniloraError(
                f"gradcheck of {name}: two calls with the same input give different values, expected the same; fix "
                "the seed of its random numbers"
            )
        self.gradients = self._analytic(fn)
        changed = [label for label, leaf in leaves.items() if not same_bits(leaf.data, before[label])]
        if changed:
            self._refuse(f"the vjp of {name} changes its input {changed[0]} in place")

    def _refuse(self, message: str) -> NoReturn:
        raise GradientError(message, None, Report(self.name))

    def _analytic(self, fn: Callable[[], Any]) -> dict[str, Array]:
        """∂f/∂leaf from one backward pass, whose result has f's dtype and which leaves alone what it is given."""
        outputs = tensors_of(fn())
        narrow = [str(output.dtype) for output in outputs if output.dtype != np.float64]
        if narrow:
            self._refuse(f"{self.name} returns {', '.join(narrow)} for float64 inputs, expected float64")
        if distance([output.data for output in outputs], self.numeric.base) > 1e-9:
            self._refuse(f"{self.name} returns other values while backward is recorded than inside no_grad()")
        given = [array.copy() for array in self.numeric.cotangents]
        gradients = gradients_of(outputs, given, self.leaves)
        if not all(same_bits(array, own) for array, own in zip(given, self.numeric.cotangents, strict=True)):
            self._refuse(f"the vjp of {self.name} writes into the gradient that it is given")
        return gradients

    def entries(self, label: str, count: int) -> list[Finding]:
        """Compare up to `count` entries of a leaf, and the inconclusive ones again along their common direction."""
        leaf, numeric = self.leaves[label], self.numeric
        chosen = np.arange(leaf.size)
        if leaf.size > count:
            chosen = np.sort(self.rng.choice(leaf.size, count, replace=False))
        places = [tuple(int(i) for i in np.unravel_index(flat, leaf.shape)) for flat in chosen]
        gradient = to_numpy(self.gradients[label])
        findings = [self._entry(label, i, float(gradient[i])) for i in places]
        below = [i for i, finding in zip(places, findings, strict=True) if finding.verdict == "inconclusive"]
        if len(below) > 1:
            signs = np.zeros(leaf.shape)
            for i in below:
                signs[i] = -1.0 if gradient[i] < 0 else 1.0
            findings.append(self.direction({label: array_module(leaf.data).asarray(signs) * numeric.scales[label]}))
        return findings

    def _entry(self, label: str, index: tuple[int, ...], analytic: float) -> Finding:
        """Compare one entry: with steps on the scale of its array, and where that does not agree, on its own scale as
        well.

        A function may change, or its domain end, on the scale of a small entry itself (log near 0). And a table of
        differences across a kink can look as if it converged: what is wrong at one scale and right at another is
        undecided.
        """
        first = self._judge(label, index, analytic, self.numeric.along_entry(label, index))
        if first.verdict in ("checked", "zero"):
            return first
        second = self._judge(label, index, analytic, self.numeric.along_entry(label, index, of_itself=True))
        agrees = second.verdict in ("checked", "zero")
        if first.verdict == "wrong":
            return replace(first, verdict="inconclusive") if agrees else first
        return second if agrees or second.verdict == "wrong" else first

    def direction(self, steps: Mapping[str, Array]) -> Finding:
        """Compare the derivative along `steps` with Σ gradient · step."""
        analytic = inner([self.gradients[label] for label in steps], list(steps.values()))
        first = self._judge(", ".join(steps), None, analytic, self.numeric.along(steps))
        if first.verdict == "wrong":  # some entry may cross a kink: shorter steps cross fewer
            second = self._judge(", ".join(steps), None, analytic, self.numeric.along(steps, reach=1 / 50))
            return replace(first, verdict="inconclusive") if second.verdict == "checked" else first
        return first

    def _judge(self, label: str, index: tuple[int, ...] | None, analytic: float, numeric: Derivative) -> Finding:
        """The rule at the head of this file."""
        difference = abs(analytic - numeric.value)
        magnitude = max(abs(analytic), abs(numeric.value))
        unresolved = SAFETY * numeric.uncertainty > magnitude / 4
        if not math.isfinite(analytic):
            verdict = "wrong"
        elif numeric.still and analytic == 0.0:
            verdict = "zero"
        elif not math.isfinite(numeric.uncertainty):
            verdict = "inconclusive"
        elif difference <= self.rtol * magnitude + SAFETY * numeric.uncertainty:
            verdict = "inconclusive" if unresolved else "checked"
        elif difference <= SAFETY * numeric.hidden or (numeric.kink and difference <= 2 * numeric.jump):
            verdict = "inconclusive"
        else:
            verdict = "wrong"
        return Finding(label, index, analytic, numeric.value, numeric.uncertainty, verdict)


# --- running the function, forward and backward ---------------------------------------------------------------------


def require_leaves(name: str, leaves: Mapping[str, Tensor]) -> None:
    """Something to check, in float64, that can be moved."""
    if not leaves:
        raise MiniloraError(
            f"gradcheck of {name}: no input can be checked, expected float64 arrays or Tensors with requires_grad=True"
        )
    for label, leaf in leaves.items():
        start = f"gradcheck of {name}: input {label} is"
        if leaf.dtype != np.float64:
            raise MiniloraError(f"{start} {leaf.dtype}, expected float64 (differences of less are noise): convert it")
        if leaf.source is not None:
            raise MiniloraError(f"{start} the result of a primitive, expected a leaf: pass its detach()")
        if not getattr(leaf.data.flags, "writeable", True):
            raise MiniloraError(f"{start} read-only, expected an array that can be moved: pass a copy")


def tensors_of(result: Any) -> list[Tensor]:
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    for output in outputs:
        if not isinstance(output, Tensor):
            raise MiniloraError(f"gradcheck needs a function that returns Tensors, found {type(output).__name__}")
    return outputs


def values_of(fn: Callable[[], Any]) -> list[Array]:
    """Copies of the values: a function may return views of its inputs, which are about to move."""
    with no_grad():
        return [tensor.data.copy() for tensor in tensors_of(fn())]


def gradients_of(outputs: list[Tensor], cotangents: list[Array], leaves: Mapping[str, Tensor]) -> dict[str, Array]:
    """The gradient of every leaf, zeros where none arrived; the leaves' own .grad is left as it was."""
    with _without_gradients(list(leaves.values())):
        backward(outputs, cotangents)
        return {
            label: array_module(leaf.data).zeros_like(leaf.data) if leaf.grad is None else leaf.grad
            for label, leaf in leaves.items()
        }


@contextmanager
def _without_gradients(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the leaves start without a gradient; afterwards they have the one that they had before."""
    kept = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in zip(leaves, kept, strict=True):
            leaf.grad = grad
