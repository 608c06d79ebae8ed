"""Row blocks over a fixed pool of threads, with the BLAS at one thread each: the one way in which CPU kernels run in
parallel.

NumPy releases the interpreter's lock inside ufuncs and matrix products, so plain Python threads share the work. A
kernel says what to do with rows a … b and `parallel_rows` does all of them. The blocks depend on the sizes and the
number of threads alone, and every block writes its own rows, so a result does not depend on which thread computed what,
or when.

The BLAS keeps the threads that the user gave it: they are set to one while a parallel region runs and given back after
it (a function call of under a microsecond, once threadpoolctl has found the library). Users who call NumPy between our
calls notice nothing.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import numpy as np

from ... import execution


@cache
def _blas() -> Any:
    """threadpoolctl's handle on the BLAS that NumPy uses; None where there is no way to set its threads."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        warnings.warn(
            "threadpoolctl is not installed: kernels run on one thread (pip install threadpoolctl)",
            stacklevel=3,
        )
        return None
    found = [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]
    # A process may hold several (torch brings its own): NumPy's lies in its own folder, or is the system's only one.
    mine = [library for library in found if "numpy" in str(library.filepath).lower()] or found
    return mine[0] if mine else None


@cache
def thread_count() -> int:
    """Threads that kernels use: as many as the BLAS has (OMP_NUM_THREADS and the like set them), at most one a core."""
    blas = _blas()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if blas is None else max(1, min(cores, blas.num_threads))


class _SingleThreadedBlas:
    """Counts the parallel regions that run now: the first sets the BLAS to one thread, the last gives its own back."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = _blas().num_threads
                _blas().set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                _blas().set_num_threads(self.before)


_single_threaded_blas = _SingleThreadedBlas()
_local = threading.local()


class _Pool:
    """thread_count() − 1 threads that wait for work; the calling thread is the last one."""

    def __init__(self, size: int) -> None:
        self.queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        for number in range(size):
            threading.Thread(target=self._serve, name=f"minilora-{number}", daemon=True).start()

    def _serve(self) -> None:
        _local.busy = True  # a kernel called inside a block runs on this thread alone
        while True:
            self.queue.get()()


@cache
def _pool(process: int) -> _Pool:
    """The pool of this process: a forked child starts with no threads and needs its own."""
    return _Pool(thread_count() - 1)


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run the tasks, each once, over all threads; wait for all. The first error is raised here."""
    workers = min(thread_count(), len(tasks))
    if workers <= 1 or getattr(_local, "busy", False):
        for task in tasks:
            task()
        return
    waiting = iter(tasks)  # next() on it is atomic: a thread takes a task when it is done with its last
    finished: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
        error = None
        try:
            for task in waiting:
                task()
        except BaseException as raised:
            error = raised
        finished.put(error)

    with _single_threaded_blas:
        queue = _pool(os.getpid()).queue
        for _ in range(workers - 1):
            queue.put(work)
        _local.busy = True
        try:
            work()
        finally:
            _local.busy = False
        errors = [finished.get() for _ in range(workers)]
    for error in errors:
        if error is not None:
            raise error


def row_blocks(n: int, most: int, least: int = 1) -> list[tuple[int, int]]:
    """0 … n in blocks of about equal length of at most `most` rows: an even share each, if that is `least` rows."""
    threads = thread_count()
    count = max(1, -(-n // most))
    if count % threads and n >= least * threads:
        count = min(-(-count // threads) * threads, max(1, n // least))
    edges = [n * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def parallel_rows(fn: Callable[[int, int], None], n: int, most: int = 64, least: int = 1) -> None:
    """fn(start, stop) for row blocks that cover 0 … n, spread over the threads. fn must write to its own rows only."""
    run_all([partial(fn, a, b) for a, b in row_blocks(n, most, least)])


execution.cpu_runner.append(parallel_rows)


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A buffer of this thread that is used again and again: its content lasts until the same name is asked for next."""
    buffers = _local.__dict__.setdefault("buffers", {})
    size = math.prod(shape)
    held = buffers.get((name, dtype))
    if held is None or held.size < size:
        held = buffers[name, dtype] = np.empty(size, dtype)
    return held[:size].reshape(shape)
