"""What a step needs to know to run as a CUDA graph (kernels/cuda/graph.py): may it, and what do its launches depend on?

A recording is of one shape of the inputs, so batches are brought to few shapes: `lengthened` rows, and a number of
labelled positions in steps of `label_bucket`. `recording_key` names the rest: a model whose key has changed launches
other kernels, or the same ones on other memory.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import to_numpy
from .inputs import IGNORED
from .lora.rows import places

if TYPE_CHECKING:
    from .step import MicroBatch

LABEL_BUCKETS = 16  # a recorded step takes the number of labelled positions as a multiple of a 16th of all positions
LENGTH_BUCKET = 64  # and its rows at a length that is a multiple of this: few recordings serve all lengths
# What is recorded and what is not wait for one another through the default stream that CuPy's threads share.
ONE_DEFAULT_STREAM = os.environ.get("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "0") == "0"


def can_be_recorded(model: Any) -> bool:
    """Whether a pass under the selected adapters is the same launches whatever the numbers: on a GPU, without dropout
    (its masks are drawn on the host's word).
    """
    on_gpu = model.device != "cpu" and ONE_DEFAULT_STREAM
    return on_gpu and not any(model.adapters[name].dropout for name in model.active_adapters)


def recording_key(model: Any) -> tuple[Hashable, ...]:
    """What the launches of a pass depend on besides its batch: the selection, checkpointing, and the tensors."""
    selection = model.network.adapter_state.selection
    adapters = [tensor for name in model.active_adapters for tensor in model.adapter_parameters(name).values()]
    addresses = tuple(tensor.data.data.ptr for tensor in adapters)
    return selection.weights, selection.rows, model.checkpoint, model.changes, addresses


def is_settled(model: Any) -> bool:
    """Whether a pass would find all that is kept from pass to pass: what it makes anew is not to be recorded."""
    from .kernels.cuda.lists import pass_of

    return pass_of(model.network).is_settled(model.dtype)


def read_by_recordings(model: Any, rows: Iterable[Sequence[str | None] | None]) -> list[Any]:
    """What a recorded pass reads and a later pass may replace; rows: the adapters by row of its batches."""
    from .kernels.cuda.lists import pass_of

    rotary = model.network.rotary
    owners = [(tuple(names), name) for names in rows if names is not None for name in dict.fromkeys(names)]
    indices = [places(names, name, model.device) for names, name in owners]
    return [None if rotary is None else rotary.tables, list(pass_of(model.network).buffers.values()), indices]


def label_bucket(batch: MicroBatch) -> int:
    """What the number of labelled positions is to be a multiple of."""
    return max(1, np.size(batch.tokens) // LABEL_BUCKETS)


def lengthened(batch: MicroBatch, most: int) -> MicroBatch:
    """The rows made a multiple of LENGTH_BUCKET long, `most` at most, by positions behind them without a label.

    No earlier position attends to them, so they change nothing.
    """
    length = np.shape(batch.tokens)[1]
    more = min(-(-length // LENGTH_BUCKET) * LENGTH_BUCKET, most) - length
    if more <= 0:
        return batch

    def longer(rows: Any, value: int) -> np.ndarray:
        return np.pad(to_numpy(rows), ((0, 0), (0, more)), constant_values=value)

    labels = longer(batch.tokens if batch.labels is None else batch.labels, IGNORED)
    segments = None if batch.segments is None else longer(batch.segments, 0)
    return batch._replace(tokens=longer(batch.tokens, 0), labels=labels, segments=segments)
