"""A tiny model that reads bytes, an adapter for it, data, and the commands run in this process."""

from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import minilora as ml
from minilora import files
from minilora.cli import app
from tests import texts, tiny

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def run() -> Run:
    """run("eval", "--model", ...) gives (exit status, stdout, stderr); input= is stdin. A traceback fails the test."""

    def command(*arguments: Any, input: str | bytes | None = None) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return command


@pytest.fixture(scope="session")
def in_terminal() -> Callable[..., tuple[int, str]]:
    """in_terminal("generate", ...) runs minilora in a terminal of 120 columns: (exit status, what it shows)."""

    def command(*arguments: Any) -> tuple[int, str]:
        parent, child = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
        process = subprocess.Popen(
            [sys.executable, "-m", "minilora", *map(str, arguments)], env=environment, stdout=child, stderr=child
        )
        os.close(child)
        shown = b""
        try:
            while block := os.read(parent, 65536):
                shown += block
        except OSError:  # the other end is closed
            pass
        os.close(parent)
        return process.wait(timeout=60), shown.decode()

    return command


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory. The head's rows of unprintable tokens are zero: greedy text is printable ASCII."""
    model = texts.model()
    model.network.lm_head.weight.data[[*range(32), *range(127, texts.VOCABULARY)]] = 0
    path = tmp_path_factory.mktemp("base") / "model"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for `base` that changes what it says, on two kinds of layers, alpha 6 and rank 3."""
    model = ml.load_model(base)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]))
    path = tmp_path_factory.mktemp("adapter") / "a"
    model.save_adapter("a", path)
    return path


@pytest.fixture(scope="session")
def foreign_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a wider model."""
    model = texts.model(hidden_size=32)
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]))
    path = tmp_path_factory.mktemp("foreign") / "a"
    model.save_adapter("a", path)
    return path


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """write_rows([{...}, ...], "test.jsonl") writes a JSON Lines file and gives its path."""

    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is found to be full when a file's bytes are flushed."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fail)


def log_probabilities(model: ml.Model, tokens: np.ndarray) -> np.ndarray:
    """ln p of each token but the first, given those before it, by the definition: (T,) -> (T − 1,)."""
    logits = ml.to_numpy(model.logits(tokens[None]))[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits[np.arange(len(tokens) - 1), tokens[1:]]
