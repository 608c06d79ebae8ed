"""Planted bugs around the engine: data, the loop and its folder, plans, reports, the demo, formats."""

from __future__ import annotations

from .mutant import Mutant

BATCHING = ("tests/data/test_batching.py",)
ROWS = ("tests/data",)
LOOP = ("tests/train/test_loop.py", "tests/train/test_checks.py", "tests/train/test_samples.py")
RESUME = ("tests/train/test_resume.py",)
CONFIG = ("tests/train/test_config.py", "tests/train/test_settings.py")
PLAN = ("tests/plan/test_plan.py", "tests/plan/test_rules.py")
STEP = ("tests/plan/test_memory.py::test_the_adapter_is_the_one_that_a_model_gets",)
REPORT = ("tests/report", "tests/cli/test_report.py")
SPECTRUM = ("tests/cli/test_spectrum.py",)
DEMO = ("tests/demo/test_demo.py",)

SURROUNDINGS = [
    # --- data
    Mutant(
        "data/batching.py",
        "segments[row, start:stop] = segment",
        "segments[row, start:stop] = 1",
        "packing: documents of a row see each other",
        BATCHING,
    ),
    Mutant(
        "data/batching.py",
        "labels[row, start + 1 : stop] = example.labels[1:]",
        "labels[row, start:stop] = example.labels",
        "packing: a document's first token is learned from the one before",
        BATCHING,
    ),
    Mutant(
        "data/batching.py",
        "np.random.default_rng([seed, epoch])",
        "np.random.default_rng(seed)",
        "batches: every epoch has the order of the first",
        BATCHING,
    ),
    Mutant(
        "data/encoding.py",
        "np.count_nonzero(self.labels[1:] != IGNORED)",
        "np.count_nonzero(self.labels != IGNORED)",
        "data: a first label counts that nothing predicts",
        ROWS,
    ),
    Mutant(
        "data/rows.py",
        "enumerate(file, start=1)",
        "enumerate(file)",
        "data: lines of a file are counted from 0 in errors",
        ROWS,
    ),
    # --- training
    Mutant(
        "train/loop.py",
        "return total / count",
        "return total / len(examples)",
        "validation: the loss is divided by rows, not label tokens",
        LOOP,
    ),
    Mutant(
        "train/loop.py",
        "loss < self.place.best_loss",
        "loss > self.place.best_loss",
        "validation: the worst adapter is kept as the best",
        LOOP + RESUME,
    ),
    Mutant(
        "train/loop.py",
        "self.place.training_pass = self.model.training_pass",
        "self.place.training_pass = 0",
        "resume: dropout draws the masks of the beginning again",
        RESUME,
    ),
    Mutant(
        "train/loop.py",
        "epoch, index = epoch + 1, 0",
        "epoch, index = epoch + 1, index - len(plan) + 1",
        "loop: each epoch but the first leaves out its first batch",
        LOOP + RESUME,
    ),
    Mutant(
        "train/folder.py",
        'if record["step"] <= place.step',
        'if record["step"] < place.step',
        "resume: the last step's metrics are lost",
        RESUME,
    ),
    Mutant(
        "train/folder.py",
        "for old in self._checkpoints()[:-keep]:",
        "for old in self._checkpoints()[keep:]:",
        "checkpoints: the latest are removed and not the earliest",
        (*RESUME, *LOOP, "tests/cli/test_train.py"),
    ),
    Mutant(
        "train/folder.py",
        "self.taking_place = True\n        _remove(self.home / STATE)",
        "self.taking_place = True",
        "overwrite: a crash leaves the new run's files with the earlier run's state",
        RESUME,
    ),
    Mutant(
        "train/folder.py",
        "        _remove(self.home / ADAPTER[1])\n",
        "",
        "overwrite: a crash leaves the earlier run's matrices under the new configuration",
        RESUME,
    ),
    Mutant(
        "train/folder.py",
        "if self.path != self.home and not self.taking_place:",
        "if self.path != self.home:",
        "overwrite: an error on the way removes the new run after the earlier one",
        RESUME,
    ),
    Mutant(
        "train/config.py",
        "round(self.warmup * total)",
        "round(self.warmup)",
        "warmup: a fraction of the steps is taken for a number of them",
        CONFIG + LOOP,
    ),
    Mutant(
        "train/settings.py",
        'if values.get("max_grad_norm") == 0:',
        'if values.get("max_grad_norm") == -1:',
        "settings: max_grad_norm = 0 is no longer no clipping",
        (*CONFIG, "tests/cli/test_train.py"),
    ),
    # --- plans
    Mutant(
        "plan/memory.py",
        "if parameter.requires_grad}",
        "if parameter.size}",
        "plan: LoRA-FA's frozen A has gradients and moments",
        STEP,
    ),
    Mutant(
        "plan/memory.py",
        "adapter=0 if lora is None else _bytes(saved)",
        "adapter=0 if lora is None else _bytes(trained)",
        "plan: LoRA-FA's frozen A takes no memory",
        STEP,
    ),
    Mutant(
        "plan/machines.py",
        "return self.memory * GIB - CUDA_CONTEXT",
        "return self.memory * GIB",
        "plan: nothing of a card is left to its driver",
        PLAN,
    ),
    Mutant(
        "plan/plan.py",
        "self.memory.peak + mapped <= machine.usable",
        "self.memory.peak <= machine.usable",
        "plan: a mapped file takes no memory",
        PLAN,
    ),
    Mutant(
        "plan/rules.py",
        "kept = (norm, factor, z if needs[1] else None)",
        "kept = (norm, factor, None)",
        "plan: DoRA keeps nothing for its magnitudes",
        PLAN,
    ),
    # --- reports
    Mutant(
        "report/charts.py",
        "ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}",
        "ends = {stretch[0], stretch[-1]}",
        "chart: a spike between two points of a long line is lost",
        REPORT,
    ),
    Mutant(
        "report/charts.py",
        "value = math.log10(value)",
        "value = math.log(value)",
        "chart: a logarithmic axis puts values in the wrong place",
        REPORT,
    ),
    Mutant(
        "report/page.py",
        "best = min(range(len(measured[1])), key=lambda index: measured[1][index])",
        "best = len(measured[1]) - 1",
        "report: the last validation loss is called the lowest",
        REPORT,
    ),
    Mutant(
        "report/page.py",
        "[value / 1e9 for value in memory[1]]",
        "[value / 1e6 for value in memory[1]]",
        "report: megabytes are called GB",
        REPORT,
    ),
    Mutant(
        "report/page.py",
        "(after - before) / speed",
        "after / speed",
        "report: the time of a step counts all tokens so far",
        REPORT,
    ),
    Mutant(
        "report/spectrum.py",
        "return max(self.left.shape) / self.shape[0], max(self.right.shape) / self.shape[1]",
        "return max(self.left.shape) / self.shape[1], max(self.right.shape) / self.shape[0]",
        "spectrum: the widths of in and out are exchanged for chance",
        SPECTRUM + REPORT,
    ),
    # --- the demo
    Mutant(
        "demo/results.py",
        "not merged.difference <= MOST_ROUNDING * merged.scale",
        "merged.difference > MOST_ROUNDING * merged.scale",
        "demo: logits that are not a number pass for rounding",
        DEMO,
    ),
    Mutant(
        "demo/tasks.py",
        "return rows[100:], rows[:100]",
        "return rows, rows[:100]",
        "demo: the dates that are counted were learned",
        DEMO,
    ),
    Mutant(
        "demo/tasks.py",
        "return found[held_back:], found[:held_back]",
        "return found, found[:held_back]",
        "demo: texts validate that were learned",
        DEMO,
    ),
    # --- formats
    Mutant(
        "formats/mlx.py",
        "return blocks - first, sorted(same) + others",
        "return blocks, sorted(same) + others",
        "mlx: layers of the last blocks are looked for in all",
        ("tests/formats/test_mlx.py",),
    ),
    Mutant(
        "formats/gguf_write.py",
        "return matrices if shape[-1] %",
        "return matrices if shape[0] %",
        "GGUF: whether a row fits into blocks is asked of the column",
        ("tests/formats/test_gguf_write.py",),
    ),
]
