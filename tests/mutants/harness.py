"""Plants bugs in a copy of the package and runs the tests that should notice.

A worker holds its own copy of minilora/ and tests/. It imports what takes long (NumPy, pytest, hypothesis) once, and
forks for each bug: the child imports the package with the bug in it and runs pytest, up to the first failure.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from .mutant import ROOT, Mutant

HYPOTHESIS = "_hypothesis_pytestplugin"  # the only plugin that a run loads
SECONDS = 120  # after which a run is ended: a bug may be one that never finishes


@dataclass(frozen=True)
class Outcome:
    """killed_by: the first test that failed ("" for none); seconds: the run took."""

    mutant: Mutant
    killed_by: str
    seconds: float


def run_all(mutants: Iterable[Mutant], workers: int = 2) -> Iterator[Outcome]:
    """The outcome of each mutant, in order. A snippet that no longer occurs exactly once is a ValueError, at once."""
    mutants = list(mutants)
    for mutant in mutants:
        mutant.apply(mutant.source())
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = context.Queue()
        for number in range(workers):
            copies.put(str(_copy(Path(folder) / str(number))))
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(copies,)) as pool:
            yield from pool.map(_run, mutants)


def _copy(target: Path) -> Path:
    for part in ("minilora", "tests"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def _begin(copies: object) -> None:
    """Make this process a worker on one of the copies."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported: the arrays are tiny
    sys.dont_write_bytecode = True  # a mutated file may have the size and the second of the one before
    copy = copies.get()  # type: ignore[attr-defined]
    os.chdir(copy)
    sys.path[:] = [copy, *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for slow in ("numpy", "hypothesis", "pytest", HYPOTHESIS):
        import_module(slow)


def _run(mutant: Mutant) -> Outcome:
    start = time.monotonic()
    path = Path("minilora") / mutant.file
    original = path.read_text("utf-8")
    path.write_text(mutant.apply(original), "utf-8")
    try:
        killed_by = _in_child(mutant.tests)
    finally:
        path.write_text(original, "utf-8")
    return Outcome(mutant, killed_by, time.monotonic() - start)


def _in_child(tests: tuple[str, ...]) -> str:
    """The first test that fails in a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        with _quietly():
            failed = first_failure(tests)
        os.write(write, failed.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        failed = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "the run did not end" if os.WTERMSIG(status) == signal.SIGALRM else f"signal {os.WTERMSIG(status)}"
    return failed


@contextmanager
def _quietly() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def first_failure(tests: tuple[str, ...]) -> str:
    """Run pytest here, in this process, up to the first failure; the test's name, "" where all pass."""
    import pytest

    class Watch:
        failed = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not self.failed:
                self.failed = report.nodeid

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed and not self.failed:
                self.failed = f"{report.nodeid or 'tests'} (collection)"

    watch = Watch()
    # No shrinking: that a test fails is enough. No assertion rewriting: nobody reads the message.
    options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", HYPOTHESIS, "--hypothesis-profile=failing"]
    status = pytest.main([*options, *tests], [watch])
    if not watch.failed and status is not pytest.ExitCode.OK:
        return f"pytest ended with {status!r}"
    return watch.failed
