"""The training loop: batches, steps, validation, saving and stopping, in the order in which they happen.

from minilora import LoraConfig, TrainConfig, load_model, train

model = load_model("smollm2")
model.add_adapter("mine", LoraConfig(r=8, alpha=16))
result = train(model, "data.jsonl", TrainConfig(out="mine", steps=100))
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import Batch, Dataset, Example, batches
from ..errors import MiniloraError
from ..lora.variants.lora_plus import lora_plus
from ..memory import memory_bytes
from ..optim import AdamW, schedule
from ..step import MicroBatch, TrainStep
from ..tensor import no_grad
from .checks import (
    check_first_gradients,
    factor_of,
    first_non_finite,
    non_finite_tensor,
    pairs_that_start_at_zero,
    some_names,
)
from .config import TrainConfig
from .examples import Examples, examples_of
from .folder import CURVE, Folder, Place, check_folder, data_checksum, folder_for
from .plot import plot_losses
from .progress import Quiet, StepReport, choose, clock
from .settings import described, settings_text
from .table import summarise

if TYPE_CHECKING:
    from ..model import Model

SAMPLE_TOKENS = 40  # of each text that the model writes along the way
KEPT_BY_RESUME = ("seed", "batch_size", "packing")  # what decides the order of the data


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    steps: taken in all, those before a resume included. epochs: passes over the data. loss: the last step's, per label
    token. validation_loss: the last one measured; best_validation_loss, best_step: the lowest, and after which step.
    tokens: seen in training, padding not counted. seconds: spent in all. history: the records of metrics.jsonl that
    this call made. paths: what was written: "adapter", "model", "best", "metrics", "curve", "settings".
    """

    steps: int
    epochs: float
    loss: float
    validation_loss: float | None
    best_validation_loss: float | None
    best_step: int | None
    tokens: int
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)
    paths: dict[str, Path]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, after the step was finished and everything saved. result: the TrainResult up to there."""

    def __init__(self, result: TrainResult) -> None:
        super().__init__(f"interrupted after step {result.steps}")
        self.result = result


def train(
    model: Model,
    data: str | Path | Dataset | Sequence[Example],
    config: TrainConfig | None = None,
    *,
    valid: Sequence[Example] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    show: Quiet | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train what `model.parameters()` names: the selected adapter, and base parameters that were unfrozen.

    data: a .jsonl file or folder for `load_data`, a Dataset, or Examples; valid: Examples to validate on, instead of
    the data's own. resume: go on, to the same numbers, where the run in config.out stopped (the model must have the
    adapter that the run began with). overwrite: replace the run in config.out, which stays until this one's first save
    (see folder.py). quiet: print warnings only. show: is
    told of the progress, which is then not printed (see progress.py). settings: what to write down of model, data and
    adapter, instead of what can be told from the arguments.
    Ctrl-C finishes the step, saves, and raises TrainingInterrupted; a second one ends at once. A loss or gradient that
    is not finite is a MiniloraError that names the first such tensor, before anything is updated with it.
    """
    config = config or TrainConfig()
    if config.out is not None:
        check_folder(Path(config.out), resume, overwrite)
    elif resume or overwrite:
        raise MiniloraError("found resume or overwrite without out, expected the folder of the earlier run as out")
    show = choose(quiet) if show is None else show
    run = _Run(model, examples_of(model, data, valid, config, show), config, show)
    try:
        if run.folder is not None:
            if resume:
                run.resume(run.folder)
            elif run.folder.begin():
                show.line(f"the earlier run stays until the first save; until then this one is in {run.folder.path}")
            run.folder.write_settings(settings_text({**(settings or described(model, data)), **asdict(run.config)}))
        show.line(summarise(model).text())
        interrupted = run.run()
    finally:
        show.close()
        if run.folder is not None:
            run.folder.leave()
    result = run.result()
    show.line(run.account(interrupted))
    if interrupted:
        raise TrainingInterrupted(result)
    return result


def evaluate(
    model: Model,
    examples: Sequence[Example],
    batch_size: int = 8,
    packing: bool = False,
    max_length: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> float:
    """The mean cross-entropy (nats) per label token of all examples, under the adapters that are selected.

    Every token weighs the same, whatever batch it is in. `stopped` is asked before each batch; NaN if it says so.
    """
    total, count = 0.0, 0
    with no_grad():
        for batch in batches(examples, batch_size, shuffle=False, packing=packing, max_length=max_length):
            if stopped():
                return math.nan
            total += float(model.loss(batch.tokens, batch.labels, batch.segments, normaliser=1.0))
            count += batch.label_count
    return total / count


# --- one run --------------------------------------------------------------------------------------------------------


class _Run:
    """A run in progress: its parts, its place, and what happens around each step."""

    def __init__(self, model: Model, examples: Examples, config: TrainConfig, show: Quiet) -> None:
        self.model, self.examples, self.show = model, examples, show
        per_epoch = math.ceil(len(examples.plan(config, 0)) / config.accumulate)
        epochs = None if config.steps is not None else config.epochs or 1
        self.config = config = config.with_changes(epochs=epochs, max_length=examples.max_length)
        self.total = config.steps if config.steps is not None else per_epoch * (epochs or 1)
        self.factor = schedule(config.schedule, self.total, config.warmup_steps(self.total))
        trained = model.parameters()
        scale = None if config.lora_plus_ratio is None else lora_plus(trained, config.lora_plus_ratio)
        self.optimiser = AdamW(trained, config.lr, config.betas, config.eps, config.weight_decay, scale)
        self.step = TrainStep(model, self.optimiser, config.max_grad_norm)
        self.place = Place(data=data_checksum(examples.train))
        self.folder = None if config.out is None else folder_for(Path(config.out), model, trained)
        self.begun, self.before = time.monotonic(), 0.0
        self.valid_loss: float | None = None
        self.history: list[dict[str, Any]] = []

    def run(self) -> bool:
        """All steps that are left, and what comes after them; whether Ctrl-C ended it early."""
        config, place, folder = self.config, self.place, self.folder
        self.begun, self.before = time.monotonic(), place.seconds
        self.show.start(place.step, self.total)
        with _interruptible() as stop, _checkpointing(self.model, config.checkpoint), _without_numpy_warnings():
            if place.step == 0 and (config.eval_every or config.sample_prompt):
                first = self.with_samples({"step": 0, "epoch": 0.0, "tokens": 0})
                if config.eval_every:
                    self.validate(first, stop)
                else:
                    self.record(first)
            for epoch, index, of, group in self.groups():
                metrics = self.one_step(group)
                place.step, place.epoch, place.index = place.step + 1, epoch, index
                metrics = self.with_samples({"step": place.step, "epoch": round(epoch + index / of, 6), **metrics})
                last = place.step == self.total
                due = last or (config.eval_every is not None and place.step % config.eval_every == 0)
                if due and self.examples.valid and not stop.asked:
                    self.validate(metrics, stop)
                else:
                    self.record(metrics)
                if folder and config.save_every and place.step % config.save_every == 0 and not last:
                    self.save(config.keep)
                if last or stop.asked:
                    break
        if folder is not None:
            if folder.last_saved != place.step:
                self.save()
            self.draw(folder)
        return stop.asked

    def resume(self, folder: Folder) -> None:
        """Go to where the run in the folder stopped."""
        expected = {name: getattr(self.config, name) for name in KEPT_BY_RESUME}
        self.place = folder.restore(self.optimiser, expected, self.place.data, self.total)
        self.show.line(f"resumed after step {self.place.step:,}")

    def groups(self) -> Iterator[tuple[int, int, int, list[Batch]]]:
        """Without end: (epoch, batches of it that are then used, of how many, the batches of one step).

        A step never reaches over the end of an epoch: the last one may have fewer batches.
        """
        epoch, index = self.place.epoch, self.place.index
        while True:
            plan = self.examples.plan(self.config, epoch)
            while index < len(plan):
                stop = min(index + self.config.accumulate, len(plan))
                yield epoch, stop, len(plan), [plan[k] for k in range(index, stop)]
                index = stop
            epoch, index = epoch + 1, 0

    def one_step(self, group: Sequence[Batch]) -> dict[str, Any]:
        """One optimiser step; its metrics. Raises MiniloraError before the update if a check fails."""
        begun = time.perf_counter()
        micro_batches = [MicroBatch(batch.tokens, batch.labels, batch.segments) for batch in group]
        training_pass = self.model.training_pass
        self.optimiser.lr = self.config.lr * self.factor(self.place.step)
        pairs = pairs_that_start_at_zero(self.optimiser.parameters) if self.place.step == 0 else []
        loss = float(self.step.gradients(micro_batches))
        norm = float(self.step.clip()) if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            self.model.training_pass = training_pass  # so that dropout draws the same masks again
            self.stop_at_non_finite(loss, lambda: self.step.gradients(micro_batches))
        if silent := check_first_gradients(self.optimiser.parameters, pairs):
            factors = " or ".join(sorted({factor_of(zero) for _, zero in pairs}, reverse=True))
            self.show.warn(
                f"the gradient of {len(silent)} of {len(pairs)} {factors} is all zero in the first step, so these "
                f"layers do not reach the loss, or see only zeros: {some_names(silent)}"
            )
        self.optimiser.step()
        seconds = time.perf_counter() - begun
        tokens = sum(round(batch.tokens.size * (1 - batch.padding_share)) for batch in group)
        self.place.tokens += tokens
        self.place.training_pass = self.model.training_pass
        report = StepReport(
            self.place.step + 1, loss, tokens / seconds, memory_bytes(self.model.device), self.valid_loss
        )
        self.show.step(report)
        return {
            "loss": loss,
            "lr": self.optimiser.lr,
            "grad_norm": norm,
            "tokens": self.place.tokens,
            "tokens_per_second": round(report.tokens_per_second, 1),
            "memory": report.memory,
        }

    def stop_at_non_finite(self, loss: float, replay: Callable[[], object]) -> None:
        found = (
            f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g} and its gradient not finite"
        )
        where = first_non_finite(self.model, replay)
        saved = self.folder.last_saved if self.folder is not None else None
        kept = f"; {self.config.out} holds what was saved after step {saved:,}" if saved else ""
        raise MiniloraError(
            f"{found} in step {self.place.step + 1:,}, which was not applied. First non-finite tensor: {where}{kept}"
        )

    def validate(self, metrics: dict[str, Any], stop: _Stop) -> None:
        """Measure the validation loss, record it with the metrics, and save what is trained if it is the best."""
        config = self.config
        loss = evaluate(
            self.model, self.examples.valid, config.batch_size, config.packing, config.max_length, lambda: stop.asked
        )
        if math.isnan(loss) and stop.asked:
            self.record(metrics)
            return
        if not math.isfinite(loss):
            raise MiniloraError(f"the validation loss is {loss} after step {self.place.step:,}: lower lr")
        self.valid_loss = loss
        is_best = self.place.step > 0 and (self.place.best_loss is None or loss < self.place.best_loss)
        if is_best:
            self.place.best_loss, self.place.best_step = loss, self.place.step
            if self.folder is not None:
                self.folder.save_best()
        self.record({**metrics, "validation_loss": loss})
        self.show.line(f"step {self.place.step:,}: validation loss {loss:.4f}{' (best so far)' if is_best else ''}")

    def with_samples(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics and, where they are due, what the model makes of each prompt now: {prompt: text}."""
        if not self.config.samples_due(self.place.step, self.total):
            return metrics
        samples = {prompt: self.model.generate(prompt, SAMPLE_TOKENS) for prompt in self.config.sample_prompt}
        for prompt, text in samples.items():
            self.show.line(f"step {self.place.step:,}: {' '.join((prompt + text).split())}")
        return {**metrics, "samples": samples}

    def record(self, metrics: dict[str, Any]) -> None:
        self.history.append(metrics)
        if self.folder is not None:
            self.folder.record(metrics)

    def save(self, keep: int = 0) -> None:
        assert self.folder is not None
        if fault := non_finite_tensor(self.optimiser.parameters):
            raise MiniloraError(f"step {self.place.step:,} made {fault} not finite, so it is not saved: lower lr")
        self.place.seconds = self.before + time.monotonic() - self.begun
        config = {**asdict(self.config), "out": str(self.config.out)}
        self.folder.save(self.place, self.optimiser, config, keep)

    def draw(self, folder: Folder) -> None:
        try:
            plot_losses(folder.records(), folder.path / CURVE)
        except ImportError:
            self.show.line("no loss curve: matplotlib is not installed (pip install 'minilora[plot]')")

    def result(self) -> TrainResult:
        place = self.place
        place.seconds = self.before + time.monotonic() - self.begun
        steps = [record for record in self.history if "loss" in record]
        return TrainResult(
            steps=place.step,
            epochs=steps[-1]["epoch"],
            loss=steps[-1]["loss"],
            validation_loss=self.valid_loss,
            best_validation_loss=place.best_loss,
            best_step=place.best_step,
            tokens=place.tokens,
            seconds=place.seconds,
            history=self.history,
            paths={} if self.folder is None else self.folder.paths(),
        )

    def account(self, interrupted: bool) -> str:
        """The last line that is shown."""
        result = self.result()
        parts = [f"{'stopped' if interrupted else 'done'} after step {result.steps:,} in {clock(result.seconds)}"]
        parts.append(f"{result.tokens:,} tokens, loss {result.loss:.4f}")
        if result.best_step is not None:
            where = f", in {result.paths['best']}" if "best" in result.paths else ""
            parts.append(
                f"lowest validation loss {result.best_validation_loss:.4f} after step {result.best_step:,}{where}"
            )
        if self.folder is not None:
            parts.append(f"saved in {self.folder.path}{' (--resume goes on)' if result.steps < self.total else ''}")
        return "; ".join(parts)


class _Stop:
    """Whether Ctrl-C was pressed."""

    asked = False


@contextmanager
def _interruptible() -> Iterator[_Stop]:
    """Inside, the first Ctrl-C only sets `asked`; the second one does what Ctrl-C did before."""
    stop = _Stop()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield stop
        return

    def handler(number: int, frame: object) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, before)
        # Not print: it cannot be entered again, and may be what was interrupted.
        os.write(2, b"\ninterrupted: finishing this step, then saving; Ctrl-C again stops at once, without saving\n")

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _checkpointing(model: Model, wanted: bool) -> Iterator[None]:
    before = model.checkpoint
    model.checkpoint = before or wanted
    try:
        yield
    finally:
        model.checkpoint = before


@contextmanager
def _without_numpy_warnings() -> Iterator[None]:
    """What NumPy would warn of ends in a loss or a norm that is not finite, and those are looked at.

    Not numpy.errstate: that is of one thread, and kernels compute in several.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="minilora")
        yield
