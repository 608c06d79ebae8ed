"""What is measured: each case, the sides that take part in it, and the targets that its ratios are held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OURS = "minilora"
SDPA = "torch + PEFT"  # its default attention
EAGER = "torch + PEFT, eager attention"


@dataclass(frozen=True)
class Side:
    """One side of a case: `job` is a function of ours.py or theirs.py, called with `options`."""

    name: str
    program: str  # "ours" or "theirs"
    job: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The first side's `quantity` as a share of side `against`'s; without `against`, in the quantity's own unit."""

    quantity: str  # "seconds" or "peak_bytes"
    limit: float
    against: str | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Case:
    """tokens: what one run of a side processes, for tokens/s. fresh: every repetition is a new process.

    group: the table that it stands in. calls: how often the job is called for one time, where a call is short.
    """

    name: str
    title: str
    group: str
    sides: tuple[Side, ...]
    targets: tuple[Target, ...] = ()
    tokens: int | None = None
    repeat: int = 3
    fresh: bool = False
    calls: int = 1


def training(
    name: str, title: str, batch: int, length: int, targets: tuple[Target, ...], eager: bool = False, **options: Any
) -> Case:
    options = {"batch": batch, "length": length, **options}
    sides = [Side(OURS, "ours", "train", options), Side(SDPA, "theirs", "train", options)]
    if eager:
        sides.append(Side(EAGER, "theirs", "train", {**options, "attention": "eager"}))
    return Case(name, title, "training", tuple(sides), targets, batch * length)


def both(job: str, **options: Any) -> tuple[Side, ...]:
    return Side(OURS, "ours", job, options), Side(SDPA, "theirs", job, options)


MEMORY = Target("peak_bytes", 0.45, SDPA)
SINGLE, MIXED = "one adapter", "four adapters"
STORED = "activations kept"
GGUF, MAPPED = "GGUF", "float32 safetensors, mapped"

CASES = {
    case.name: case
    for case in (
        training(
            "train-4x256",
            "all seven linears, 4 × 256",
            4,
            256,
            (
                Target("seconds", 0.72, SDPA, 0.66),
                Target("seconds", 0.82, EAGER, 0.75),
                Target("peak_bytes", 0.45, SDPA, 0.35),
            ),
            eager=True,
        ),
        training(
            "train-1x512",
            "all seven linears, 1 × 512",
            1,
            512,
            (Target("seconds", 0.75, SDPA), MEMORY),
            eager=True,
        ),
        training(
            "train-qv",
            "q and v only, 4 × 256",
            4,
            256,
            (Target("seconds", 0.80, SDPA), MEMORY),
            linears=["q_proj", "v_proj"],
        ),
        training(
            "train-labels",
            "30 % of the tokens labelled, 4 × 256",
            4,
            256,
            (Target("seconds", 0.65, SDPA), MEMORY),
            labelled=0.3,
        ),
        training(
            "train-checkpoint",
            "checkpointing on both sides, 4 × 256",
            4,
            256,
            (MEMORY,),
            checkpoint=True,
        ),
        Case(
            "checkpoint-cost",
            "checkpointing, against our own step, 4 × 256",
            "training",
            (
                Side(OURS, "ours", "train", {"batch": 4, "length": 256, "checkpoint": True}),
                Side(STORED, "ours", "train", {"batch": 4, "length": 256}),
            ),
            (Target("seconds", 1.38, STORED, 1.32),),
            tokens=1024,
            repeat=5,
        ),
        Case(
            "decode",
            "greedy decoding, 128 tokens, base",
            "inference",
            both("decode", adapter=False),
            (Target("seconds", 0.5, SDPA),),
            tokens=128,
        ),
        Case(
            "decode-lora",
            "greedy decoding, 128 tokens, with LoRA",
            "inference",
            both("decode", adapter=True),
            (Target("seconds", 0.5, SDPA),),
            tokens=128,
        ),
        Case(
            "prefill",
            "prefill, 512 tokens, with LoRA",
            "inference",
            both("prefill"),
            (Target("seconds", 1.0, SDPA),),
            tokens=512,
            repeat=5,
        ),
        Case(
            "mixed-forward",
            "forward pass, 8 × 128, a row's adapter one of four",
            "inference",
            (
                Side(OURS, "ours", "mixed", {"mixed": True}),
                Side(SINGLE, "ours", "mixed", {"mixed": False}),
            ),
            (Target("seconds", 1.05, SINGLE),),
            tokens=1024,
            repeat=9,
        ),
        Case(
            "mixed-decode",
            "decoding 8 sequences × 32 tokens, a row's adapter one of four",
            "inference",
            (
                Side(OURS, "ours", "mixed_decode", {"mixed": True}),
                Side(SINGLE, "ours", "mixed_decode", {"mixed": False}),
            ),
            (Target("seconds", 1.05, SINGLE),),
            tokens=256,
            repeat=5,
        ),
        Case(
            "load",
            "loading SmolLM2, GGUF → ready",
            "loading",
            (Side(GGUF, "ours", "load", {"source": "gguf"}),),
            (Target("seconds", 2.0),),
            repeat=5,
            fresh=True,
        ),
        Case(
            "load-mapped",
            "loading float32 safetensors, mapped",
            "loading",
            both("load", source="directory"),
            (Target("seconds", 0.3), Target("private_bytes", 0.25e9)),
            repeat=5,
            fresh=True,
        ),
        Case("switch", "switching adapters", "loading", both("switch"), (Target("seconds", 1e-3),), repeat=5, calls=20),
        Case("merge", "merging an adapter", "loading", both("merge"), (Target("seconds", 0.3),), repeat=5),
        Case(
            "help",
            "`minilora --help`, cold start",
            "loading",
            (Side(OURS, "ours", "help"),),
            (Target("seconds", 0.3),),
            repeat=9,
        ),
    )
}
