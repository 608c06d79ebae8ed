"""Merged, an adapter costs no time

Claim. With W' = W + s B A merged there is no additional inference latency (Hu et al. 2021, section 4.1); beside the
weights an adapter costs a little.

Measured. The bare base, base and adapter (rank 8, all linear layers), and the merged model take turns, in one
process, so that what drifts drifts for all: logits and loss of 2 × 128 tokens, and 8 new tokens. For each the median
over the rounds of adapter / base and of merged / base; the noise is the median absolute deviation of the latter.
Logits of the merged model are compared with those of base and adapter, and the base with what it was before.

Refuted. If for any of the three merged / base is above 1 by more than 5 % and three times the noise; if merging
changes a logit by over 10⁻⁴ of the largest; or if unmerging does not restore the base bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from minilora.backend import to_device

from .common import Base, Verdict, load, median, table
from .picture import COLOURS, Figure, save

STATES = ("base", "adapter", "merged")
SLOWER, NOISES, ROUNDING = 0.05, 3, 1e-4
SETTINGS = {"smollm2": {"rounds": 7}}


def measure(base: Base, rounds: int = 15, rank: int = 8) -> dict[str, Any]:
    """Medians of the rounds and of their ratios to the base, {pass: {state: value}}; what merging did to the logits."""
    model = load(base)
    model.add_adapter("a", ml.LoraConfig(r=rank, alpha=2 * rank))
    random = np.random.default_rng(0)
    for tensor in model.adapter_parameters("a").values():
        tensor.data[...] = to_device(random.normal(0, 0.02, tensor.shape), base.device)
    tokens = random.integers(0, model.config.vocab_size, (1, 64))
    untouched = values_of(model)
    beside = np.array(ml.to_numpy(model.logits(tokens)))
    model.merge_adapter("a")
    within = np.array(ml.to_numpy(model.logits(tokens)))
    model.unmerge_adapter()
    restored = all(np.array_equal(array, untouched[name]) for name, array in values_of(model).items())
    times = rounds_of(model, rounds)
    ratios = {
        what: {state: [a / b for a, b in zip(states[state], states["base"], strict=True)] for state in STATES[1:]}
        for what, states in times.items()
    }
    return {
        "rounds": rounds,
        "seconds": {what: {state: median(found) for state, found in states.items()} for what, states in times.items()},
        "ratios": {what: {state: median(found) for state, found in states.items()} for what, states in ratios.items()},
        "noise": {what: {state: spread(found) for state, found in states.items()} for what, states in ratios.items()},
        "difference": float(np.abs(within - beside).max() / np.abs(beside).max()),
        "restored": restored,
    }


def values_of(model: ml.Model) -> dict[str, np.ndarray]:
    """A copy of all parameters, on the host."""
    return {name: np.array(ml.to_numpy(parameter)) for name, parameter in model.network.named_parameters()}


def rounds_of(base: ml.Model, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{pass: {state: seconds of each round}}; in each state all are run once unmeasured before."""
    tokens = np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 128))
    passes: dict[str, Callable[[], object]] = {
        "logits, 2 × 128 tokens": lambda: ml.to_numpy(base.logits(tokens)[:, -1]),
        "loss, 2 × 128 tokens": lambda: float(base.loss(tokens)),
        "8 new tokens": lambda: base.generate(tokens[0, :16].tolist(), 8, stop=[]),
    }
    found: dict[str, dict[str, list[float]]] = {what: {state: [] for state in STATES} for what in passes}
    with ml.no_grad():
        for _ in range(rounds):
            for state in in_each_state(base):
                for run in passes.values():
                    run()
                for what, run in passes.items():
                    begun = time.perf_counter()
                    run()
                    found[what][state].append(time.perf_counter() - begun)
    return found


def in_each_state(base: ml.Model) -> Iterator[str]:
    """The states one after the other, the model being in each while its name is out."""
    base.set_adapter(None)
    yield "base"
    base.set_adapter("a")
    yield "adapter"
    base.merge_adapter("a")
    yield "merged"
    base.unmerge_adapter()


def spread(values: list[float]) -> float:
    """The median absolute deviation from the median."""
    middle = median(values)
    return median(abs(value - middle) for value in values)


def verdict(results: dict[str, Any]) -> Verdict:
    ratios, noise = results["ratios"], results["noise"]
    slow = {what for what, found in ratios.items() if found["merged"] - 1 > max(SLOWER, NOISES * noise[what]["merged"])}
    too_slow = f" (too slow: {', '.join(slow)})" if slow else ""
    exact = results["difference"] <= ROUNDING and results["restored"]
    merged, beside = (", ".join(f"{found[state]:.2f}" for found in ratios.values()) for state in ("merged", "adapter"))
    return Verdict(
        not slow and exact,
        f"merged, the three take {merged} times the base's time{too_slow}; "
        f"with the adapter beside the weights {beside} times; merging moves a logit by {results['difference']:.1e} of "
        f"the largest at most; the base is {'' if results['restored'] else 'not '}restored bit for bit",
    )


def rows(results: dict[str, Any]) -> str:
    return table(
        ["", "base, ms", "with the adapter, ms", "merged, ms", "adapter / base", "merged / base"],
        [
            [
                what,
                *(f"{1e3 * seconds[state]:.2f}" for state in STATES),
                *(f"{results['ratios'][what][s]:.3f} ± {results['noise'][what][s]:.3f}" for s in STATES[1:]),
            ]
            for what, seconds in results["seconds"].items()
        ],
    )


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("", "time, the base's being 1")
    axis = figure.axis
    for number, state in enumerate(STATES[1:]):
        places = [place + 0.36 * (number - 0.5) for place in range(len(results["ratios"]))]
        heights = [found[state] for found in results["ratios"].values()]
        errors = [found[state] for found in results["noise"].values()]
        name = {"adapter": "with the adapter", "merged": "merged"}[state]
        axis.bar(places, heights, width=0.34, yerr=errors, color=COLOURS[(1, 0)[number]], label=name, capsize=3)
    axis.axhline(1, color=COLOURS[6], linewidth=0.8)
    axis.set_xticks(range(len(results["ratios"])), list(results["ratios"]))
    axis.set_ylim(0, 1.3 * max(found["adapter"] for found in results["ratios"].values()))
    save(figure, path)
