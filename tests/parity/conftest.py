"""Fixtures for comparing with transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def float64_transformers() -> Iterator[None]:
    """In this test transformers computes in float64 throughout: its casts to float32 give float64, for any family.

    Models have to be made inside too (they are, by a test that uses this): a rotary table is computed when they are.
    """
    from tests.parity.reference import float64_casts

    with float64_casts():
        yield


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint(config, dtype="float64", seed=0): a directory with a random model that transformers wrote."""
    from tests.parity.reference import write_checkpoint

    def write(config: Mapping[str, Any], dtype: str = "float64", seed: int = 0) -> Path:
        return write_checkpoint(config, tmp_path / f"{dtype}-{seed}", dtype, seed)

    return write
