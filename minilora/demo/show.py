"""The demo, step by step. Each step is a few calls of the public interface, and leaves what it found in `Results`."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiniloraError
from ..files import atomic_write, json_bytes
from ..formats.checkpoint import find_model
from ..generate import generate_batch
from ..gradcheck import gradcheck_model
from ..loading import load_model
from ..lora import LoraConfig
from ..model import Model
from ..optim import AdamW
from ..train import TrainConfig, train
from ..train.progress import Quiet
from ..train.table import summarise
from .results import Checked, Continued, Held, Learned, Merged, Results
from .tasks import TASKS, Row, Task

MODEL = "mini"
CONFIG = LoraConfig(r=8, alpha=16, target_modules="all-linear")
BATCH, LENGTH = 16, 64  # rows of a step, tokens of a row
BASE_PROMPTS = ("Emma was", "The state of the Union", "teacher (noun):")  # three of the texts it has read
NEW_TOKENS = 36
DRAW: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9}  # greedy text of a small model soon runs in circles
SENTENCE = "And God said, Let there be light: and there was light."
SPEED_BATCH, SPEED_TOKENS, SPEED_ROUNDS = (8, 256), 24, 5
RESULTS, PAGE = "demo.json", "report.html"


class Watcher:
    """Is told what happens; this one shows nothing."""

    def stage(self, title: str, about: str = "") -> None:
        """A step begins."""

    def found(self, results: Results, what: str) -> None:
        """`what`, an attribute of the results, is there now."""

    def training(self, task: Task) -> Quiet:
        """What one adapter's training shows its progress to."""
        return Quiet()


def run_demo(
    out: Path, seed: int = 0, steps: int | None = None, watch: Watcher | None = None, model: str = MODEL
) -> Results:
    """Run all of it and write the folder `out`: an adapter for each task, its rows, the results, the HTML report.

    steps: of each adapter, instead of what its task takes. model: another base, to try it out.
    Raises MiniloraError, before anything is written, where `out` holds something that is no demo's.
    """
    if steps is not None and steps < 1:
        raise MiniloraError(f"steps is {steps}, expected at least 1")
    check_out(out)
    watch = watch or Watcher()
    begun = time.monotonic()
    base = load_model(model, dtype="float32")
    results = Results(
        model,
        parameters=sum(parameter.size for _, parameter in base.network.named_parameters()),
        model_bytes=(find_model(model) / "model.safetensors").stat().st_size,
        seed=seed,
    )
    for step, title, about in (
        (look_at_the_base, "The base", "a small language model that came with this package, as it is"),
        (train_the_adapters, "Three adapters", "each learns from its own rows; the base stays frozen"),
        (switch, "One base, switched", "the same prompts, the same weights in memory, another adapter selected"),
        (count, "What was trained", "and what training holds, beside training every parameter"),
        (merge, "Merged", "W' = W + s · B A: the adapter becomes part of the weights"),
        (check_gradients, "Gradients checked", "the hand-derived dA and dB against central differences, in float64"),
    ):
        watch.stage(title, about)
        step(base, results, Demo(out, seed, steps, watch, model))
    results.seconds = time.monotonic() - begun
    write_results(results, out)
    return results


@dataclass(frozen=True)
class Demo:
    """What every step needs to know: the arguments of `run_demo`."""

    out: Path
    seed: int
    steps: int | None
    watch: Watcher
    model: str


def check_out(out: Path) -> None:
    """MiniloraError unless `out` is new, empty, or an earlier demo's (whose parts are then replaced)."""
    if out.is_file():
        raise MiniloraError(f"{out} is a file, expected a folder or nothing there: choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / RESULTS).exists():
        raise MiniloraError(f"{out} is not empty and holds no earlier demo ({RESULTS}): choose another --out")


def look_at_the_base(base: Model, results: Results, demo: Demo) -> None:
    for prompt in BASE_PROMPTS:
        results.base_texts[prompt] = base.generate(prompt, NEW_TOKENS, **DRAW, seed=demo.seed)
    demo.watch.found(results, "base_texts")


def train_the_adapters(base: Model, results: Results, demo: Demo) -> None:
    """Each with `train`, which leaves a PEFT directory with its metrics, samples and settings."""
    atomic_write(demo.out / RESULTS, json_bytes({}))  # from here on the folder is a demo's
    for task in TASKS:
        training, validation = task.rows(demo.seed)
        data = write_rows(demo.out / "data" / task.name, training, validation)
        before = exactly_right(base, validation) if task.exact else None
        base.add_adapter(task.name, CONFIG, seed=demo.seed)
        folder = demo.out / task.name
        if folder.exists():
            shutil.rmtree(folder)
        config = TrainConfig(
            folder, steps=demo.steps or task.steps, batch_size=BATCH, max_length=LENGTH, lr=task.lr, warmup=0.05,
            eval_every=demo.steps or task.steps, sample_prompt=task.prompt, seed=demo.seed,
        )  # fmt: skip
        run = train(base, data, config, show=demo.watch.training(task))
        after = exactly_right(base, validation) if task.exact else None
        measured = [record["validation_loss"] for record in run.history if "validation_loss" in record]
        results.learned.append(
            Learned(
                task.name, task.title, task.about, len(training), run.steps, measured[0], measured[-1],
                None if before is None or after is None else (before, after, len(validation)), run.seconds,
                sum(tensor.size for tensor in base.adapter_parameters(task.name).values()),
                (folder / "adapter_model.safetensors").stat().st_size,
            )
        )  # fmt: skip
        base.set_adapter(None)
        demo.watch.found(results, "learned")


def switch(base: Model, results: Results, demo: Demo) -> None:
    """Every prompt under the base and every adapter; then all of them in one batch, a row each, which must agree."""
    names = [None, *(task.name for task in TASKS)]
    for task in TASKS:
        texts = {}
        for name in names:
            base.set_adapter(name)
            texts[name or "base"] = base.generate(task.prompt, NEW_TOKENS, **DRAW, seed=demo.seed)
        results.continued.append(Continued(task.prompt, texts))
    prompts = [task.prompt for task in TASKS for _ in names]
    base.set_adapter(rows=names * len(TASKS))
    together = generate_batch(base, prompts, NEW_TOKENS, **DRAW, seed=demo.seed)
    base.set_adapter(None)
    results.one_batch_agrees = together == [text for row in results.continued for text in row.texts.values()]
    demo.watch.found(results, "continued")


def count(base: Model, results: Results, demo: Demo) -> None:
    """The parameters of one adapter, and the bytes that gradients and Adam take, measured, with it and without it."""
    base.set_adapter(TASKS[0].name)
    summary = summarise(base)
    results.parameter_rows = [row._asdict() for row in summary.rows]
    results.trainable = summary.trainable
    results.lora = held_by_training(base)
    base.set_adapter(None)
    whole = load_model(demo.model, dtype="float32")
    whole.unfreeze(".*")
    results.full = held_by_training(whole)
    demo.watch.found(results, "full")


def held_by_training(model: Model) -> Held:
    """Bytes of what is trained, of its gradients and of Adam's moments after one step (of learning rate 0)."""
    parameters = model.parameters()
    optimiser = AdamW(parameters, lr=0.0, weight_decay=0.0)
    tokens = np.random.default_rng(0).integers(1, model.config.vocab_size, (1, 16))
    model.loss(tokens).backward()
    optimiser.step()
    held = Held(
        sum(tensor.data.nbytes for tensor in parameters.values()),
        sum(tensor.grad.nbytes for tensor in parameters.values() if tensor.grad is not None),
        optimiser.state_bytes(),
    )
    optimiser.zero_grad()
    return held


def merge(base: Model, results: Results, demo: Demo) -> None:
    """Logits with the adapter beside the weights and within them, the time of both, and the base back as it was."""
    name = TASKS[0].name
    untouched = {key: np.array(tensor.data) for key, tensor in base.network.named_parameters()}
    merged = load_model(demo.model, dtype="float32")  # a copy, so that all three can be timed in turn
    merged.load_adapter(name, demo.out / name)
    merged.merge_adapter(name)
    models = {"base": (base, None), "adapter": (base, name), "merged": (merged, None)}
    sentence = sentence_of(base)
    base.set_adapter(name)
    beside, within = np.array(base.logits(sentence)), np.array(merged.logits(sentence))
    written = [model.generate(list(sentence[0]), SPEED_TOKENS, stop=[]) for model in (base, merged)]
    many = np.random.default_rng(demo.seed).integers(1, base.config.vocab_size, SPEED_BATCH)
    results.merged = Merged(
        name,
        difference=float(np.abs(within - beside).max()),
        scale=float(np.abs(beside).max()),
        same_text=written[0] == written[1],
        restored=False,
        pass_tokens=many.size,
        pass_seconds=timed(models, lambda model: model.logits(many)),
        token_seconds={
            key: seconds / SPEED_TOKENS
            for key, seconds in timed(
                models, lambda model: model.generate(list(sentence[0]), SPEED_TOKENS, stop=[])
            ).items()
        },
    )
    base.set_adapter(None)
    base.merge_adapter(name)
    base.unmerge_adapter()
    results.merged.restored = all(
        np.array_equal(tensor.data, untouched[key]) for key, tensor in base.network.named_parameters()
    )
    demo.watch.found(results, "merged")


def timed(models: dict[str, tuple[Model, str | None]], run: Callable[[Model], object]) -> dict[str, float]:
    """The median seconds of run(model) on each, its adapter selected; in turn, so that all share what else goes on."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(SPEED_ROUNDS + 1):
        for name, (model, adapter) in models.items():
            model.set_adapter(adapter)
            begun = time.perf_counter()
            run(model)
            if number:  # the first round is for warming up
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def sentence_of(model: Model) -> np.ndarray:
    """A sentence as (1, T) tokens."""
    assert model.tokenizer is not None
    return np.array([model.tokenizer.encode(SENTENCE)])


def check_gradients(base: Model, results: Results, demo: Demo) -> None:
    """The trained adapter's gradients on a sentence, every block, along directions and entry by entry."""
    exact = load_model(demo.model, dtype="float64")
    name = TASKS[0].name
    exact.load_adapter(name, demo.out / name)
    reports = gradcheck_model(exact, sentence_of(exact), adapter=name, entries=4, directions=2, seed=demo.seed).values()
    results.checked = Checked(
        sum(report.checked + report.directions_checked for report in reports),
        sum(report.inconclusive + report.directions_inconclusive for report in reports),
        sum(len(report.wrong) for report in reports),
        max(report.error for report in reports),
    )
    demo.watch.found(results, "checked")


def exactly_right(model: Model, rows: list[Row]) -> int:
    """How many completions are written exactly as the rows have them."""
    texts: list[Any] = generate_batch(model, [row["prompt"] for row in rows], 12, batch_size=50)
    return sum(text.strip() == row["completion"].strip() for text, row in zip(texts, rows, strict=True))


def write_rows(folder: Path, training: list[Row], validation: list[Row]) -> Path:
    """train.jsonl and valid.jsonl in the folder, as `minilora train --data` reads them."""
    for name, rows in (("train", training), ("valid", validation)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(folder / f"{name}.jsonl", text.encode())
    return folder


def write_results(results: Results, out: Path) -> None:
    """demo.json and the HTML report."""
    from ..report.page import write_page
    from ..report.run import read_run
    from .page import page_of

    runs = [read_run(out / task.name) for task in TASKS]
    write_page(page_of(results, runs, out), out / PAGE)
    atomic_write(out / RESULTS, json_bytes(asdict(results)))
