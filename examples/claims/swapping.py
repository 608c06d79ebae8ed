"""Tasks are switched by swapping a few megabytes, without touching the base

Claim. One copy of the base serves many tasks: to switch, only the small A and B are exchanged, at once, where a fully
fine-tuned model would have to be loaded anew (Hu et al. 2021, section 1, first advantage, and section 4.2).

Measured. With 1, 10 and 50 adapters of rank 8 on all linear layers on one base: the median time of `set_adapter`, the
most memory that Python and NumPy asked for during one (tracemalloc), and whether each array of the base is still the
same object with the same values after all switches. Beside it: loading a model anew, as full fine-tuning would need,
and unmerging one adapter and merging another. The logits under some adapters are compared with those of a base that
has that adapter alone.

Refuted. If a switch takes over a millisecond or over a hundredth of loading the model; if it allocates over a
hundredth of an adapter's bytes; if an array of the base is another one afterwards; or if the logits are not the same,
bit for bit.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from minilora.backend import Array, to_device

from .common import Base, Verdict, load, median, table
from .picture import COLOURS, Figure, save

FASTEST, PART = 1e-3, 0.01
WAY = ml.LoraConfig(r=8, alpha=16)


def measure(base: Base, counts: Sequence[int] = (1, 10, 50), switches: int = 200, loads: int = 3) -> dict[str, Any]:
    """Seconds of a switch by the number of adapters, of loading and of merging; bytes; what stayed the same."""
    model = load(base)
    untouched = {name: (parameter.data, digest(parameter.data)) for name, parameter in model.network.named_parameters()}
    seconds, held = {}, []
    for count in counts:
        while len(model.adapters) < count:
            add_adapter(model, f"a{len(model.adapters)}")
        held.append(sum(tensor.data.nbytes for tensor in model.adapter_parameters("a0").values()))
        names = [f"a{number % count}" for number in range(switches)] if count > 1 else ["a0", None] * (switches // 2)
        seconds[str(count)] = median(timed(partial(model.set_adapter, name)) for name in names)
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    model.set_adapter("a0")
    allocated = tracemalloc.get_traced_memory()[1] - start
    tracemalloc.stop()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 32))
    same = []
    for name in (f"a{min(number, max(counts) - 1)}" for number in (0, 1)):
        model.set_adapter(name)
        alone = load(base)
        add_adapter(alone, name)
        same.append(bool(np.array_equal(ml.to_numpy(model.logits(tokens)), ml.to_numpy(alone.logits(tokens)))))
    kept = all(
        parameter.data is untouched[name][0] and digest(parameter.data) == untouched[name][1]
        for name, parameter in model.network.named_parameters()
    )

    def merge_another() -> None:
        model.merge_adapter("a0")
        model.unmerge_adapter()

    return {
        "seconds": seconds,
        "load": median(timed(lambda: load(base)) for _ in range(loads)),
        "merge": median(timed(merge_another) for _ in range(loads)),
        "allocated": allocated,
        "adapter_bytes": held[0],
        "base_bytes": sum(parameter.data.nbytes for _, parameter in model.network.named_parameters()),
        "base_kept": kept,
        "same_logits": all(same),
    }


def add_adapter(model: ml.Model, name: str) -> None:
    """An adapter with random values that its name decides."""
    model.add_adapter(name, WAY)
    random = np.random.default_rng(int(name[1:]))
    for tensor in model.adapter_parameters(name).values():
        tensor.data[...] = to_device(random.normal(0, 0.02, tensor.shape), model.device)


def digest(array: Array) -> tuple[float, float]:
    """Two sums that a changed value changes."""
    exact = array.astype(np.float64)
    return float(exact.sum()), float((exact * exact).sum())


def timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def verdict(results: dict[str, Any]) -> Verdict:
    slowest = max(results["seconds"].values())
    fast = slowest <= FASTEST and slowest <= PART * results["load"]
    small = results["allocated"] <= PART * results["adapter_bytes"]
    return Verdict(
        fast and small and results["base_kept"] and results["same_logits"],
        f"a switch takes {1e6 * slowest:.0f} µs at most and allocates {results['allocated']:,} bytes, of an adapter of "
        f"{results['adapter_bytes']:,}; loading a model takes {1e3 * results['load']:.0f} ms (asked: a hundredth of "
        f"both at most); the base's arrays are {'' if results['base_kept'] else 'not '}the same ones, the logits "
        f"{'' if results['same_logits'] else 'not '}those of a model with that adapter alone",
    )


def rows(results: dict[str, Any]) -> str:
    lines = [
        [f"set_adapter, {count} on the base", f"{1e3 * seconds:.4f}", f"{results['allocated']:,}"]
        for count, seconds in results["seconds"].items()
    ]
    lines.append(["merging an adapter and unmerging it", f"{1e3 * results['merge']:.2f}", ""])
    lines.append(["loading a model", f"{1e3 * results['load']:.2f}", f"{results['base_bytes']:,}"])
    return table(["switching by", "ms", "bytes allocated"], lines)


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("ms, on a logarithmic axis", "")
    bars = {f"set_adapter, {count} on the base": seconds for count, seconds in results["seconds"].items()}
    bars |= {"merge and unmerge": results["merge"], "load a model": results["load"]}
    colours = [COLOURS[0]] * len(results["seconds"]) + [COLOURS[4], COLOURS[1]]
    for place, ((_, seconds), colour) in enumerate(reversed(list(zip(bars.items(), colours, strict=True)))):
        figure.axis.plot(1e3 * seconds, place, "o", color=colour, markersize=9)
    figure.axis.set_yticks(range(len(bars)), list(reversed(bars)))
    figure.axis.set_xscale("log")
    save(figure, path)
