"""The folder that a run leaves behind, and how a run goes on exactly where it stopped.

    adapter_config.json, adapter_model.safetensors    the adapter as last saved: the folder is a PEFT directory
    model/                        the base as a Hugging Face directory, where parameters of its own were trained
    best/                         both of these, as they were at the lowest validation loss
    checkpoints/step-N/           both of these, of the last few saves along the way
    training_state.safetensors    trained parameters, Adam's moments, the place in the data: what an exact resume needs
    metrics.jsonl                 a JSON object per step
    loss.png                      the loss curve
    minilora.toml                 the settings that were used
    report.html                   where `minilora report` was asked for one
    .next-run/                    a run that is to replace this one, until its first save

Files that are none of these are left alone. A run that replaces an earlier one writes to .next-run/ until something
that it trained is saved there whole, and only then takes the earlier one's place; one that fails before leaves it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import array_module, to_numpy
from ..data import Example
from ..errors import MiniloraError
from ..files import atomic_write, check_writable, write_error
from ..optim import AdamW
from ..tensor import Tensor

if TYPE_CHECKING:
    from ..model import Model

METRICS, CURVE, SETTINGS, STATE = "metrics.jsonl", "loss.png", "minilora.toml", "training_state.safetensors"
REPORT = "report.html"
BEST, CHECKPOINTS, BASE, NEXT = "best", "checkpoints", "model", ".next-run"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
WRITTEN = (*ADAPTER, METRICS, CURVE, SETTINGS, REPORT, BEST, CHECKPOINTS, BASE, STATE)


@dataclass
class Place:
    """Where a run stands after `step` steps; all that an exact resume needs besides the arrays.

    The next step takes batch `index` of `epoch`. tokens, seconds: spent so far. training_pass: the model's, which
    dropout masks are drawn from. data: `data_checksum` of the training examples.
    """

    step: int = 0
    epoch: int = 0
    index: int = 0
    tokens: int = 0
    seconds: float = 0.0
    training_pass: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    data: str = ""


def data_checksum(examples: Iterable[Example]) -> str:
    """Eight hexadecimal digits that change when any token or label, or their order, does."""
    checksum = 0
    for example in examples:
        checksum = zlib.crc32(example.tokens.tobytes(), checksum)
        checksum = zlib.crc32(example.labels.tobytes(), checksum)
    return f"{checksum:08x}"


def check_folder(path: Path, resume: bool, overwrite: bool) -> None:
    """MiniloraError unless a run can and may write here: nothing of an earlier run is there, or that is wanted."""
    if path.exists() and not path.is_dir():
        raise MiniloraError(f"{path} is a file, expected a folder or nothing there: choose another name for out")
    check_writable(path)
    if (path / "config.json").exists():
        raise MiniloraError(f"{path} holds a model (config.json), expected a folder for the run: choose another out")
    if resume and overwrite:
        raise MiniloraError("found resume and overwrite, expected one: go on with the earlier run, or replace it")
    if resume and not (path / STATE).exists():
        raise MiniloraError(f"{path} has no {STATE}, so there is no run to resume: leave resume out to start one")
    found = [name for name in WRITTEN if (path / name).exists()]
    if found and not (path / SETTINGS).exists():
        raise MiniloraError(
            f"{path} holds {found[0]} and no {SETTINGS}, so it is not an earlier run's and stays: choose another out"
        )
    if found and not resume and not overwrite:
        raise MiniloraError(
            f"{path} holds an earlier run ({found[0]}): choose another out, go on with it (--resume), "
            "or replace it (--overwrite)"
        )


class Folder:
    """A run's folder while the run writes to it. adapter: the name of the adapter that is trained, or None.

    path: where it writes now, which is `home`, or home's .next-run/ while an earlier run's place is not taken yet.
    """

    def __init__(self, home: Path, model: Model, adapter: str | None, base_is_trained: bool) -> None:
        self.home = self.path = home
        self.model, self.adapter, self.base_is_trained = model, adapter, base_is_trained
        self.last_saved: int | None = None
        self.taking_place = False  # begun, and not finished if an error ended it

    def begin(self) -> bool:
        """Make ready for a new run; whether there is an earlier one, which stays until this one's first save."""
        _remove(self.home / NEXT)
        if any((self.home / name).exists() for name in WRITTEN):
            self.path = self.home / NEXT
        return self.path != self.home

    def take_place(self) -> None:
        """Put this run's files in the place of the earlier one's.

        Each is replaced at once. The state to resume from goes first and comes last, and the earlier matrices go before
        the configuration comes, which stays in .next-run/ too until its matrices follow: a crash on the way leaves no
        mixture that can be loaded or resumed, and this run's adapter whole in one of the two.
        """
        if self.path == self.home:
            return
        self.taking_place = True
        _remove(self.home / STATE)
        _remove(self.home / ADAPTER[1])
        for name in WRITTEN:
            old, new = self.home / name, self.path / name
            if old.is_dir() or not new.exists():
                _remove(old)
            if new.exists() and name == ADAPTER[0]:
                atomic_write(old, new.read_bytes())
            elif new.exists():
                os.replace(new, old)
        _remove(self.path)
        self.path = self.home

    def leave(self) -> None:
        """The run is over: forget it where it has not begun to take the earlier one's place."""
        if self.path != self.home and not self.taking_place:
            _remove(self.path)

    def write_settings(self, text: str) -> None:
        """Write minilora.toml."""
        atomic_write(self.path / SETTINGS, text.encode())

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl; it is in the file when this returns."""
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics, allow_nan=False) + "\n")
        except OSError as error:
            raise write_error(self.path / METRICS, error) from error

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl (a crash can leave half a last one)."""
        path = self.path / METRICS
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def save(self, place: Place, optimiser: AdamW, config: Mapping[str, Any], keep: int = 0) -> None:
        """Save what is trained, and the state to go on from; keep: how many such saves checkpoints/ is to hold."""
        if keep:
            self._save_trained(self.path / CHECKPOINTS / f"step-{place.step}")
            for old in self._checkpoints()[:-keep]:
                shutil.rmtree(old)
        self._save_trained(self.path)
        write_state(self.path / STATE, place, optimiser, config)
        self.take_place()
        self.last_saved = place.step

    def save_best(self) -> None:
        """Save what is trained as the best so far."""
        self._save_trained(self.path / BEST)
        self.take_place()

    def restore(self, optimiser: AdamW, expected: Mapping[str, Any], data: str, total: int) -> Place:
        """Put the saved parameters and moments back, and forget the metrics of later steps; where the run stood.

        MiniloraError for the state of another run, or of one that has taken its `total` steps; see `read_state`.
        """
        place = read_state(self.path / STATE, optimiser, expected, data, total)
        kept = [record for record in self.records() if record["step"] <= place.step]
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
        atomic_write(self.path / METRICS, lines.encode())
        self.model.training_pass = place.training_pass
        self.last_saved = place.step
        return place

    def paths(self) -> dict[str, Path]:
        """What is there: "adapter", "model", "best", "metrics", "curve", "settings" and where each is."""
        names = {"model": BASE, "best": BEST, "metrics": METRICS, "curve": CURVE, "settings": SETTINGS}
        found = {key: self.path / name for key, name in names.items() if (self.path / name).exists()}
        return found | ({"adapter": self.path} if (self.path / ADAPTER[1]).exists() else {})

    def _save_trained(self, path: Path) -> None:
        if self.adapter is not None:
            self.model.save_adapter(self.adapter, path)
        if self.base_is_trained:
            self.model.save(path / BASE)

    def _checkpoints(self) -> list[Path]:
        """The folders in checkpoints/, the earliest first."""
        found = [path for path in (self.path / CHECKPOINTS).glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))


def folder_for(path: Path, model: Model, trained: Mapping[str, Tensor]) -> Folder:
    """The Folder of a run that trains `trained`; MiniloraError where those are of several adapters."""
    base = {name for name, _ in model.network.named_parameters()}
    adapters = list(model.active_adapters) if trained.keys() - base else []
    if len(adapters) > 1:
        raise MiniloraError(
            f"{len(adapters)} adapters are selected ({', '.join(adapters)}), expected one to save in {path}: "
            "set_adapter(name) selects it"
        )
    return Folder(path, model, adapters[0] if adapters else None, bool(trained.keys() & base))


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- the state to go on from ----------------------------------------------------------------------------------------


def write_state(path: Path, place: Place, optimiser: AdamW, config: Mapping[str, Any]) -> None:
    """Write parameters, moments and place as one safetensors file, so that they can only be of one step."""
    from ..formats.safetensors import save_tensors

    tensors = {f"parameter {name}": to_numpy(tensor.data) for name, tensor in optimiser.parameters.items()}
    state = optimiser.state()
    for name, (m, v) in state["moments"].items():
        tensors[f"m {name}"], tensors[f"v {name}"] = to_numpy(m), to_numpy(v)
    notes = {"place": asdict(place), "steps": state["steps"], "config": dict(config)}
    save_tensors(path, tensors, {"training": json.dumps(notes)})


def read_state(path: Path, optimiser: AdamW, expected: Mapping[str, Any], data: str, total: int) -> Place:
    """Set parameters and moments to the saved ones; MiniloraError if they are of another run, and nothing is changed.

    expected: settings that must be those of the saved run. data: the checksum of the training examples now.
    """
    from ..formats.safetensors import open_safetensors, read_metadata

    entries = open_safetensors(path)
    try:
        notes = json.loads(read_metadata(path)["training"])
        place = Place(**{field.name: notes["place"][field.name] for field in fields(Place)})
        steps = {name: int(count) for name, count in notes["steps"].items()}
        saved = {name: notes["config"][name] for name in expected}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise MiniloraError(f"{path} is not a training state that minilora wrote ({error!r:.80})") from error
    for name, value in expected.items():
        if saved[name] != value:
            raise MiniloraError(
                f"{name} is {value!r}, but the run in {path.parent} has {saved[name]!r}: an exact resume needs the same"
            )
    if place.step >= total:
        raise MiniloraError(f"the run in {path.parent} has taken {place.step:,} steps already: raise steps or epochs")
    if place.data != data:
        raise MiniloraError(f"the training data is not that of the run in {path.parent}: resume with the same rows")
    arrays = {name: np.array(entry.array()) for name, entry in entries.items()}
    for name, tensor in optimiser.parameters.items():
        found = arrays.get(f"parameter {name}")
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            have = "nothing" if found is None else f"{found.dtype} of shape {found.shape}"
            raise MiniloraError(
                f"{path} has {have} for {name}, expected {tensor.dtype} of shape {tensor.shape}: "
                "resume with the same model and adapter"
            )
    moments = {name: (arrays[f"m {name}"], arrays[f"v {name}"]) for name in steps if f"m {name}" in arrays}
    optimiser.load_state({"steps": steps, "moments": moments})
    for name, tensor in optimiser.parameters.items():
        tensor.data[...] = array_module(tensor.data).asarray(arrays[f"parameter {name}"])
    return place
