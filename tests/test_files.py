"""Files are written whole or not at all, and errors say what and where."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from minilora import files
from minilora.errors import MiniloraError
from minilora.files import (
    atomic_write,
    atomic_write_all,
    read_json,
    read_json_object,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    """The disk is found to be full when the last bytes are flushed."""

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fail)


def test_a_file_gets_its_bytes_and_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    atomic_write(path, b"abc")
    assert path.read_bytes() == b"abc"
    assert names(path.parent) == ["a.bin"]


def test_a_function_writes_to_the_path_it_is_given(tmp_path):
    atomic_write(tmp_path / "a", lambda path: path.write_text("abc") and None)
    assert (tmp_path / "a").read_text() == "abc"
    assert names(tmp_path) == ["a"]


def test_a_written_file_has_the_mode_that_the_user_asks_for(tmp_path):
    atomic_write(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_full_disk_is_one_line_and_leaves_the_old_file_whole(tmp_path, full_disk):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(MiniloraError, match=r"cannot write .*/a: the disk is full; free some space") as caught:
        atomic_write(tmp_path / "a", b"new")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_file_over_the_system_s_size_limit_leaves_the_old_file_whole(tmp_path):
    """A write that really fails half-way, in a process of its own, for limits stay once they are set."""
    (tmp_path / "a").write_bytes(b"old")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from minilora.files import atomic_write\nfrom minilora.errors import MiniloraError\n"
        "try: atomic_write(sys.argv[1], b'x' * 5000)\nexcept MiniloraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert "File too large (what was there before is whole)" in done.stdout
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MiniloraError, ZeroDivisionError])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")

    def write(path):
        path.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        atomic_write(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path):
    atomic_write_all({tmp_path / "a": b"old a", tmp_path / "b": b"old b"})

    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MiniloraError, match="disk is full"):
        atomic_write_all({tmp_path / "a": b"new a", tmp_path / "b": fail})
    assert (tmp_path / "a").read_bytes() == b"old a"
    assert names(tmp_path) == ["a", "b"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_folder_in_the_way_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(MiniloraError, match=r"cannot write .*/a: Is a directory"):
        atomic_write(tmp_path / "a", b"")
    assert names(tmp_path) == ["a"]


def test_a_file_where_a_folder_is_needed_is_an_error(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(MiniloraError, match="cannot write"):
        atomic_write(tmp_path / "a" / "b", b"")


# ---------------------------------------------------------------- directories


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', r"a\.json, line 2: malformed JSON \(Expecting value, column 7\)"),
        (b"", r"a\.json, line 1: malformed JSON"),
        (b'{"a": "\xff"}', r"a\.json: malformed JSON"),
        (b"[" * 100_000, r"a\.json: malformed JSON"),
        (b"9" * 10_000, r"a\.json: malformed JSON"),
        (b"[1]", r"a\.json holds a JSON list, expected an object"),
    ],
)
def test_malformed_json_is_one_line_that_names_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(MiniloraError, match=message) as caught:
        read_json_object(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(MiniloraError, match=r"cannot read .*a\.json: No such file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("path", "close"),
    [
        ("runs/dat", "runs/dates"),
        ("runz/dates/model.safetensors", "runs/dates/model.safetensors"),  # not run.txt, in which there is no such file
        ("runz/nothing", "runs"),
        ("runs/dates/model.safetensor", "runs/dates/model.safetensors"),
        ("smolm2", "smollm2"),
        ("runs/smolm2", None),
        ("run.txt/x", None),  # a file has nothing in it
        ("zebra", None),
    ],
)
def test_the_closest_path_there_is(tmp_path, monkeypatch, path, close):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "dates").mkdir(parents=True)
    (tmp_path / "runs" / "dates" / "model.safetensors").touch()
    (tmp_path / "run.txt").touch()
    assert files.close_to(path, ["smollm2"]) == (None if close is None else Path(close))
    message = str(files.not_there(path, "a model", ["smollm2"]))
    assert message == f"no such file or folder: {path}; " + (f"did you mean {close}?" if close else "expected a model")


def test_an_absolute_path_is_answered_with_one(tmp_path):
    (tmp_path / "data.jsonl").touch()
    assert files.close_to(tmp_path / "dato.jsonl") == tmp_path / "data.jsonl"
