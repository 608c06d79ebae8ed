"""Steps as CUDA graphs: what a step launches is recorded once for each shape of its inputs, and replayed at once.

A step of a small model is hundreds of launches that each cost more host time than GPU time; a replay costs one. What is
recorded are addresses: the inputs are copied to where the recording reads them, and everything made on the way lies in
a memory pool that nothing else uses, so that a replay overwrites nobody's data. The first two steps of a shape run
launch by launch (kernels are compiled, what is kept from step to step is made), the third is recorded, or the first
one after it for which nothing of that kind is to be made again: a copy from the host has no place in a recording.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...backend import Array
from . import branches
from .gemm import handle_of

MOST = 16  # recordings that are kept, the latest used ones
UNRECORDED = 2  # steps of a shape before it is recorded


class Recording(NamedTuple):
    """graph: what is replayed. inputs: where it reads. results: what `step` returned. held: what else it reads."""

    graph: Any
    inputs: list[Array]
    results: Any
    held: Any


class Recorder:
    """The recordings of one step function."""

    def __init__(self) -> None:
        self.pool = cupy.cuda.MemoryPool()
        self.stream = cupy.cuda.Stream()  # one that waits for the default stream, and that one for it
        self.recordings: dict[Hashable, Recording] = {}
        self.seen: Counter[int] = Counter()

    def run(
        self,
        key: Hashable,
        inputs: Sequence[np.ndarray],
        step: Callable[[list[Array]], Any],
        held: Callable[[], Any],
        settled: Callable[[], bool],
    ) -> Any:
        """step(inputs on the device) by the recording of this key, or launch by launch where there is none yet.

        The key names everything that the launches depend on besides the values of the inputs. held(): objects whose
        memory the launches read. settled(): whether the step would make nothing anew that is kept. The results lie in
        memory that the next run may overwrite.
        """
        if key not in self.recordings:
            with cupy.cuda.using_allocator(self.pool.malloc), self.stream:
                self.seen[hash(key)] += 1
                if self.seen[hash(key)] <= UNRECORDED or not settled():
                    return step([cupy.asarray(array) for array in inputs])
            while len(self.recordings) >= MOST:
                del self.recordings[next(iter(self.recordings))]
            self.recordings[key] = self._record(inputs, step, held)
        else:
            self.recordings[key] = self.recordings.pop(key)  # the latest used one is the last
        recording = self.recordings[key]
        with self.stream:
            for target, array in zip(recording.inputs, inputs, strict=True):
                target.set(array)
            recording.graph.launch(self.stream)
        return recording.results

    def _record(
        self, inputs: Sequence[np.ndarray], step: Callable[[list[Array]], Any], held: Callable[[], Any]
    ) -> Recording:
        with self.stream:
            targets = [cupy.asarray(array) for array in inputs]
            device = cupy.cuda.Device().id
            branches.streams(device)
            for branch in range(branches.COUNT + 1):
                handle_of(device, branch)
            with cupy.cuda.using_allocator(self.pool.malloc):
                self.stream.begin_capture()
                try:
                    results = step(targets)
                finally:
                    graph = self.stream.end_capture()
        return Recording(graph, targets, results, held())

    def memory_bytes(self) -> int:
        """What the pool has taken from the device."""
        return int(self.pool.total_bytes())
