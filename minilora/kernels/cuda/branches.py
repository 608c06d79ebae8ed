"""Branches of a recorded step: launches that need not wait for one another run side by side on the GPU.

A launch of a narrow product (the rank is one of its sizes) fills a part of the GPU for a few microseconds. In a CUDA
graph those of a layer's backward pass can run beside the product with W. Launch by launch everything stays in one line:
there the host is what takes the time. The results are the same bits either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import cupy

COUNT = 2  # branches beside the main line

_lane = [0]  # the last one is the branch that launches go to: 0 the main line, 1 … COUNT


def lane() -> int:
    """The branch that launches go to now, 0 for the main line: what may not be shared by two at a time goes by it."""
    return _lane[-1]


@cache
def streams(device: int) -> tuple[Any, ...]:
    """The streams that branches are recorded on."""
    with cupy.cuda.Device(device):
        return tuple(cupy.cuda.Stream(non_blocking=True) for _ in range(COUNT))


class Fork:
    """with Fork() as fork: what is launched inside `with fork.branch(1)` depends on what was launched before the fork,
    and what comes after the fork on all of it.

    What a branch makes is not to be used by another one, nor by the main line within the fork.
    """

    def __enter__(self) -> Fork:
        main = cupy.cuda.get_current_stream()
        self.main = main if lane() == 0 and main.is_capturing() else None
        self.used: dict[int, Any] = {}  # streams by branch
        if self.main is not None:
            self.start = self.main.record(cupy.cuda.Event(disable_timing=True))
        return self

    def branch(self, number: int) -> Any:
        """A context whose launches go to that branch (1 … COUNT)."""
        return nullcontext() if self.main is None else self._on(number)

    @contextmanager
    def _on(self, number: int) -> Iterator[None]:
        stream = streams(cupy.cuda.Device().id)[number - 1]
        if number not in self.used:
            stream.wait_event(self.start)
            self.used[number] = stream
        _lane.append(number)
        try:
            with stream:
                yield
        finally:
            _lane.pop()

    def __exit__(self, *_: Any) -> None:
        if self.main is not None:  # after an error too: a recording with a loose end would hide it behind its own
            for stream in self.used.values():
                self.main.wait_event(stream.record(cupy.cuda.Event(disable_timing=True)))
