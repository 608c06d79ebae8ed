"""What the tests of training share: a task that a tiny model learns in a few steps, and a quiet run on it."""

from __future__ import annotations

from typing import Any

import numpy as np

import minilora as ml
from minilora.data import IGNORED, Example
from tests import tiny


def examples(count: int, seed: int = 0, longest: int = 14) -> list[Example]:
    """Rows of 4 to `longest` tokens, each the one before plus one; the first 0 to 2 labels are not learned."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = random.integers(4, longest + 1)
        tokens = (random.integers(0, 50) + np.arange(length)) % 50 + 3
        labels = tokens.copy()
        labels[: random.integers(0, 3)] = IGNORED
        rows.append(Example(tokens.astype(np.int32), labels.astype(np.int32)))
    return rows


def model(dtype: str = "float32", **lora: Any) -> ml.Model:
    """A tiny Llama with a new adapter "a" selected."""
    network = ml.new_model(tiny.llama(), seed=0, dtype=dtype, std=0.1)
    network.add_adapter("a", ml.LoraConfig(**({"r": 3, "alpha": 6} | lora)), seed=0)
    return network


def train(network: ml.Model, rows: list[Example] | None = None, *, call: dict[str, Any] | None = None, **config: Any):
    """`ml.train`, quiet, with settings that learn fast; `call` are arguments of train itself."""
    settings: dict[str, Any] = {"steps": 5, "batch_size": 4, "lr": 1e-2} | config
    return ml.train(
        network, examples(24) if rows is None else rows, ml.TrainConfig(**settings), **({"quiet": True} | (call or {}))
    )


def values(network: ml.Model) -> dict[str, np.ndarray]:
    """A copy of everything that is trained."""
    return {name: np.array(tensor.data) for name, tensor in network.parameters().items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names and, bit for bit, the same values."""
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records less what depends on the machine."""
    measured = ("tokens_per_second", "memory")
    return [{key: value for key, value in record.items() if key not in measured} for record in records]
