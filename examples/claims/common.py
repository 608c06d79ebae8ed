"""What the claims share: the base, the tasks, training it in one way, the held-out loss, and the verdict.

A *way* to train is a LoraConfig, or FULL: every parameter of the base. All runs use AdamW without weight decay,
clipping at 1, a linear rise of the learning rate over a tenth of the steps and a linear fall after it.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from minilora.data import Batch, Example, batch_stream, batches
from minilora.data.encoding import Encoder
from minilora.data.rows import Row
from minilora.demo.tasks import date_rows, stored
from minilora.errors import MiniloraError
from minilora.train.loop import evaluate

GENERAL = Path(__file__).parent / "texts" / "general.jsonl"
FULL = None  # the way to train that unfreezes all of the base
LENGTH = 96  # tokens of a row at most
EVALUATION_BATCH = 32
Way = ml.LoraConfig | None


@dataclass(frozen=True)
class Base:
    """The model that a claim is measured on: its name or path, and where it is held ("cpu", "cuda")."""

    name: str
    device: str = "cpu"


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Rows that are trained on, rows that choose a learning rate, and rows that nothing but the score has seen."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]


def dates(model: ml.Model, seed: int = 0) -> Task:
    """`7 March 2021 =` to ` 2021-03-07`, as `minilora demo` trains it: a small task near to what the base has read."""
    training, validation = date_rows(seed)
    rows = examples(model, training + validation)
    return Task(rows[300:], rows[:100], rows[100:300])


def other_language(model: ml.Model, seed: int = 0) -> Task:
    """Psalms and gospels, each letter replaced by the one 13 places on: far from all that the base has read."""
    training, validation = stored("king_james.jsonl")(seed)
    rows = [{"text": thirteen_on(row["text"])} for row in training + validation]
    found = examples(model, rows)
    return Task(found[80:], found[:40], found[40:80])


def thirteen_on(text: str) -> str:
    """Every letter a-z replaced by the one 13 places further round the alphabet (its own inverse)."""
    small, large = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return text.translate(str.maketrans(small + large, small[13:] + small[:13] + large[13:] + large[:13]))


def general_text(model: ml.Model) -> list[Example]:
    """English of the kind that `mini` was trained on, from documents that its training held back."""
    return examples(model, [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()])


def examples(model: ml.Model, rows: Iterable[Mapping[str, str]]) -> list[Example]:
    """{"text"} rows are learned wholly, {"prompt", "completion"} rows from the completion on; cut to LENGTH tokens."""
    if model.tokenizer is None:
        raise MiniloraError(f"{model.source} has no tokenizer, expected one: the claims train on text")
    kind = {True: "text", False: "prompt+completion"}
    checked = [Row("", kind["text" in row], dict(row), frozenset()) for row in rows]
    return [example for example, _ in Encoder(model.tokenizer).examples(checked, LENGTH, mask_prompt=True)]


# --- training ---------------------------------------------------------------------------------------------------------


def load(base: Base) -> ml.Model:
    """The base in float32, read from its file."""
    return ml.load_model(base.name, device=base.device, dtype="float32")


_kept = lru_cache(maxsize=1)(load)


def fresh(base: Base) -> ml.Model:
    """A copy of the base as `load` reads it, without reading it again: decompressing a GGUF file takes seconds."""
    kept = _kept(base)
    return copy.deepcopy(kept, {id(kept.tokenizer): kept.tokenizer})


def trained(
    base: Base,
    way: Way,
    rows: Sequence[Example],
    lr: float,
    steps: int,
    batch_size: int = 16,
    seed: int = 0,
    each_step: Callable[[ml.Model, int], object] | None = None,
) -> ml.Model:
    """A fresh base, trained that way. seed: of the adapter's start and the order of the rows.

    each_step(model, number of steps taken) is called before the first step and after each.
    """
    model = fresh(base)
    if way is FULL:
        model.unfreeze(".*")
    else:
        model.add_adapter("a", way, seed=seed)
    optimiser = ml.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    factor = ml.schedule("linear", steps, warmup=steps // 10)
    step = ml.TrainStep(model, optimiser, max_grad_norm=1.0)
    stream = batch_stream(rows, batch_size, seed=seed)
    for number in range(steps):
        if each_step is not None:
            each_step(model, number)
        batch: Batch = next(stream)[2]
        optimiser.lr = lr * factor(number)
        step(batch.tokens, batch.labels)
    if each_step is not None:
        each_step(model, steps)
    return model


def loss(model: ml.Model, rows: Sequence[Example]) -> float:
    """The mean cross-entropy per label token, in nats; infinite where training has blown the model up."""
    value = evaluate(model, rows, EVALUATION_BATCH)
    return value if math.isfinite(value) else math.inf


def exact_share(model: ml.Model, rows: Sequence[Example]) -> float:
    """The share of rows whose completion greedy decoding writes exactly: each of its tokens is the likeliest one."""
    right = 0
    for batch in batches(rows, EVALUATION_BATCH, shuffle=False):
        guesses = ml.to_numpy(model.logits(batch.tokens).argmax(-1))[:, :-1]
        asked = batch.labels[:, 1:]
        right += int(((guesses == asked) | (asked < 0)).all(axis=1).sum())
    return right / len(rows)


def best_rate(rates: Sequence[float], run: Callable[[float], ml.Model], rows: Sequence[Example]) -> tuple[float, Any]:
    """(the learning rate with the lowest loss on the rows, the model that it trained)."""
    best: tuple[float, float, Any] = (math.inf, rates[0], None)
    for rate in rates:
        model = run(rate)
        found = loss(model, rows)
        if best[2] is None or found < best[0]:
            best = (found, rate, model)
    return best[1], best[2]


def trained_parameters(model: ml.Model) -> int:
    return sum(parameter.size for parameter in model.parameters().values())


def over_seeds(
    rates: Sequence[float], seeds: int, run: Callable[[float, int], ml.Model], rows: Sequence[Example]
) -> tuple[float, list[ml.Model]]:
    """(the learning rate that is best with seed 0, run(rate, seed) of each seed): one rate serves all seeds."""
    rate, first = best_rate(rates, lambda lr: run(lr, 0), rows)
    return rate, [first, *(run(rate, seed) for seed in range(1, seeds))]


def median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The median and, of several, the lowest and the highest."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def error_bars(runs: Sequence[Sequence[float]]) -> np.ndarray:
    """(2, n): how far the lowest and the highest of each run's values lie from its median, as matplotlib takes it."""
    return np.array([[median(v) - min(v) for v in runs], [max(v) - median(v) for v in runs]])


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the numbers say. holds: None where one half of the claim does and the other does not."""

    holds: bool | None
    why: str

    @property
    def word(self) -> str:
        return {True: "holds", None: "holds in part", False: "does not hold"}[self.holds]


def both(first: bool, second: bool) -> bool | None:
    """True, False, or None for one of the two."""
    return first if first is second else None


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are to be formatted before."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
