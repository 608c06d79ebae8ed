"""Writing files so that neither a crash nor a full disk leaves half of one; reading JSON, where errors name the line;
and what is close to a path that is not there.

Everything is first written under a temporary name in the same folder, flushed to the disk (fsync), and only then
renamed over the old file: whoever looks sees the old content or the new, whole. What the files mean is formats/'s
business.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import secrets
from collections.abc import Callable, Collection, Mapping
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


def not_there(path: str | os.PathLike[str], expected: str, names: Collection[str] = ()) -> MiniloraError:
    """ "no such file or folder: runs/dat; did you mean runs/dates?", or what is expected where nothing is close.

    names: what could have been meant besides a path.
    """
    meant = close_to(path, names)
    hint = f"expected {expected}" if meant is None else f"did you mean {meant}?"
    return MiniloraError(f"no such file or folder: {path}; {hint}")


def close_to(path: str | os.PathLike[str], names: Collection[str] = ()) -> Path | None:
    """The path there is whose name is closest to the first part of `path` that is missing, or None.

    names: what could have been meant besides a path.
    """
    missing = whole = Path(path).expanduser()
    while missing != missing.parent and not missing.parent.exists():
        missing = missing.parent
    here = os.listdir(missing.parent) if missing.parent.is_dir() else []
    close = difflib.get_close_matches(missing.name, [*here, *(names if len(whole.parts) == 1 else ())])
    paths = [missing.with_name(name) for name in close]
    rest = whole.relative_to(missing)
    return next((path / rest for path in paths if (path / rest).exists()), paths[0] if paths else None)


def check_writable(path: str | os.PathLike[str]) -> None:
    """MiniloraError where nothing can be written to `path`, to be known before the work that ends there.

    Nothing is made: a folder that is missing is fine where it could be made.
    """
    place = Path(path).expanduser().absolute()
    folder = next(parent for parent in (place, *place.parents) if parent.exists())
    if folder == place and not folder.is_dir():
        folder = folder.parent
    if not folder.is_dir():
        raise MiniloraError(f"cannot write {path}: {folder} is a file, expected a folder: choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MiniloraError(f"cannot write {path}: no permission to write in {folder}: choose another place")


def write_error(path: Path, error: OSError) -> MiniloraError:
    """The one line that a user reads when `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MiniloraError(f"cannot write {path}: the disk is full; free some space (what was there before is whole)")
    return MiniloraError(f"cannot write {path}: {error.strerror or error} (what was there before is whole)")


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
