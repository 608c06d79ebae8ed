"""Training steps on one GPU beside torch + PEFT, eager and compiled: the same shapes, random weights, one run.

    python -m tests.bench.gpu                          every case and side (about 12 minutes on an H100)
    python -m tests.bench.gpu llama-7b smollm2         these cases
    python -m tests.bench.gpu --sides ours,eager       these sides
    python -m tests.bench.gpu --profile smollm2        our step by kernel
    python -m tests.bench.gpu --render                 docs/performance.md's table from docs/performance-gpu.json

All records of a run are of one commit and one card, and go to one file (--json docs/performance-gpu.json). The sides
come one after the other, ours first, each through all cases: a run that is cut off by --within has the first ones.

Each side of a case is a process of its own: its peak is the most that its arrays held. bfloat16 base, float32 adapters,
r = 8 on all seven linears (GPT-2: its four), AdamW, every token labelled. Times are medians of blocks of steps that
follow one another as in training, from when the GPU is idle to when it is idle again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-4
WARMUP, BLOCKS, STEPS = 4, 7, 4  # steps before; timed blocks; steps of a block


def llama(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
        "tie_word_embeddings": tied, "hidden_act": "silu",
    }  # fmt: skip


SHAPES = {
    "llama-7b": llama(4096, 11008, 32, 32, 32, 32000, False),
    "smollm2": llama(576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, 128256, True),
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768, "n_layer": 12,
        "n_head": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """limit, goal: seconds of our step; most: GiB of its peak. Both from the project's targets on an H100 80GB."""

    title: str
    shape: str
    batch: int
    length: int
    checkpoint: bool = False
    targets: tuple[str, ...] = ()  # all linears by default
    limit: float | None = None
    goal: float | None = None
    most: float | None = None
    sides: tuple[str, ...] = ("ours", "eager", "compiled", "eager-bf16", "compiled-bf16")


CASES = {
    "llama-7b": Case("Llama-7B, 1 × 2048", "llama-7b", 1, 2048, limit=0.125, goal=0.100, most=20),
    "llama-7b-checkpoint": Case(
        "Llama-7B, 1 × 2048, checkpointing", "llama-7b", 1, 2048, checkpoint=True, limit=0.170, most=14,
        sides=("ours", "eager", "eager-bf16"),
    ),
    "llama-7b-qv": Case(
        "Llama-7B, 1 × 2048, q and v only", "llama-7b", 1, 2048, targets=("q_proj", "v_proj"), sides=("ours", "eager")
    ),
    "llama-7b-512": Case("Llama-7B, 1 × 512", "llama-7b", 1, 512, sides=("ours", "eager")),
    "smollm2": Case("SmolLM2-135M, 8 × 512", "smollm2", 8, 512, limit=0.016, goal=0.011),
    "smollm2-256": Case(
        "SmolLM2-135M, 1 × 256", "smollm2", 1, 256, limit=0.008, goal=0.005, sides=("ours", "eager", "eager-bf16")
    ),
    "gpt2": Case("GPT-2 124M, 8 × 512", "gpt2", 8, 512, limit=0.008, goal=0.0055),
    "llama-1b-32k": Case(
        "Llama-3.2-1B, 1 × 32,768, checkpointing", "llama-3.2-1b", 1, 32768, checkpoint=True, most=24, sides=("ours",)
    ),
}  # fmt: skip


# --- sides, each run in a process of its own ------------------------------------------------------------------------


def measure(step: Callable[[], Any], wait: Callable[[], Any]) -> list[float]:
    """Seconds of a step, from each block."""
    for _ in range(WARMUP):
        step()
    wait()
    times = []
    for _ in range(BLOCKS):
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        times.append((time.perf_counter() - begun) / STEPS)
    return times


def our_model(case: Case) -> Any:
    """A network of the shape with random bfloat16 weights, made on the GPU."""
    import cupy

    from minilora.backend import activation_dtype, dtype_of, use_device
    from minilora.model import Model
    from minilora.models import family_of
    from minilora.nn import Weights

    use_device("cuda")
    dtype = dtype_of("bfloat16")
    cupy.random.seed(0)

    def source(name: str, shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return (cupy.zeros if name.endswith("bias") else cupy.ones)(shape, np.float32).astype(dtype)
        result = cupy.empty(shape, dtype)
        for start in range(0, shape[0], 4096):  # a part at a time: the float32 values are never all there
            part = result[start : start + 4096]
            part[...] = (cupy.random.standard_normal(part.shape, dtype=np.float32) * np.float32(0.02)).astype(dtype)
        return result

    raw = SHAPES[case.shape]
    family = family_of(raw)
    network = family.network(family.read_config(raw), Weights(source), activation_dtype(dtype, "cuda"))
    cupy.get_default_memory_pool().free_all_blocks()
    return Model(network, None)


class Allocated:
    """The most bytes that arrays of CuPy's have held at one time: what torch.cuda.max_memory_allocated counts."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def watched(self) -> Any:
        """A context in which allocations are counted. (A replayed recording makes none: it was counted when made.)"""
        import cupy

        outer = self

        class Hook(cupy.cuda.MemoryHook):
            name = "Allocated"

            def malloc_postprocess(self, **allocation: Any) -> None:
                outer.now += allocation["mem_size"]
                outer.peak = max(outer.peak, outer.now)

            def free_postprocess(self, **allocation: Any) -> None:
                outer.now -= allocation["mem_size"]

        return Hook()


def ours(case: Case, profile: bool = False) -> dict[str, Any]:
    memory = Allocated()
    with memory.watched():
        return timed_run(case, memory, profile)


def timed_run(case: Case, memory: Allocated, profile: bool) -> dict[str, Any]:
    import cupy

    import minilora as ml

    model = our_model(case)
    model.checkpoint = case.checkpoint
    model.add_adapter("a", ml.LoraConfig(r=RANK, alpha=ALPHA, target_modules=list(case.targets) or "all-linear"))
    step = ml.TrainStep(model, ml.AdamW(model.parameters(), lr=LEARNING_RATE))
    tokens = np.random.default_rng(0).integers(0, SHAPES[case.shape]["vocab_size"], (case.batch, case.length))
    losses = []
    if profile:
        return profiled(lambda: step(tokens))
    times = measure(lambda: losses.append(step(tokens)), cupy.cuda.Device().synchronize)
    reserved = cupy.get_default_memory_pool().total_bytes() + step.recorder.memory_bytes()
    return {
        "seconds": times, "peak_bytes": memory.peak, "reserved_bytes": reserved,
        "losses": [float(losses[0]), float(losses[-1])],
        "versions": f"CuPy {cupy.__version__}, minilora {ml.__version__}",
    }  # fmt: skip


def in_line(case: Case) -> dict[str, Any]:
    """Ours with every launch of a recorded step behind the one before: what kernels/cuda/branches.py is worth."""
    from minilora.kernels.cuda import branches

    branches.Fork.branch = lambda self, number: nullcontext()  # type: ignore[method-assign]
    return ours(case)


def profiled(step: Callable[[], Any], steps: int = 5) -> dict[str, Any]:
    """GPU time by kernel over some recorded steps, as the driver's own tracing has it (through torch.profiler)."""
    import cupy
    import torch

    for _ in range(WARMUP):
        step()
    cupy.cuda.Device().synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        cupy.cuda.Device().synchronize()
    rows = [(event.self_device_time_total / steps, event.count / steps, event.key) for event in profile.key_averages()]
    print(f"GPU time {sum(row[0] for row in rows) / 1000:.2f} ms a step", file=sys.stderr)
    for total, count, name in sorted(rows, reverse=True)[:45]:
        print(f"{total / 1000:9.3f} ms {count:7.1f} x {total / max(count, 1):8.1f} us  {name[:110]}", file=sys.stderr)
    return {}


def theirs(case: Case, compiled: bool, narrow: bool) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    raw = {key: value for key, value in SHAPES[case.shape].items() if key not in ("architectures", "model_type")}
    config = transformers.CONFIG_MAPPING[SHAPES[case.shape]["model_type"]](**raw)
    config._attn_implementation = "sdpa"
    config.use_cache = False
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    targets = list(case.targets) or (
        ["c_attn", "c_proj", "c_fc"]
        if case.shape == "gpt2"
        else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=case.shape == "gpt2"
    )
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=not narrow)
    if case.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    run = torch.compile(model) if compiled else model
    tokens = torch.randint(0, config.vocab_size, (case.batch, case.length), device="cuda")
    torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        run(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()

    times = measure(step, torch.cuda.synchronize)
    return {
        "seconds": times, "peak_bytes": torch.cuda.max_memory_allocated(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}",
    }  # fmt: skip


IN_LINE = "ours-in-line"  # measured where it is asked for
SIDES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "ours": ours,
    IN_LINE: in_line,
    "eager": lambda case: theirs(case, False, False),
    "compiled": lambda case: theirs(case, True, False),
    "eager-bf16": lambda case: theirs(case, False, True),
    "compiled-bf16": lambda case: theirs(case, True, True),
}


# --- the run ----------------------------------------------------------------------------------------------------------


def run_side(case: str, side: str, limit: float) -> dict[str, Any]:
    """The side's record from a fresh process, or {"failed": why}."""
    command = [sys.executable, "-m", "tests.bench.gpu", case, "--side", side]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {limit:.0f} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else str(done.returncode)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def line(name: str, side: str, record: dict[str, Any], case: Case, our_time: float | None) -> str:
    if "failed" in record:
        return f"{name:20} {side:14} failed: {record['failed']}"
    median = statistics.median(record["seconds"])
    spread = (max(record["seconds"]) - min(record["seconds"])) / median
    text = (
        f"{name:20} {side:14} {1000 * median:8.2f} ms  ±{50 * spread:4.1f} %  {record['peak_bytes'] / 2**30:6.2f} GiB"
    )
    if side == "ours":
        for what, bound in (("limit", case.limit), ("goal", case.goal)):
            text += "" if bound is None else f"  {what} {1000 * bound:.1f} {'met' if median <= bound else 'MISSED'}"
        if case.most is not None:
            text += f"  {case.most} GiB {'met' if record['peak_bytes'] <= case.most * 2**30 else 'MISSED'}"
    elif our_time:
        text += f"  ours / this {our_time / median:.3f}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--sides", default="", help="of " + ", ".join(SIDES))
    parser.add_argument("--side", help="measure this side of the one case in this process, and print its record")
    parser.add_argument("--profile", action="store_true", help="our step of each case by kernel")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a side may take")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds that all of it may take")
    parser.add_argument("--json", type=Path, help="write all records to this file")
    parser.add_argument("--commit", default="", help="what was measured, for the record (default: what git says)")
    parser.add_argument("--render", action="store_true", help="write docs/performance.md's table")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](CASES[options.cases[0]])))
        return 0
    if options.profile:
        for name in options.cases:
            print(name, file=sys.stderr)
            ours(CASES[name], profile=True)
        return 0
    if options.render:
        render(json.loads(RESULTS.read_text(encoding="utf-8")))
        return 0
    end = time.monotonic() + options.within
    result: dict[str, Any] = {"card": card(), "commit": options.commit or commit(), "cases": {}}
    for side in options.sides.split(",") if options.sides else [side for side in SIDES if side != IN_LINE]:
        for name in options.cases:
            left = min(options.limit, end - time.monotonic())
            if side not in (*CASES[name].sides, IN_LINE) or left < LEAST:
                continue
            sides = result["cases"].setdefault(name, {})
            sides[side] = run_side(name, side, left)
            own = sides.get("ours", {}).get("seconds")
            print(line(name, side, sides[side], CASES[name], statistics.median(own) if own else None), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result["card"], result["commit"])
    return 0


LEAST = 10  # seconds: a side that has less left is not begun


# --- docs/performance.md ----------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "performance-gpu.json", DOCS / "performance.md"
MARKED = re.compile(r"(<!-- gpu -->\n).*?(<!-- /gpu -->)", re.DOTALL)


def render(result: dict[str, Any]) -> None:
    """Write the table of a run between the page's markers."""
    page = PAGE.read_text(encoding="utf-8")
    assert MARKED.search(page), f"{PAGE.name} has no <!-- gpu --> … <!-- /gpu -->"
    PAGE.write_text(MARKED.sub(lambda marks: marks[1] + tables(result) + marks[2], page), encoding="utf-8")


def tables(result: dict[str, Any]) -> str:
    """The run as Markdown: what it was measured on, a row for each case, and what failed."""
    measured = [
        side for side in SIDES_OF_TORCH if any("seconds" in sides.get(side, {}) for sides in result["cases"].values())
    ]
    of_torch = [SIDES_OF_TORCH[side] for side in measured]
    heads = ["model, batch × length", "minilora", *of_torch, "share of the fastest", "target"]
    rows, failures, versions = [], [], set()
    for name, sides in result["cases"].items():
        case = CASES[name]
        found = {side: record for side, record in sides.items() if "seconds" in record}
        failures += [f"{case.title}, {side}: {sides[side]['failed']}" for side in sides if side not in found]
        versions |= {record["versions"] for record in found.values()}
        if "ours" not in found:
            continue
        median = {side: statistics.median(record["seconds"]) for side, record in found.items()}
        fastest = min((seconds for side, seconds in median.items() if side in SIDES_OF_TORCH), default=None)
        share = "" if fastest is None else f"{median['ours'] / fastest:.2f}"
        cells = [amount(median[side], found[side]) if side in found else "" for side in ("ours", *measured)]
        rows.append([case.title, *cells, share, verdict(case, median["ours"], found["ours"]["peak_bytes"])])
    where = f"{result['card']}; {'; '.join(sorted(versions))}; all of commit {result['commit'] or 'unknown'}, one run."
    table = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]
    text = "\n".join([where, "", *table])
    return text + "\n" + "".join(f"\nNot measured: {failure}.\n" for failure in failures)


SIDES_OF_TORCH = {
    "eager": "torch + PEFT", "compiled": "compiled", "eager-bf16": "bfloat16 adapters",
    "compiled-bf16": "compiled, bfloat16 adapters",
}  # fmt: skip
NOISY = 5  # per cent that blocks of steps lie around the median, from which on the table says so


def amount(seconds: float, record: dict[str, Any]) -> str:
    time_text = f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
    noise = 50 * (max(record["seconds"]) - min(record["seconds"])) / seconds
    noise_text = f" ± {noise:.0f} %" if noise >= NOISY else ""
    return f"{time_text}{noise_text}, {record['peak_bytes'] / 2**30:.1f}"


def verdict(case: Case, seconds: float, peak: int) -> str:
    """The case's targets, and whether they were met."""
    said = []
    for what, bound in (("", case.limit), ("goal ", case.goal)):
        if bound is not None:
            said.append(f"{what}{1000 * bound:g} ms: {'met' if seconds <= bound else 'missed'}")
    if case.most is not None:
        said.append(f"{case.most:g} GiB: {'met' if peak <= case.most * 2**30 else 'missed'}")
    return "; ".join(said)


def commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty where there is no git."""
    answers = [
        subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "minilora"])
    ]
    return answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")


def card() -> str:
    names = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(names, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
