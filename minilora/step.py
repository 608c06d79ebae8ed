"""How one training step is executed: forward and backward over the micro-batches, clipping, the optimiser's update.

The model, the ops and the optimiser know nothing of it, and however a step runs it gives the same gradients to
rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np

from .backend import Array
from .errors import MiniloraError
from .models.causal_lm import NO_LABEL
from .optim import AdamW, clip_grad_norm, global_norm


class MicroBatch(NamedTuple):
    """What one pass sees: tokens (B, T), labels (B, T) or None for the tokens, segments (B, T) or None."""

    tokens: np.ndarray
    labels: np.ndarray | None = None
    segments: np.ndarray | None = None


class TrainStep:
    """One optimiser step on a model: `step(tokens, labels)` is zero_grad, loss, backward, clip and opt.step in one.

    The result is the loss as a 0-d array on the model's device: `float(loss)` reads it back, and until then nothing
    waits.
    max_grad_norm: clip the gradients' global norm to it (None: no clipping). grad_norm: the norm before clipping, after
    a step.
    """

    def __init__(self, model: Any, optimiser: AdamW, max_grad_norm: float | None = None) -> None:
        self.model, self.optimiser, self.max_grad_norm = model, optimiser, max_grad_norm
        self.grad_norm: Array | None = None

    def __call__(
        self, tokens: np.ndarray, labels: np.ndarray | None = None, segments: np.ndarray | None = None
    ) -> Array:
        loss = self.gradients([MicroBatch(tokens, labels, segments)])
        self.update()
        return loss

    def gradients(self, batches: Iterable[MicroBatch | Sequence[Any]]) -> Array:
        """Set `.grad` to the gradient of the mean loss over all label tokens of all micro-batches; return that loss.

        Each micro-batch's sum is divided by the total count of label tokens: a mean of means would weigh tokens
        unequally. With set_adapter(rows=...) each adapter's sum is divided by the adapter's own total.
        """
        batches = [MicroBatch(*batch) for batch in batches]
        counts = [self.model.label_count(*batch) for batch in batches]
        total = reduce(add, counts) if counts else 0
        if not total:
            raise MiniloraError(NO_LABEL)
        self.optimiser.zero_grad()
        loss: Array | None = None
        for batch, count in zip(batches, counts, strict=True):
            if count:
                part = self.model.loss(*batch, normaliser=total)
                part.backward()
                loss = part.data if loss is None else loss + part.data
        assert loss is not None
        return loss

    def update(self) -> None:
        """Clip the gradients, if asked to, and let the optimiser take its step."""
        self.clip()
        self.optimiser.step()

    def clip(self) -> Array:
        """The gradients' global norm, a 0-d array, after which they are clipped, to be looked at before the update."""
        if self.max_grad_norm is not None:
            self.grad_norm = clip_grad_norm(self.optimiser.parameters, self.max_grad_norm)
        else:
            self.grad_norm = global_norm(self.optimiser.parameters)
        return self.grad_norm
