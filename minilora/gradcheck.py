"""Is a hand-derived gradient right? Finite differences against any function of Tensors.

    ml.gradcheck(ml.ops.silu_mul, [gate, up])                                   # raises GradientError if it is not
    ml.gradcheck_parameters(lambda: model.loss(tokens), model.adapter_parameters("a"))

Every entry (or a sample of them) and random directions are compared; what is wrong, right or undecided then is said in
comparison.py. Beside them the adjoint test, which shows that a vjp is right for every cotangent.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from .backend import Array
from .comparison import (
    RTOL,
    Comparison,
    Finding,
    GradientError,
    Report,
    gradients_of,
    require_leaves,
    tensors_of,
    values_of,
)
from .differences import inner, random_like, scale, tangent
from .errors import MiniloraError
from .tensor import Tensor

LARGEST_ROW = 64  # entries of an input that are all compared; more are sampled


def gradcheck(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    entries: int = LARGEST_ROW,
    directions: int = 2,
    rtol: float = RTOL,
    seed: int = 0,
) -> Report:
    """Compare the gradients of fn(*inputs) with finite differences; raise GradientError where they disagree.

    fn: takes Tensors and returns a Tensor of any shape, or a tuple of Tensors; the same values at every call.
    inputs: float64 arrays, and float64 Tensors with requires_grad, are checked; the rest is passed on as it is.
    Strided views
        are fine. Their values are moved in place for a moment, and their bits put back.
    names: of the inputs, for messages; by default those of fn's parameters.
    entries: compare all entries of an input that has no more than these, and a random sample of so many otherwise.
    directions: compare so many random directions through all inputs at once.

    Raises MiniloraError for inputs that cannot be checked: none in float64, or a function that is not deterministic.
    """
    labels = list(names) if names is not None else _parameter_names(fn, len(inputs))
    arguments = [_argument(value) for value in inputs]
    leaves = _leaves(labels, arguments)
    check = Comparison(_name(fn), lambda: fn(*arguments), leaves, rtol, seed)
    report = Report(check.name, noise=check.numeric.relative_noise)
    for label in leaves:
        report.add(check.entries(label, entries))
    report.add([check.direction(check.numeric.random_direction(list(leaves))) for _ in range(directions)])
    report.raise_if_wrong()
    return report


def gradcheck_parameters(
    fn: Callable[[], Any],
    parameters: Mapping[str, Tensor],
    *,
    name: str = "the loss",
    groups: Mapping[str, Sequence[str]] | None = None,
    entries: int = 2,
    directions: int = 1,
    rtol: float = RTOL,
    seed: int = 0,
    progress: Callable[[str, Report], None] | None = None,
) -> dict[str, Report]:
    """Check the gradients of fn() for named Tensors that it closes over, in a few evaluations: for whole models.

    groups: {group: names of its parameters}; by default every parameter is a group. Each group is compared along
    `directions` random directions through all of its parameters at once, and in `entries` random entries, of as many
    different parameters as there are.
    progress: called with each group's Report as it is done.
    Returns a Report per group, wrong ones included, so that a table can show them all: `raise_if_wrong` on each raises.
    MiniloraError as in `gradcheck`.
    """
    if groups is None:
        groups = {key: [key] for key in parameters}
    check = Comparison(name, fn, dict(parameters), rtol, seed)
    reports = {}
    for group, members in groups.items():
        reports[group] = report = Report(f"{name} in {group}", noise=check.numeric.relative_noise)
        report.add([check.direction(check.numeric.random_direction(members)) for _ in range(directions)])
        shares = Counter(itertools.islice(itertools.cycle(check.rng.permutation(members).tolist()), entries))
        for member, share in shares.items():
            report.add(check.entries(member, share))
        if progress is not None:
            progress(group, report)
    return reports


def gradcheck_model(
    model: Any,
    tokens: Array,
    *,
    adapter: str,
    labels: Array | None = None,
    entries: int = 4,
    directions: int = 1,
    seed: int = 0,
    progress: Callable[[str, Report], None] | None = None,
) -> dict[str, Report]:
    """Check a model's gradients for one of its adapters on one batch, layer by layer: a Report per decoder block.

    model: a float64 `Model`; tokens, labels (B, T) as for `model.loss`. Otherwise as `gradcheck_parameters`, with a
    group per block ("model.layers.3") and one for each layer outside of them. Dropout is off. A matrix that is all
    zero (B before training, where dA = 0 and nothing of A could be checked) is given random values for the while; the
    adapter and the selection are as before when this returns.
    """
    if model.dtype != np.float64:
        raise MiniloraError(f"gradcheck needs a float64 model, found {model.dtype}: load it with dtype='float64'")
    parameters: dict[str, Tensor] = model.adapter_parameters(adapter)
    groups: dict[str, list[str]] = {}
    for key in parameters:
        path = key.removeprefix("base_model.model.").partition(".lora_")[0]
        block = re.match(r".*?\.\d+(?=\.)", path)
        groups.setdefault(block[0] if block else path, []).append(key)
    state = model.network.adapter_state
    modules = [module for _, module in model.network.named_modules() if getattr(module, "adapter", None)]
    adapted = [(module, module.adapter.layers[adapter]) for module in modules if adapter in module.adapter.layers]
    layers = [layer for _, layer in adapted]
    empty = [parameter for parameter in parameters.values() if not bool(parameter.data.any())]
    before = state.selection, model.training_pass
    trained = [parameter.requires_grad for parameter in parameters.values()]
    dropout = [layer.dropout for layer in layers]
    rng = np.random.default_rng(seed)
    try:
        model.set_adapter(adapter)
        for layer in layers:
            layer.dropout = 0.0
        for parameter in parameters.values():
            parameter.requires_grad = True
        for parameter in empty:
            parameter.data[...] = random_like(parameter.data, rng) / math.sqrt(parameter.shape[0])
        with ExitStack() as held:
            for module, layer in adapted:
                held.enter_context(layer.constants_held(module))
            return gradcheck_parameters(
                lambda: model.loss(tokens, labels),
                parameters,
                groups=groups,
                entries=entries,
                directions=directions,
                seed=seed,
                progress=progress,
            )
    finally:
        for parameter in empty:
            parameter.data[...] = 0.0
        for parameter, requires_grad in zip(parameters.values(), trained, strict=True):
            parameter.requires_grad = requires_grad
        for layer, probability in zip(layers, dropout, strict=True):
            layer.dropout = probability
        state.selection, model.training_pass = before


def dot_product_check(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    jvp: Callable[..., Any] | None = None,
    cotangents: int = 3,
    rtol: float | None = None,
    seed: int = 0,
) -> float:
    """The adjoint test ⟨w, J v⟩ = ⟨Jᵀ w, v⟩, for a random v and several random w (Claerbout 1992, section 5).

    Jᵀ w is fn's backward pass. J v is jvp(*directions) where that is given: a linear fn is its own jvp, and the two
    sides then agree to rounding (rtol 1e-12). Otherwise J v comes from differences of the whole output (rtol 1e-7).
    Where `gradcheck` fixes one cotangent, this shows that the vjp is right for all of them, and so linear.
    Returns the largest |⟨w, J v⟩ − ⟨Jᵀ w, v⟩| / (‖w‖·‖J v‖); raises GradientError above rtol. inputs as in `gradcheck`.
    """
    rng = np.random.default_rng(seed)
    bound = rtol if rtol is not None else RTOL if jvp is None else 1e-12
    arguments = [_argument(value) for value in inputs]
    labels = _parameter_names(fn, len(inputs))
    leaves = _leaves(labels, arguments)
    require_leaves(_name(fn), leaves)
    steps = {label: random_like(leaf.data, rng) * scale(leaf.data) for label, leaf in leaves.items()}
    if jvp is None:
        moved_outputs = tangent(lambda: values_of(lambda: fn(*arguments)), leaves, steps)
    else:
        pairs = zip(labels, arguments, strict=True)
        moving = [Tensor(steps[label]) if label in leaves else value for label, value in pairs]
        moved_outputs = values_of(lambda: jvp(*moving))
    worst = 0.0
    for _ in range(cotangents):
        weights = [random_like(array, rng) for array in moved_outputs]
        gradients = gradients_of(tensors_of(fn(*arguments)), weights, leaves)
        left, right = inner(weights, moved_outputs), inner(list(gradients.values()), list(steps.values()))
        size = math.sqrt(inner(weights, weights) * inner(moved_outputs, moved_outputs)) or 1.0
        error = abs(left - right) / size
        if not error <= bound:
            finding = Finding(", ".join(leaves), None, right, left, bound * size, "wrong")
            sides = f"⟨w, J v⟩ = {left:.12g}, ⟨Jᵀ w, v⟩ = {right:.12g}"
            message = f"the vjp of {_name(fn)} is not the adjoint of its derivative: {sides}"
            raise GradientError(message, finding, Report(_name(fn), wrong=[finding]))
        worst = max(worst, error)
    return worst


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _parameter_names(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of fn's positional parameters; the number of the input where it has none."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:  # some built-in functions have no signature
        return [str(i) for i in range(count)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else str(i) for i in range(count)]


def _argument(value: Any) -> Any:
    """A leaf for a floating array (or NumPy scalar), to be checked; anything else as it is."""
    if isinstance(value, np.floating):
        value = np.array(value)
    is_array = not isinstance(value, Tensor) and hasattr(value, "strides") and value.dtype.kind == "f"
    return Tensor(value, requires_grad=True) if is_array else value


def _leaves(labels: Sequence[str], arguments: Sequence[Any]) -> dict[str, Tensor]:
    """The arguments that are checked, by label."""
    pairs = zip(labels, arguments, strict=True)
    return {label: value for label, value in pairs if isinstance(value, Tensor) and value.requires_grad}
