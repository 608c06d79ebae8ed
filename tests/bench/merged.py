"""What a merged adapter costs: the times of the bare base, of base and adapter, and of the merged model, side by side.

python -m tests.bench.merged                    SmolLM2, rank 8 on all linear layers: about a minute on two idle cores
python -m tests.bench.merged --model PATH --rank 64 --repeat 20

The three are measured in turn, round by round, on one model in one process. That the merged model runs the same
primitives on the same shapes as the base is held by a test (tests/lora/test_merge.py); this shows it in seconds. For
times that nothing disturbs: chrt -r 1 python -m tests.bench.merged
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

import minilora as ml

STATES = ("base", "adapter", "merged")


def passes(model: ml.Model) -> dict[str, Callable[[], object]]:
    """What is timed, by what it is."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, model.config.vocab_size, (2, 128))
    prompt = tokens[0, :16].tolist()
    return {
        "logits, 2 × 128 tokens": lambda: model.logits(tokens),
        "loss, 2 × 128 tokens": lambda: float(model.loss(tokens)),
        "generate 8 tokens": lambda: model.generate(prompt, 8, stop=[]),
    }


def in_each_state(model: ml.Model) -> Iterator[str]:
    """The states one after the other, the model being in each while its name is out."""
    model.set_adapter(None)
    yield "base"
    model.set_adapter("a")
    yield "adapter"
    model.merge_adapter("a")
    yield "merged"
    model.unmerge_adapter()


def measure(model: ml.Model, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{pass: {state: seconds of each round}}; in each state all are run once unmeasured before."""
    found: dict[str, dict[str, list[float]]] = {what: {state: [] for state in STATES} for what in passes(model)}
    with ml.no_grad():
        for _ in range(rounds):
            for state in in_each_state(model):
                for run in passes(model).values():
                    run()
                for what, run in passes(model).items():
                    begun = time.perf_counter()
                    run()
                    found[what][state].append(time.perf_counter() - begun)
    return found


def spread(seconds: list[float]) -> float:
    """The median absolute deviation from the median: the noise of one measurement."""
    middle = statistics.median(seconds)
    return statistics.median(abs(value - middle) for value in seconds)


def table(found: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| pass | base | with the adapter | merged | adapter / base | merged / base |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for what, states in found.items():
        cells = [f"{1e3 * statistics.median(states[s]):.1f} ± {1e3 * spread(states[s]):.1f} ms" for s in STATES]
        for state in STATES[1:]:  # of each round's two, so that what drifts drifts in both
            ratios = [a / b for a, b in zip(states[state], states["base"], strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ± {spread(ratios):.3f}")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.merged", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=9, help="rounds")
    options = parser.parse_args()
    model = ml.load_model(options.model)
    model.add_adapter("a", ml.LoraConfig(r=options.rank, alpha=2 * options.rank))
    random = np.random.default_rng(0)
    for tensor in model.adapter_parameters("a").values():
        tensor.data[...] = random.normal(0, 0.01, tensor.shape)
    seconds = []
    for _ in range(options.repeat):
        begun = time.perf_counter()
        model.merge_adapter("a")
        seconds.append(time.perf_counter() - begun)
        model.unmerge_adapter()
    print(table(measure(model, options.repeat)))
    print(f"\nmedian ± median absolute deviation of {options.repeat} rounds; ratios are of one round each")
    print(f"merging itself: {1e3 * statistics.median(seconds):.0f} ± {1e3 * spread(seconds):.0f} ms")


if __name__ == "__main__":
    main()
