"""How one training step is executed: forward and backward over the micro-batches, clipping, the optimiser's update.

On a GPU a step is recorded as a CUDA graph for each shape of its inputs, where nothing in it depends on the host.

The model, the ops and the optimiser know nothing of it, and however a step runs it gives the same gradients to
rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np

from .backend import Array
from .errors import MiniloraError
from .inputs import NO_LABEL, Batch
from .optim import AdamW, clip_grad_norm, global_norm
from .recording import can_be_recorded, is_settled, label_bucket, lengthened, read_by_recordings, recording_key


class MicroBatch(NamedTuple):
    """What one pass sees: tokens (B, T), labels (B, T) or None for the tokens, segments (B, T) or None; rows: the
    adapter of each row, for set_adapter(rows=...), or None to leave the selection as it is.
    """

    tokens: np.ndarray
    labels: np.ndarray | None = None
    segments: np.ndarray | None = None
    rows: Sequence[str | None] | None = None


class TrainStep:
    """One optimiser step on a model: `step(tokens, labels)` is zero_grad, loss, backward, clip and opt.step in one.

    The result is the loss as a 0-d array on the model's device: `float(loss)` reads it back, and until then nothing
    waits.
    max_grad_norm: clip the gradients' global norm to it (None: no clipping). grad_norm: the norm before clipping, after
    a step.

    Many adapters at once, one pass over the frozen weights for all of them:

        step = TrainStep(model, {"a": AdamW(model.adapter_parameters("a")), "b": AdamW(model.adapter_parameters("b"))})
        losses = step(tokens, labels, rows=["a", "b", "b"])    # {"a": its loss, "b": its loss}

    Each adapter then trains as in a run of its own on its own rows: the mean over its own label tokens, its own
    clipping (max_grad_norm may be a dict, too), its own Adam step, its own dropout masks. One that has no label in a
    step takes none. Losses and grad_norm are dicts by adapter.
    """

    def __init__(
        self,
        model: Any,
        optimiser: AdamW | Mapping[str, AdamW],
        max_grad_norm: float | Mapping[str, float | None] | None = None,
    ) -> None:
        self.model, self.optimiser = model, optimiser
        self.by_adapter = isinstance(optimiser, Mapping)
        self.optimisers = dict(optimiser) if isinstance(optimiser, Mapping) else {"": optimiser}
        if self.by_adapter:
            check_optimisers(model, self.optimisers)
        given = max_grad_norm if isinstance(max_grad_norm, Mapping) else dict.fromkeys(self.optimisers, max_grad_norm)
        if unknown := set(given) - set(self.optimisers):
            raise MiniloraError(f"max_grad_norm names {min(unknown)!r}, which no optimiser belongs to")
        self.max_grad_norm = given
        self.grad_norm: Any = None
        self.trained: list[str] = []  # the optimisers that step next
        self.recorder: Any = None  # on a GPU: the steps that were recorded

    def __call__(
        self,
        tokens: np.ndarray,
        labels: np.ndarray | None = None,
        segments: np.ndarray | None = None,
        rows: Sequence[str | None] | None = None,
    ) -> Any:
        loss = self.gradients([MicroBatch(tokens, labels, segments, rows)])
        self.update()
        return loss

    def gradients(self, batches: Iterable[MicroBatch | Sequence[Any]]) -> Any:
        """Set `.grad` to the gradient of the mean loss over all label tokens of all micro-batches; return that loss.

        Each micro-batch's sum is divided by the total count of label tokens: a mean of means would weigh tokens
        unequally. With rows each adapter's sum is divided by the adapter's own total.
        """
        given = [MicroBatch(*batch) for batch in batches]
        if len({batch.rows is None for batch in given}) > 1:
            raise MiniloraError("found micro-batches with rows and others without, expected rows=[...] for all or none")
        counts = [self._count(batch) for batch in given]
        total = reduce(add, counts) if counts else 0
        if not total:
            raise MiniloraError(NO_LABEL)
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()
        for parameter in self.model.parameters().values():  # also what no optimiser was given: it must not add up
            parameter.grad = None
        labelled = [batch for batch, count in zip(given, counts, strict=True) if count]
        losses = self._passes(labelled, total)
        self._forget_gradients_of_nothing(given, losses)
        self.trained = list(losses) if self.by_adapter else list(self.optimisers)
        return losses if self.by_adapter else reduce(add, losses.values())

    def _passes(self, batches: Sequence[MicroBatch], total: Any) -> dict[str, Array]:
        """Forward and backward of all micro-batches, launch by launch or as one recording; the losses by adapter."""
        recorded = all(map(self._can_be_recorded, batches))
        prepared = []
        for batch in batches:
            self._select(batch)
            if recorded:
                batch = lengthened(batch, self.model.config.max_position_embeddings)
            bucket = label_bucket(batch) if recorded else 1
            prepared.append(self.model.loss_batch(*batch[:3], normaliser=total, bucket=bucket))
        if recorded:
            return self._recorded(batches, prepared)
        return self._forward_and_backward(batches, [batch.on(self.model.device) for batch in prepared])

    def _forward_and_backward(self, batches: Sequence[MicroBatch], prepared: Sequence[Batch]) -> dict[str, Array]:
        losses: dict[str, Array] = {}
        for batch, inputs in zip(batches, prepared, strict=True):
            self._select(batch)
            parts = self.model.losses_of(inputs)
            loss = reduce(add, parts.values())
            if not loss.requires_grad:
                raise MiniloraError(
                    "nothing that is trained takes part in the loss: select an adapter with set_adapter, or unfreeze "
                    "something"
                )
            loss.backward()
            for name, part in parts.items():
                losses[name] = losses[name] + part.data if name in losses else part.data
        return losses

    def _recorded(self, batches: Sequence[MicroBatch], prepared: Sequence[Batch]) -> dict[str, Array]:
        """The same through a CUDA graph: see kernels/cuda/graph.py."""
        from .kernels.cuda.graph import Recorder

        if self.recorder is None:
            self.recorder = Recorder()
        parameters = [p for optimiser in self.optimisers.values() for p in optimiser.parameters.values()]
        arrays = [array for batch in prepared for array in batch.arrays()]
        shapes = tuple((array.shape, array.dtype.str) for array in arrays)
        addresses = tuple(parameter.data.data.ptr for parameter in parameters)
        selections = tuple(None if batch.rows is None else tuple(batch.rows) for batch in batches)
        key = (shapes, addresses, selections, *recording_key(self.model))

        def step(on_device: list[Array]) -> tuple[dict[str, Array], list[Array | None]]:
            rest = iter(on_device)
            losses = self._forward_and_backward(batches, [batch.of(rest) for batch in prepared])
            return losses, [parameter.grad for parameter in parameters]

        held = partial(read_by_recordings, self.model, [batch.rows for batch in batches])
        losses, grads = self.recorder.run(key, arrays, step, held, partial(is_settled, self.model))
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        return {name: loss.copy() for name, loss in losses.items()}  # the next step writes over the recording's own

    def update(self) -> None:
        """Clip the gradients, if asked to, and let the optimiser take its step."""
        self.clip()
        for name in self.trained:
            self.optimisers[name].step()

    def clip(self) -> Any:
        """The gradients' global norm, a 0-d array (a dict of them by adapter), after which they are clipped."""
        norms = {}
        for name in self.trained:
            parameters, limit = self.optimisers[name].parameters, self.max_grad_norm.get(name)
            norms[name] = global_norm(parameters) if limit is None else clip_grad_norm(parameters, limit)
        self.grad_norm = norms if self.by_adapter else norms[""]
        return self.grad_norm

    def _select(self, batch: MicroBatch) -> None:
        if batch.rows is not None:
            self.model.set_adapter(rows=batch.rows)

    def _can_be_recorded(self, batch: MicroBatch) -> bool:
        self._select(batch)
        return can_be_recorded(self.model)

    def _count(self, batch: MicroBatch) -> Any:
        """The label tokens of a micro-batch, by adapter where its rows have their own."""
        self._select(batch)
        count = self.model.label_count(*batch[:3])
        if self.by_adapter:
            if not isinstance(count, Mapping):
                raise MiniloraError("found one adapter for all rows and an optimiser for each, expected rows=[...]")
            for name in count:
                if name not in self.optimisers:
                    have = ", ".join(map(repr, self.optimisers))
                    raise MiniloraError(f"rows names the adapter {name!r}, and optimisers were given for {have}")
        return count

    def _forget_gradients_of_nothing(self, batches: Iterable[MicroBatch], losses: Mapping[str, Array]) -> None:
        """An adapter whose rows carry no label got zeros, which Adam would take for a gradient and step on."""
        if "" in losses:  # one selection for all rows
            return
        named = {name for batch in batches for name in batch.rows or self.model.active_adapters if name is not None}
        for name in named - set(losses):
            for parameter in self.model.adapter_parameters(name).values():
                parameter.grad = None


def check_optimisers(model: Any, optimisers: Mapping[str, AdamW]) -> None:
    """MiniloraError unless each optimiser has parameters of the adapter that it stands under, and of no other."""
    if not optimisers:
        raise MiniloraError("found no optimiser, expected one for each adapter: {name: AdamW(...)}")
    for name, optimiser in optimisers.items():
        own = {id(parameter) for parameter in model.adapter_parameters(name).values()}
        for key, parameter in optimiser.parameters.items():
            if id(parameter) not in own:
                raise MiniloraError(
                    f"the optimiser of adapter {name!r} has {key}, which is no parameter of that adapter: "
                    f"make it with AdamW(model.adapter_parameters({name!r}))"
                )
