"""A run that stopped goes on to the numbers of one that did not, and nothing of another run is lost on the way."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.train import TrainingInterrupted
from minilora.train.folder import Folder, Place, data_checksum
from minilora.train.progress import Quiet
from tests import tiny
from tests.train import made

RUN = {"steps": 10, "batch_size": 4, "accumulate": 2, "warmup": 2, "eval_every": 3, "seed": 5}


def run(network, out, call=None, **config):
    call = {"valid": made.examples(6, seed=1)} | (call or {})
    return made.train(network, made.examples(22), out=out, call=call, **(RUN | config))


def model():
    return made.model(dropout=0.2)


def with_norms():
    network = model()
    network.unfreeze(["norm.weight"])
    return network


def with_own_parameters():
    return made.model(target_modules=["embed_tokens", "v_proj"], modules_to_save=["lm_head", "norm"], dropout=0.2)


def at_step(monkeypatch, number, action):
    """Do something while step `number` is being reported."""
    step = Quiet.step

    def hooked(show, report):
        step(show, report)
        if report.step == number:
            action()

    monkeypatch.setattr(Quiet, "step", hooked)


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def unbroken(tmp_path):
    network = model()
    return run(network, tmp_path / "unbroken"), made.values(network)


@pytest.mark.parametrize("stop", [3, 5, 6])  # 3 steps are an epoch; after 6, validation follows
def test_ctrl_c_finishes_the_step_and_a_resumed_run_has_the_numbers_of_an_unbroken_one(
    monkeypatch, tmp_path, unbroken, stop
):
    expected, values = unbroken
    with monkeypatch.context() as patch:
        at_step(patch, stop, press_ctrl_c)
        with pytest.raises(TrainingInterrupted) as caught:
            run(model(), tmp_path / "run")
    assert caught.value.result.steps == stop
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    network = model()
    result = run(network, tmp_path / "run", {"resume": True})
    made.assert_same(made.values(network), values)
    assert (result.steps, result.epochs, result.tokens) == (10, expected.epochs, expected.tokens)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    interrupted = [{k: v for k, v in r.items() if k != "validation_loss"} if r["step"] == stop else r for r in records]
    unbroken_records = [
        {k: v for k, v in r.items() if k != "validation_loss"} if r["step"] == stop else r for r in expected.history
    ]
    assert made.without_times(interrupted) == made.without_times(unbroken_records)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_a_crash_loses_only_what_came_after_the_last_save(monkeypatch, tmp_path, unbroken):
    expected, values = unbroken

    class CrashError(Exception):
        pass

    def crash():
        raise CrashError

    with monkeypatch.context() as patch:
        at_step(patch, 8, crash)
        with pytest.raises(CrashError):
            run(model(), tmp_path / "run", save_every=5)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 8, "lo')  # the line that was being written

    network = model()
    result = run(network, tmp_path / "run", {"resume": True}, save_every=5)
    made.assert_same(made.values(network), values)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert made.without_times(records) == made.without_times(expected.history)
    assert (result.best_step, result.best_validation_loss) == (expected.best_step, expected.best_validation_loss)


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(monkeypatch, tmp_path):
    def twice():
        press_ctrl_c()
        press_ctrl_c()

    at_step(monkeypatch, 4, twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(model(), tmp_path / "run")
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(tmp_path):
    long, short = model(), model()
    run(long, tmp_path / "long", steps=6, schedule="constant")
    run(short, tmp_path / "short", steps=4, schedule="constant")
    with pytest.raises(MiniloraError, match="has taken 4 steps already: raise steps or epochs"):
        run(model(), tmp_path / "short", {"resume": True}, steps=4, schedule="constant")
    again = model()
    run(again, tmp_path / "short", {"resume": True}, steps=6, schedule="constant")
    made.assert_same(made.values(again), made.values(long))


@pytest.mark.parametrize("start", [with_norms, with_own_parameters])
def test_whole_parameters_of_the_base_and_of_an_adapter_are_resumed_too(monkeypatch, tmp_path, start):
    whole = start()
    run(whole, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 4, press_ctrl_c)
        with pytest.raises(TrainingInterrupted):
            run(start(), tmp_path / "run")
    resumed = start()
    run(resumed, tmp_path / "run", {"resume": True})
    made.assert_same(made.values(resumed), made.values(whole))
    loaded = ml.new_model(tiny.llama(), seed=0, std=0.1)
    if start is with_own_parameters:  # what was saved is all of it
        loaded.load_adapter("a", tmp_path / "run")
        assert np.array_equal(loaded.logits(tiny.tokens()), whole.logits(tiny.tokens()))
        assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed is 6, but the run in .* has 5"),
        ({"batch_size": 5}, "batch_size is 5, but the run in .* has 4"),
        ({"packing": True}, "packing is True"),
    ],
)
def test_resuming_with_another_order_of_the_data_is_refused(monkeypatch, tmp_path, change, message):
    with monkeypatch.context() as patch:
        at_step(patch, 4, press_ctrl_c)
        with pytest.raises(TrainingInterrupted):
            run(model(), tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(MiniloraError, match=message):
        run(model(), tmp_path / "run", {"resume": True}, **change)
    with pytest.raises(MiniloraError, match="the training data is not that of the run"):
        made.train(
            model(),
            made.examples(22, seed=9),
            out=tmp_path / "run",
            call={"resume": True},
            **(RUN | {"eval_every": None}),
        )
    with pytest.raises(
        MiniloraError, match=r"has float32 of shape \(3, 24\) for .*expected float32 of shape \(2, 24\)"
    ):
        run(made.model(r=2), tmp_path / "run", {"resume": True})
    with pytest.raises(MiniloraError, match=r"has nothing for model\.norm\.weight"):
        run(with_norms(), tmp_path / "run", {"resume": True})
    assert contents(tmp_path / "run") == before


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_state_is_refused(tmp_path):
    run(model(), tmp_path / "run", steps=2, eval_every=None)
    state = tmp_path / "run" / "training_state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-10])
    with pytest.raises(MiniloraError, match="not a whole safetensors file"):
        run(model(), tmp_path / "run", {"resume": True})
    state.write_bytes((tmp_path / "run" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(MiniloraError, match="is not a training state that minilora wrote"):
        run(model(), tmp_path / "run", {"resume": True})


def test_an_earlier_run_is_refused_and_stays_whole_unless_it_may_be_replaced(tmp_path):
    out = tmp_path / "run"
    run(model(), out, steps=4, save_every=1, keep=2)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(MiniloraError, match=r"holds an earlier run .*--resume.*--overwrite"):
        run(model(), out, steps=2)
    assert contents(out) == before
    run(model(), out, {"overwrite": True}, steps=2, eval_every=None)
    assert not (out / "checkpoints").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("call", [{}, {"overwrite": True}])
def test_files_that_only_look_like_a_runs_are_never_replaced(tmp_path, call):
    made.model().save(tmp_path / "model")
    made.model().save_adapter("a", tmp_path / "adapter")
    before = contents(tmp_path)
    for out in (tmp_path, tmp_path / "adapter"):
        with pytest.raises(MiniloraError, match=r"and no minilora\.toml, so it is not an earlier run's and stays"):
            run(model(), out, call)
    assert contents(tmp_path) == before


def test_a_full_disk_while_saving_is_one_line_and_what_was_saved_before_is_whole(monkeypatch, tmp_path):
    out, saved = tmp_path / "run", {}

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill():
        saved.update(contents(out))
        monkeypatch.setattr(os, "replace", full)

    at_step(monkeypatch, 3, fill)
    with pytest.raises(MiniloraError, match=r"cannot write .*: the disk is full"):
        run(model(), out, save_every=2, eval_every=None)
    now = contents(out)
    assert {name for name in now if now[name] != saved.get(name)} == {Path("metrics.jsonl")}
    monkeypatch.undo()
    assert run(model(), out, {"resume": True}, eval_every=None).steps == 10


def test_a_run_that_cannot_start_does_not_replace_an_earlier_one(tmp_path):
    run(model(), tmp_path / "run", steps=2)
    before = contents(tmp_path / "run")
    with pytest.raises(MiniloraError, match="no label"):
        made.train(
            model(),
            [ml.data.Example(np.array([3, 4]), np.array([-100, -100]))],
            out=tmp_path / "run",
            call={"overwrite": True},
        )
    assert contents(tmp_path / "run") == before


def test_a_file_a_model_or_an_empty_folder_in_the_place_of_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MiniloraError, match="is a file, expected a folder"):
        run(model(), tmp_path / "file")
    made.model().save(tmp_path / "model")
    with pytest.raises(MiniloraError, match=r"holds a model \(config\.json\)"):
        run(model(), tmp_path / "model", {"overwrite": True})
    with pytest.raises(MiniloraError, match=r"no training_state\.safetensors, so there is no run to resume"):
        run(model(), tmp_path / "empty", {"resume": True})
    with pytest.raises(MiniloraError, match="without out"):
        run(model(), None, {"resume": True})
    with pytest.raises(MiniloraError, match="resume and overwrite, expected one"):
        run(model(), tmp_path / "model2", {"resume": True, "overwrite": True})


def test_checkpoints_hold_the_last_few_saves_as_adapters(monkeypatch, tmp_path):
    network, saved = made.model(), {}
    save = Folder.save

    def spy(folder, place, *arguments):
        saved[place.step] = made.values(network)
        save(folder, place, *arguments)

    monkeypatch.setattr(Folder, "save", spy)
    run(network, tmp_path / "run", save_every=2, keep=2, eval_every=None)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-6", "step-8"]
    assert list(saved) == [2, 4, 6, 8, 10]
    for folder, step in ((".", 10), ("checkpoints/step-8", 8), ("checkpoints/step-6", 6)):
        loaded = made.model()
        loaded.load_adapter("b", tmp_path / "run" / folder)
        made.assert_same(made.values(loaded), saved[step])


def test_the_checksum_of_the_data_changes_with_every_token_label_and_their_order():
    rows = made.examples(3)
    checksum = data_checksum(rows)
    assert checksum == data_checksum(made.examples(3))
    tokens, labels = rows[1].tokens.copy(), rows[1].labels.copy()
    tokens[-1] += 1
    labels[0] += 1
    for changed in (
        [rows[0], ml.data.Example(tokens, rows[1].labels), rows[2]],
        [rows[0], ml.data.Example(rows[1].tokens, labels), rows[2]],
        rows[::-1],
        rows[:2],
    ):
        assert data_checksum(changed) != checksum
    assert Place().data == ""


# --- an earlier run's place is taken at the first save ----------------------------------------------------------------


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def earlier(tmp_path):
    """The folder of a run with everything that one can leave, and a file of the user's."""
    out = tmp_path / "run"
    run(model(), out, save_every=4)
    (out / "report.html").write_text("a report")
    (out / "notes.txt").write_text("mine")
    return out


def fails(*arguments, **options):
    raise MiniloraError("it fails")


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_fails_before_its_first_save_leaves_the_earlier_one_as_it_was(earlier, monkeypatch, step):
    before = snapshot(earlier)
    at_step(monkeypatch, step, fails)
    with pytest.raises(MiniloraError, match="it fails"):
        run(model(), earlier, {"overwrite": True}, steps=4, eval_every=None, save_every=3)
    assert snapshot(earlier) == before
    assert not (earlier / ".next-run").exists()


def test_the_earlier_run_is_there_until_the_first_save_and_then_the_new_one_alone(earlier, monkeypatch):
    before, seen = snapshot(earlier), {}
    at_step(monkeypatch, 3, lambda: seen.update(snapshot(earlier)))
    result = run(model(), earlier, {"overwrite": True, "valid": None}, steps=5, eval_every=None, seed=9)
    assert {name: seen[name] for name in before} == before
    assert {name for name in seen if name not in before} == {".next-run/minilora.toml", ".next-run/metrics.jsonl"}
    after = snapshot(earlier)
    assert after.keys() == {
        "adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.jsonl", "minilora.toml",
        "training_state.safetensors", "notes.txt",
    }  # fmt: skip
    assert len(after["metrics.jsonl"].splitlines()) == 5
    paths = result.paths
    assert {path.parent for name, path in paths.items() if name != "adapter"} == {paths["adapter"]} == {earlier}
    assert run(model(), earlier, {"resume": True}, steps=6, eval_every=None, seed=9).steps == 6


def test_the_best_adapter_takes_the_place_as_soon_as_it_is_saved(earlier, monkeypatch):
    at_step(monkeypatch, 4, fails)
    with pytest.raises(MiniloraError, match="it fails"):
        run(model(), earlier, {"overwrite": True}, steps=9, eval_every=3)
    assert [name for name in snapshot(earlier) if not name.startswith(("best/", "notes"))] == [
        "metrics.jsonl", "minilora.toml",
    ]  # fmt: skip
    assert len((earlier / "metrics.jsonl").read_text().splitlines()) == 4  # of steps 0 to 3


@pytest.mark.parametrize("way", ["crash", "error"])
def test_a_crash_or_an_error_while_the_place_is_taken_leaves_no_mixture(earlier, monkeypatch, way):
    """At each replacement in turn: there is nothing to resume, an adapter that can be loaded is of one run, and the new
    run's is whole in one of the two folders.
    """
    before, following, pairs = snapshot(earlier), earlier / ".next-run", []

    def pair(folder):
        """The adapter in a folder: its configuration and its matrices, or None where one is missing."""
        files = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        return tuple(file.read_bytes() for file in files) if all(file.exists() for file in files) else None

    if way == "crash":
        monkeypatch.setattr(Folder, "leave", lambda folder: None)  # it runs nothing more
    for number in range(100):
        shutil.rmtree(earlier)
        for name, content in before.items():
            (earlier / name).parent.mkdir(parents=True, exist_ok=True)
            (earlier / name).write_bytes(content)
        old, replaced = pair(earlier), iter(range(10**6))

        def crash(source, target, *, replace=os.replace, at=number, replaced=replaced):
            if Path(target).parent == earlier and next(replaced) == at:
                raise OSError(errno.EIO, "crash")
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", crash)
            try:
                call = {"overwrite": True, "valid": None}
                run(made.model(dropout=0.1), earlier, call, steps=2, eval_every=None, seed=9)
            except (OSError, MiniloraError):
                pairs.append((pair(earlier), pair(following)))
                assert not (earlier / "training_state.safetensors").exists() or not following.exists()
            else:
                break
    new = pair(earlier)
    assert number >= 5
    assert old != new
    for here, there in pairs:
        assert here in (None, old, new)
        assert new in (here, there)
