"""Puts examples together into batches: rows of similar length, or documents packed into rows of a given length.

The plan of an epoch is decided by (seed, epoch) alone and costs a sort; a batch is built when it is asked for. So a run
can go on at batch k of epoch e without building what came before. Left out: moving arrays to a device, dividing batches
among ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import MiniloraError
from .encoding import IGNORED, Example, IntArray

MOST_BATCHES_IN_WINDOW = 50  # rows are sorted by length inside a window of so many batches
FEWEST_WINDOWS = 4  # in small data sets too, else every epoch would put the same rows together


@dataclass
class Batch:
    """Rows of equal length for one pass of the model.

    tokens, labels: (B, T) int64, filled up on the right with the pad id and -100. The first label of every document is
    -100. segments: (B, T) int64, 1, 2, 3 ... per document and 0 for padding, positions restarting at each document and
    attention staying inside it; None where each row is one document: causal attention never looks at padding on its
    right. label_count: labels that the loss counts. padding_share: padding in B·T, as a fraction.
    """

    tokens: IntArray
    labels: IntArray
    segments: IntArray | None
    label_count: int
    padding_share: float


class Batches:
    """The batches of one epoch: `len`, iteration, and `[k]`, which costs the same for every k.

    padding_share: padding in all positions of the epoch, as a fraction.
    """

    def __init__(self, examples: Sequence[Example], plan: "_Plan", packing: bool, pad_token_id: int):
        self._examples = examples
        self._plan = plan
        self._packing = packing
        self._pad_token_id = pad_token_id
        positions = sum(len(rows) * width for rows, width in zip(plan.batches, plan.widths, strict=True))
        self._tokens = int(plan.rows.lengths.sum())
        self.padding_share = 1 - self._tokens / positions

    def __len__(self) -> int:
        return len(self._plan.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self[k] for k in range(len(self)))

    def example_numbers(self, k: int) -> list[list[int]]:
        """For each row of batch k, the numbers of the examples that it holds."""
        return [self._plan.rows.members(row) for row in self._plan.batches[k]]

    def __getitem__(self, k: int) -> Batch:
        numbers = self.example_numbers(k)
        shape = len(numbers), self._plan.widths[k]
        tokens = np.full(shape, self._pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        segments = np.zeros(shape, dtype=np.int64)
        for row, members in enumerate(numbers):
            start = 0
            for segment, number in enumerate(members, start=1):
                example = self._examples[number]
                stop = start + len(example.tokens)
                tokens[row, start:stop] = example.tokens
                labels[row, start + 1 : stop] = example.labels[1:]
                segments[row, start:stop] = segment
                start = stop
        label_count = int(np.count_nonzero(labels != IGNORED))
        padding_share = float(np.mean(segments == 0))
        return Batch(tokens, labels, segments if self._packing else None, label_count, padding_share)

    def summary(self) -> str:
        """One line for people."""
        rows = f"{len(self._plan.rows.lengths):,} {'packed rows' if self._packing else 'rows'}"
        return f"{len(self):,} batches, {rows}, {self._tokens:,} tokens, padding {self.padding_share:.1%}"


def batches(
    examples: Sequence[Example],
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    packing: bool = False,
    max_length: int | None = None,
    shuffle: bool = True,
    pad_multiple: int = 1,
    pad_token_id: int = 0,
) -> Batches:
    """Plans an epoch in which every example comes once, in batches of batch_size rows (one batch may have fewer).

    Rows are shuffled, sorted by length inside windows, cut into batches, and the batches shuffled. shuffle=False sorts
    all rows, the longest first: least padding, and the peak of memory at the start. packing=True joins whole documents
    into rows of up to max_length tokens. T is the longest row's, rounded up to pad_multiple where max_length allows it;
    pad_multiple=max_length gives all batches one width. Raises MiniloraError for arguments that cannot be met.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("pad_multiple", pad_multiple, 1), ("seed", seed, 0)):
        if value < least:
            raise MiniloraError(f"{name} is {value}; expected at least {least}; raise it")
    lengths = np.fromiter((len(example.tokens) for example in examples), dtype=np.int64, count=len(examples))
    if not len(lengths):
        raise MiniloraError(
            "found no examples to put into batches; expected at least one; check the file of this split"
        )
    if not lengths.all():
        raise MiniloraError(f"example {lengths.argmin()} has no tokens; expected at least one; remove the example")
    if max_length is not None and lengths.max() > max_length:
        raise MiniloraError(
            f"example {lengths.argmax()} has {lengths.max():,} tokens, more than max_length {max_length:,}; "
            "load the data with this max_length, or raise it"
        )

    generator = np.random.default_rng([seed, epoch])

    def order(count: int) -> IntArray:
        return generator.permutation(count) if shuffle else np.arange(count)

    if not packing:
        rows = _Rows(np.arange(len(lengths)), np.arange(len(lengths) + 1), lengths)
    elif max_length is None:
        raise MiniloraError("found packing without max_length; expected the number of tokens in a row; give max_length")
    else:
        rows = _pack(lengths, order(len(lengths)), max_length)
    count = len(rows.lengths)
    windows_of = min(max(count // (FEWEST_WINDOWS * batch_size), 1), MOST_BATCHES_IN_WINDOW) if shuffle else count
    shuffled = order(count)
    by_length = shuffled[np.lexsort((-rows.lengths[shuffled], np.arange(count) // (windows_of * batch_size)))]
    row_batches = [by_length[start : start + batch_size] for start in range(0, count, batch_size)]
    row_batches = [row_batches[k] for k in order(len(row_batches))]
    longest = [int(rows.lengths[batch[0]]) for batch in row_batches]
    widths = [-(-length // pad_multiple) * pad_multiple for length in longest]
    if max_length is not None:
        widths = [min(width, max_length) for width in widths]
    return Batches(examples, _Plan(rows, row_batches, widths), packing, pad_token_id)


def batch_stream(
    examples: Sequence[Example],
    batch_size: int,
    seed: int = 0,
    start: tuple[int, int] = (0, 0),
    packing: bool = False,
    max_length: int | None = None,
    shuffle: bool = True,
    pad_multiple: int = 1,
    pad_token_id: int = 0,
) -> Iterator[tuple[int, int, Batch]]:
    """Yields (epoch, index in the epoch, Batch) without end, from `start` on; other arguments as for `batches`.

    A run that stopped after (epoch, index) goes on with start=(epoch, index + 1), also after the last batch of an
    epoch. Raises MiniloraError where the epoch has no such batch.
    """
    epoch, index = start
    while True:
        plan = batches(examples, batch_size, seed, epoch, packing, max_length, shuffle, pad_multiple, pad_token_id)
        if not 0 <= index <= len(plan):
            raise MiniloraError(
                f"found batch {index} to start at, but epoch {epoch} has {len(plan):,} batches; "
                "resume with the data, batch size and seed of the run that was interrupted"
            )
        for k in range(index, len(plan)):
            yield epoch, k, plan[k]
        epoch, index = epoch + 1, 0


@dataclass(frozen=True)
class _Rows:
    """Documents in rows, flat: row r holds the examples flat[starts[r] : starts[r + 1]], lengths[r] tokens together."""

    flat: IntArray
    starts: IntArray
    lengths: IntArray

    def members(self, row: int) -> list[int]:
        members: list[int] = self.flat[self.starts[row] : self.starts[row + 1]].tolist()
        return members


@dataclass(frozen=True)
class _Plan:
    """An epoch: the row numbers of each batch, in the order of training, and each batch's T."""

    rows: _Rows
    batches: list[IntArray]
    widths: list[int]


def _pack(lengths: IntArray, order: IntArray, capacity: int) -> _Rows:
    """Best fit decreasing: the longest document first, each into the row where it leaves the least space.

    Needs at most 11/9 of the fewest possible rows, and a constant (Johnson, Demers, Ullman, Garey, Graham 1974,
    "Worst-case performance bounds for simple one-dimensional packing algorithms"). `order` decides between documents of
    equal length.
    """
    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # [s]: rows in which exactly s tokens are free
    spaces = 0  # bit s is set where rows_by_space[s] has a row: the best fit is the lowest bit from the length up
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    for number, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        if space > length:
            rows_by_space[space - length].append(row)
            spaces |= 1 << (space - length)
    flat = np.array([number for row in rows for number in row])
    starts = np.cumsum([0, *(len(row) for row in rows)])
    return _Rows(flat, starts, np.add.reduceat(lengths[flat], starts[:-1]))
