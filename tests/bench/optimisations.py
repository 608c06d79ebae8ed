"""What the training step costs without each optimisation: switched off one at a time, A B A B in one process.

A kernel is switched off by taking it away from its primitive, which then runs its definition; what is no kernel of its
own is switched off by a constant or a function in its place. Times are of SmolLM2, rank 8 on all linears, 4 × 256.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.kernels.cpu import attention, elementwise, linear, loss, memory, rotary, small, threads
from minilora.tensor import PRIMITIVES

from .ours import train

BATCH, LENGTH = 4, 256


@dataclass(frozen=True)
class Optimisation:
    """name: as the table calls it. where: its file. without: a context in which it is switched off."""

    name: str
    where: str
    without: Callable[[], Any]


@contextmanager
def no_kernels(*names: str) -> Iterator[None]:
    """Inside, these primitives run their definitions."""
    kept = {name: PRIMITIVES[name].kernels for name in names}
    for name in names:
        PRIMITIVES[name].kernels = [kernel for kernel in kept[name] if kernel.device != "cpu"]
    try:
        yield
    finally:
        for name, kernels in kept.items():
            PRIMITIVES[name].kernels = kernels


@contextmanager
def replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, module.name is another value, for each (module, name, value)."""
    kept = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, kept, strict=True):
            setattr(module, name, value)


def in_turn(tasks: Any) -> None:
    """`run_all` on one thread, the BLAS on its own."""
    for task in tasks:
        task()


OPTIMISATIONS = (
    Optimisation(
        "rows over Python threads, one BLAS thread each (without: one block after another, the BLAS on all threads)",
        "kernels/cpu/threads.py",
        lambda: replaced(*((module, "run_all", in_turn) for module in (threads, linear, attention))),
    ),
    Optimisation(
        "linear layers with LoRA: skinny products in the cache, layers of one input together",
        "kernels/cpu/linear.py",
        lambda: no_kernels("lora_linear", "lora_linears"),
    ),
    Optimisation("layers of one input together only", "kernels/cpu/linear.py", lambda: no_kernels("lora_linears")),
    Optimisation(
        "attention in blocks of queries",
        "kernels/cpu/attention.py",
        lambda: no_kernels("attention"),
    ),
    Optimisation(
        "attention's products in parts that OpenBLAS does not pack (without: in one)",
        "kernels/cpu/small.py",
        lambda: replaced((small, "SMALL", 1 << 62)),
    ),
    Optimisation(
        "head and cross-entropy in tiles of the vocabulary",
        "kernels/cpu/loss.py",
        lambda: no_kernels("linear_cross_entropy"),
    ),
    Optimisation("SwiGLU in place, in row blocks", "kernels/cpu/elementwise.py", lambda: no_kernels("silu_mul")),
    Optimisation(
        "residual stream and norm in one pass",
        "kernels/cpu/elementwise.py",
        lambda: no_kernels("add_rms_norm", "rms_norm"),
    ),
    Optimisation("rotation in three passes", "kernels/cpu/rotary.py", lambda: no_kernels("rotary")),
    Optimisation(
        "buffers used again (without: the system's, page by page)",
        "kernels/cpu/memory.py",
        lambda: replaced((memory, "SMALLEST", 1 << 62)),
    ),
    Optimisation(
        "blocks of 2¹⁸ entries (without: 2¹⁶, which fit the second-level cache but make threads wait for each other)",
        "kernels/cpu/elementwise.py, linear.py",
        lambda: replaced(
            (elementwise, "BLOCK_ENTRIES", 1 << 16),
            (rotary, "BLOCK_ENTRIES", 1 << 16),
            (loss, "BLOCK_ENTRIES", 1 << 16),
            (linear, "SKINNY_ENTRIES", 1 << 17),
        ),
    ),
)


def measure_all(file: Path, word: str, repeat: int) -> None:
    """Measure the optimisations that have `word` in their name or place, and put them into the JSON file."""
    step = train(BATCH, LENGTH).run
    step()

    def seconds() -> float:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    for optimisation in OPTIMISATIONS:
        if word not in f"{optimisation.name} {optimisation.where}":
            continue
        found: dict[str, Any] = {"where": f"`{optimisation.where}`", "with": [], "without": []}
        with optimisation.without():
            step()
        for _ in range(repeat):
            found["with"].append(seconds())
            with optimisation.without():
                found["without"].append(seconds())
        print(f"{optimisation.name}: {found['with']} with, {found['without']} without", flush=True)
        results = json.loads(file.read_text("utf-8")) if file.exists() else {"cases": {}}
        results.setdefault("optimisations", {})[optimisation.name] = found
        file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
