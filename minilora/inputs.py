"""What one pass reads: a user's tokens, labels and segments, checked, and made into a `Batch`. All of it on the host.

`checked` and `shifted_labels` say what each position has to predict, `owned_labels` and `loss_weights` whose loss it is
and what that is multiplied by, `labelled_positions` and `Batch` hold what is left. Axes: B batch, T time, S keys,
M labelled positions.

Left out: how texts become tokens and rows (data/), and what is computed from a Batch (models/causal_lm.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .backend import Array, to_device, to_numpy
from .errors import MiniloraError

IGNORED = -100  # the label of a position without a loss, as in torch and Hugging Face
NO_LABEL = (
    f"the batch has no label to train on: expected one that is not {IGNORED} behind the first token of a row or "
    "segment, and in a row with an adapter where set_adapter(rows=...) names them"
)


# --- what was given -------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """(B, T) integers that fit one another and the model. targets: what each position has to predict, or IGNORED."""

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None


def checked(
    tokens: Any, labels: Any, segments: Any, *, rows: Sequence[str | None] | None, context: int, vocabulary: int
) -> Checked:
    """What a user gives for one pass; labels are the tokens where they are None.

    rows: the adapter of each row of the batch, where there is one for each. context: the most positions that the model
    has. MiniloraError for anything that does not fit.
    """
    tokens = _rectangle("tokens", tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.shape[1] == 0:
        raise MiniloraError(f"tokens must be integers of shape (B, T), found {tokens.dtype} of shape {tokens.shape}")
    if rows is not None and len(rows) != len(tokens):
        raise MiniloraError(f"set_adapter(rows=...) names {len(rows)} rows, and the batch has {len(tokens)}")
    labels = tokens if labels is None else _rectangle("labels", labels)
    segments = None if segments is None else _rectangle("segments", segments)
    for name, array in (("labels", labels), ("segments", segments)):
        if array is not None and (array.shape != tokens.shape or array.dtype.kind not in "iu"):
            raise MiniloraError(
                f"{name} must be integers of the tokens' shape {tokens.shape}, "
                f"found {array.dtype} of shape {array.shape}"
            )
    if tokens.shape[1] > context:
        raise MiniloraError(
            f"the sequence has {tokens.shape[1]} tokens, over the model's context of {context}: shorten it"
        )
    targets = shifted_labels(labels.astype(np.int64), segments)
    for name, ids in (("token", tokens), ("label", targets[targets != IGNORED])):
        low, high = ids.min(initial=0), ids.max(initial=0)
        if low < 0 or high >= vocabulary:
            raise MiniloraError(
                f"{name} ids must lie in 0 … {vocabulary - 1}, found {low} … {high}: is the tokenizer another model's?"
            )
    return Checked(tokens, targets, segments)


def _rectangle(name: str, rows: Any) -> np.ndarray:
    """The rows as one NumPy array; MiniloraError where their lengths differ."""
    try:
        return to_numpy(rows)
    except ValueError:
        raise MiniloraError(f"the rows of {name} differ in length: pad them to one, with segments 0 there") from None


# --- positions and labels -------------------------------------------------------------------------------------------


def segment_positions(segments: np.ndarray) -> np.ndarray:
    """Each token's position within its segment: 0, 1, 2 … from where the segment number changes. (B, T) -> (B, T)."""
    index = np.arange(segments.shape[1])
    starts = np.ones_like(segments, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def shifted_labels(labels: np.ndarray, segments: np.ndarray | None) -> np.ndarray:
    """What each position has to predict, (B, T): the next one's label, IGNORED at the end and where a segment ends."""
    targets = np.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    if segments is not None:
        targets[:, :-1][segments[:, 1:] != segments[:, :-1]] = IGNORED
        targets[segments == 0] = IGNORED
    return targets


def owned_labels(targets: np.ndarray, rows: Sequence[str | None] | None) -> dict[str, np.ndarray]:
    """The positions that carry a loss, (B, T) Booleans: those of each adapter's rows by its name, or all under "".

    Who has none is left out, and so are rows of the bare base.
    """
    labelled = targets != IGNORED
    owned = {"": labelled}
    if rows is not None:
        names = dict.fromkeys(name for name in rows if name is not None)
        owned = {name: labelled & np.array([row == name for row in rows])[:, None] for name in names}
    return {name: mine for name, mine in owned.items() if mine.any()}


def loss_weights(
    owned: Mapping[str, np.ndarray], shape: tuple[int, ...], normaliser: float | Mapping[str, float] | None
) -> np.ndarray:
    """What each position's loss is multiplied by, (B, T) float64: 1 / normaliser, or the own one of who owns it.

    owned: see `owned_labels`. normaliser: None for the count of each owner's labels. MiniloraError where nothing has a
    label, and for a normaliser that is none.
    """
    if not owned:
        raise MiniloraError(NO_LABEL)
    weights = np.zeros(shape)
    for name, mine in owned.items():
        total = mine.sum() if normaliser is None else normaliser
        if isinstance(total, Mapping):
            if name not in total:
                whose = f"adapter {name!r}" if name else "one adapter for all rows, which takes a plain number"
                raise MiniloraError(f"normaliser names {', '.join(total) or 'nothing'}, expected {whose}")
            total = total[name]
        if not 0 < total < np.inf:
            raise MiniloraError(f"normaliser is {total}, expected the number of label tokens to divide by")
        weights[mine] = 1 / total
    return weights


# --- what a pass is given -------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """M positions that carry a loss: their places among the B T (None for all), the tokens that they are to predict,
    and what each loss is multiplied by.
    """

    places: Array | None
    labels: Array
    weights: Array


def labelled_positions(targets: np.ndarray, weights: np.ndarray, dtype: np.dtype, bucket: int = 1) -> Labelled:
    """The positions whose target is not IGNORED; targets and weights (B, T), the weights are held in `dtype`.

    bucket: their number is made a multiple of it by positions of weight 0, for steps that are recorded.
    """
    targets, weights = targets.reshape(-1), weights.reshape(-1)
    index = np.flatnonzero(targets != IGNORED)
    if more := -len(index) % bucket:
        index = np.sort(np.concatenate([index, np.flatnonzero(targets == IGNORED)[:more]]))
    counted = targets[index] != IGNORED
    return Labelled(
        places=index if len(index) < targets.size else None,
        labels=np.where(counted, targets[index], 0),
        weights=np.where(counted, weights[index], 0.0).astype(dtype),
    )


@dataclass(frozen=True)
class Batch:
    """What one pass reads, all on one device: tokens (B, T), positions (B or 1, T), segments (B, S) or None, and what
    carries a loss, by adapter where those are selected by row.
    """

    tokens: Array
    positions: Array
    segments: Array | None = None
    labelled: Mapping[str, Labelled] = field(default_factory=dict)

    def arrays(self) -> list[Array]:
        """All arrays, in one order."""
        held = [self.tokens, self.positions, self.segments]
        held += [array for part in self.labelled.values() for array in part]
        return [array for array in held if array is not None]

    def of(self, arrays: Iterator[Array]) -> Batch:
        """A batch of the same form with the next of other arrays, in the order of `arrays`."""

        def following(array: Array | None) -> Array | None:
            return None if array is None else next(arrays)

        tokens, positions, segments = map(following, (self.tokens, self.positions, self.segments))
        labelled = {name: Labelled(*map(following, part)) for name, part in self.labelled.items()}
        return Batch(tokens, positions, segments, labelled)

    def on(self, device: str) -> Batch:
        """The same batch on a device."""
        return self.of(to_device(array, device) for array in self.arrays())
