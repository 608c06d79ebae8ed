"""A run, finished or stopped, read back from its folder: settings, a record per step, the evidence in its adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MiniloraError
from ..files import not_there
from ..formats.checkpoint import find_model
from ..train.folder import ADAPTER, METRICS, SETTINGS
from ..train.settings import read_settings
from .spectrum import LayerSpectrum, spectra


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    settings: by option, as minilora.toml has them. records: those of metrics.jsonl, a step each. layers: the spectra of
    each adapted layer, [] without an adapter. base: whether they are compared with the base's weights; note: why not.
    """

    path: Path
    name: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    layers: list[LayerSpectrum] = field(default_factory=list)
    base: str | None = None
    note: str = ""

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the records that have a number under this key."""
        found = [(record["step"], record[key]) for record in self.records if isinstance(record.get(key), int | float)]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The last value under this key."""
        values = self.column(key)[1]
        return values[-1] if values else None

    @property
    def samples(self) -> dict[str, list[tuple[int, str]]]:
        """{prompt: (step, text) of each time that it was continued}."""
        found: dict[str, list[tuple[int, str]]] = {}
        for record in self.records:
            for prompt, text in (record.get("samples") or {}).items():
                found.setdefault(prompt, []).append((record["step"], text))
        return found


def is_run(path: Path) -> bool:
    return (path / METRICS).is_file() and (path / SETTINGS).is_file()


def find_runs(path: Path) -> list[Path]:
    """The folder itself if it is a run's, or the runs right below it; MiniloraError if there is none."""
    if is_run(path):
        return [path]
    found = sorted(child for child in path.iterdir() if child.is_dir() and is_run(child)) if path.is_dir() else []
    if not found and not path.exists():
        raise not_there(path, "the folder that `minilora train --out` wrote")
    if not found:
        what = "is no folder" if not path.is_dir() else f"holds no run ({METRICS} and {SETTINGS})"
        raise MiniloraError(
            f"{path} {what}: expected the folder that `minilora train --out` wrote, or one with such in it"
        )
    return found


def read_run(path: Path, model: str | None = None) -> Run:
    """Read the run in a folder. model: its base, for what compares ΔW with W; None: the one that the run names.

    A base that is only known by a hub's id is not downloaded for this. Raises MiniloraError for a malformed file.
    """
    settings = read_settings(path / SETTINGS)
    records = read_records(path / METRICS)
    base, note = (model, "") if model is not None else _base_of(settings)
    layers = spectra(path, base) if all((path / name).is_file() for name in ADAPTER) else []
    return Run(path, path.resolve().name, settings, records, layers, base, note if layers else "")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without half a last line that a crash may have left.

    Raises MiniloraError, naming the line, for one that is no JSON object with a step.
    """
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise MiniloraError(f"cannot read {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MiniloraError(
                f"{path}, line {number}: {error}, expected a JSON object as `minilora train` writes"
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise MiniloraError(f"{path}, line {number}: found {line.strip():.60}, expected an object with a step")
        records.append(record)
    if not any("loss" in record for record in records):
        raise MiniloraError(f"{path} has no step with a loss yet: report on it when the run has taken one")
    return records


def _base_of(settings: dict[str, Any]) -> tuple[str | None, str]:
    """The base that the run names, if it is on this machine; else why not."""
    name = settings.get("model")
    if not isinstance(name, str):
        return None, "the run names no base model; --model gives it"
    if "/" in name and not Path(name).expanduser().exists():
        return None, f"the base {name} is not a folder here, so ΔW is shown alone; --model gives it"
    try:
        find_model(name)
    except MiniloraError as error:
        return None, f"ΔW is shown alone: {error}"
    return name, ""
