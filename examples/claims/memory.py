"""Training takes a fraction of the memory

Claim. Frozen weights need neither gradients nor optimiser states, so that training with Adam takes much less memory: up
to two thirds less (Hu et al. 2021, section 4.2, on benefits and limitations).

Measured. Two steps of AdamW in float32 on one row of 128 tokens, each way in a process of its own: full fine-tuning,
LoRA of rank 8 on all linear layers and on q and v, and a forward pass alone, below which no training can come. The peak
is the process's largest resident set, less what Python and NumPy had before the model was loaded (on a GPU: what CuPy's
pool holds); the bytes of gradients and of Adam's two moments are counted, array by array. One short row, because
activations take the same either way: the longer the rows, the less of the whole LoRA can save.

Refuted. The first half: if gradients and moments together are not exactly 12 bytes for each trained parameter, and none
for the rest. The second: if the peak of LoRA on q and v is over half of full fine-tuning's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from minilora.errors import MiniloraError
from minilora.memory import memory_bytes, peak_memory_bytes

from .common import Base, Verdict, both, load, median, table
from .picture import COLOURS, Figure, save

HALF, BYTES = 0.5, 12  # of a float32 gradient and two moments
ROOT = Path(__file__).parents[2]
WAYS: dict[str, dict[str, Any] | str] = {
    "full fine-tuning": "full",
    "LoRA, all linear": {"r": 8},
    "LoRA, q and v": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "forward pass only": "forward",
}


def measure(
    base: Base, ways: Mapping[str, dict[str, Any] | str] = WAYS, tokens: int = 128, repeat: int = 3
) -> dict[str, Any]:
    """{"parameters": of the base, "ways": {way: bytes of the peak (median) and of each part, counted}}."""
    found = {}
    for name, way in ways.items():
        times = repeat if base.device == "cpu" else 1  # what CuPy's pool asks for is the same each time
        runs = [in_a_process(base, way, tokens) for _ in range(times)]
        found[name] = {**runs[0], "peak": median(run["peak"] for run in runs)}
    return {"tokens": tokens, "parameters": runs[0]["base"], "ways": found}


def in_a_process(base: Base, way: dict[str, Any] | str, tokens: int) -> dict[str, int]:
    """`two_steps` in a fresh Python."""
    code = (
        "import json, sys; from examples.claims.memory import two_steps; "
        "print(json.dumps(two_steps(*json.loads(sys.argv[1]))))"
    )
    places = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([base.name, base.device, way, tokens])],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    if done.returncode:
        raise MiniloraError(f"training {way} in a process of its own failed: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


def two_steps(name: str, device: str, way: dict[str, Any] | str, tokens: int) -> dict[str, int]:
    """Bytes of the peak beyond what was there before, of gradients and of moments; parameters trained and in all."""
    np.ones((1024, 1024), np.float32) @ np.ones((1024, 1024), np.float32)  # what the BLAS keeps for itself
    before = memory_bytes() if device == "cpu" else 0
    base = load(Base(name, device))
    count = sum(parameter.size for _, parameter in base.network.named_parameters())
    row = np.random.default_rng(0).integers(0, base.config.vocab_size, (1, tokens))
    if way == "forward":
        with ml.no_grad():
            float(base.loss(row))
        return {"peak": peak_bytes(device) - before, "gradients": 0, "moments": 0, "trained": 0, "base": count}
    if isinstance(way, dict):
        base.add_adapter("a", ml.LoraConfig(**way))
    else:
        base.unfreeze(".*")
    parameters = base.parameters()
    optimiser = ml.AdamW(parameters, lr=1e-4)
    step = ml.TrainStep(base, optimiser)
    for _ in range(2):
        step(row)
    everything = [parameter for _, parameter in base.network.named_parameters()] + list(parameters.values())
    gradients = {id(tensor): tensor.grad.nbytes for tensor in everything if tensor.grad is not None}
    return {
        "peak": peak_bytes(device) - before,
        "gradients": sum(gradients.values()),
        "moments": optimiser.state_bytes(),
        "trained": sum(parameter.size for parameter in parameters.values()),
        "base": count,
    }


def peak_bytes(device: str) -> int:
    """The largest resident set of this program; on a GPU what CuPy's pool has asked for, which never shrinks here."""
    return peak_memory_bytes() if device == "cpu" else memory_bytes(device)


def verdict(results: dict[str, Any]) -> Verdict:
    ways = results["ways"]
    exact = all(way["gradients"] + way["moments"] == BYTES * way["trained"] for way in ways.values())
    full, lora = ways["full fine-tuning"]["peak"], ways["LoRA, q and v"]["peak"]
    return Verdict(
        both(exact, lora <= HALF * full),
        f"gradients and moments are {'' if exact else 'not '}exactly {BYTES} bytes for each trained parameter; the "
        f"peak with LoRA on q and v is {lora / full:.0%} of full fine-tuning's (asked: at most {HALF:.0%}; the paper: "
        "down to 33%)",
    )


def rows(results: dict[str, Any]) -> str:
    return table(
        ["", "trained parameters", "gradients, MB", "moments, MB", "peak, MB", "of full fine-tuning's"],
        [
            [
                name,
                f"{way['trained']:,}",
                *(f"{way[part] / 1e6:,.2f}" for part in ("gradients", "moments")),
                f"{way['peak'] / 1e6:,.0f}",
                f"{way['peak'] / results['ways']['full fine-tuning']['peak']:.0%}",
            ]
            for name, way in results["ways"].items()
        ],
    )


def draw(results: dict[str, Any], path: Path) -> None:
    figure = Figure("peak of the process beyond Python and NumPy (MB)", "")
    weights = 4 * results["parameters"] / 1e6
    for place, way in enumerate(reversed(results["ways"].values())):
        left = 0.0
        parts = {"weights of the base": weights, "gradients": way["gradients"] / 1e6, "moments": way["moments"] / 1e6}
        parts["all else: activations, buffers"] = max(0.0, way["peak"] / 1e6 - sum(parts.values()))
        for number, (name, size) in enumerate(parts.items()):
            colour = COLOURS[(0, 1, 4, 7)[number]]
            figure.axis.barh(place, size, left=left, color=colour, label=name if place == 0 else None, height=0.6)
            left += size
    figure.axis.set_yticks(range(len(results["ways"])), list(reversed(results["ways"])))
    save(figure, path)
