"""Writing files so that neither a crash nor a full disk leaves half of one, and reading JSON: errors name the line.

Everything is first written under a temporary name in the same folder, flushed to the disk (fsync), and only then
renamed over the old file: whoever looks sees the old content or the new, whole. What the files mean is formats/'s
business.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import MiniloraError

Content = bytes | Callable[[Path], None]  # the bytes, or a function that writes them to the path it is given


def atomic_write(path: str | os.PathLike[str], data: Content) -> None:
    """Write one file whole or not at all; missing parent folders are made.

    Raises MiniloraError where the system refuses (disk full, no permission); the old file is then untouched.
    """
    atomic_write_all({Path(path): data})


def atomic_write_all(files: Mapping[Path, Content]) -> None:
    """Write several files that belong together: all are complete on the disk before the first takes its place.

    Raises MiniloraError as `atomic_write` does; the old files are then untouched.
    """
    temporaries: dict[Path, Path] = {}  # target (behind a symbolic link: what it points to) -> temporary beside it
    path = Path()
    try:
        for path, data in files.items():
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporaries[target] = _temporary_beside(target)
            if callable(data):
                data(temporary)
            else:
                temporary.write_bytes(data)
            _fsync(temporary)
        for target, temporary in temporaries.items():
            os.replace(temporary, target)
        for folder in {target.parent for target in temporaries}:
            _fsync(folder)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory beside `path`, and put it in `path`'s place once the block has ended without an error.

    An existing directory is replaced whole, and only by a complete one. To be replaced it must look like an earlier
    version: empty, or sharing a file name with the new one and holding no sub-directory that the new one lacks. A crash
    between the two renames leaves the old one beside it, under a hidden name that ends in `.old`.
    Raises MiniloraError where the system refuses or `path` holds something else; `path` is then untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_beside(target)
    replaced = temporary.with_suffix(".old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        if target.exists():
            _check_replaceable(target, temporary)
            os.rename(target, replaced)
        try:
            os.rename(temporary, target)
        except OSError:
            if replaced.exists():
                os.rename(replaced, target)
            raise
        _fsync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON, atomically."""
    atomic_write(path, json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
    """`obj` as indented UTF-8 JSON that ends in a newline."""
    return (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file; raises MiniloraError that names the file, and the line where it is malformed."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise MiniloraError(f"cannot read {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise MiniloraError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8, huge integers, bottomless nesting
        raise MiniloraError(f"{path}: malformed JSON ({error})") from error


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; raises MiniloraError where it holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise MiniloraError(f"{path} holds a JSON {type(value).__name__}, expected an object {{...}}")
    return value


def write_error(path: Path, error: OSError) -> MiniloraError:
    """The one line that a user reads when `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MiniloraError(f"cannot write {path}: the disk is full; free some space (what was there before is whole)")
    return MiniloraError(f"cannot write {path}: {error.strerror or error} (what was there before is whole)")


def _check_replaceable(old: Path, new: Path) -> None:
    """Refuse to replace a folder of somebody else's files, such as a home directory given by mistake."""
    if not old.is_dir():
        raise MiniloraError(f"{old} is a file, expected a directory or nothing there; choose another name or remove it")
    if not (entries := list(old.iterdir())):
        return
    foreign = [entry.name for entry in entries if entry.is_dir() and not (new / entry.name).is_dir()]
    if foreign or not any((new / entry.name).exists() for entry in entries):
        found = (foreign or [entries[0].name])[0]
        raise MiniloraError(
            f"{old} already exists and holds other things (such as {found}) that replacing it would destroy; "
            "choose another directory or remove that one"
        )


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no fsync of a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
