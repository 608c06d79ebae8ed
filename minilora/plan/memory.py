"""One training step on shapes: how many bytes of weights, gradients, optimiser state and activations it takes.

The network's own code runs forward and backward over the engine's own tape, with the rules of rules.py in the place of
arithmetic; so what is kept, and until when, is what the engine keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import compute_dtype
from ..errors import MiniloraError
from ..inputs import IGNORED
from ..lora import LoraConfig
from ..models import CausalLM
from ..tensor import Tensor
from ..train.config import DEFAULT_LENGTH
from .adapters import attach
from .rules import Rules
from .shapes import Ledger, ShapeArray, shape_network

MOST_TOKENS = 1 << 22  # of a micro-batch: their numbers and positions are the only arrays that a plan really makes
MOMENTS = 2  # arrays of a parameter's size that Adam keeps: m and v
UPDATE_TEMPORARIES = 3  # arrays of a parameter's size while it is updated: √v, m over it, that times the rate


@dataclass(frozen=True)
class Step:
    """What a step computes on: one micro-batch of `batch_size` rows of `length` tokens (None: DEFAULT_LENGTH, or the
    model's context if shorter).

    label_share: the part of the tokens that carry a loss. device: "cpu", or "cuda", of which a plan is an estimate.
    """

    batch_size: int = 1
    length: int | None = None
    checkpoint: bool = False
    label_share: float = 1.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("length", self.length, 2)):
            if value is not None and value < least:
                raise MiniloraError(f"{name} is {value}, expected at least {least}")
        if not 0 < self.label_share <= 1:
            raise MiniloraError(f"label_share is {self.label_share}, expected above 0 and at most 1")
        if self.device not in ("cpu", "cuda"):
            raise MiniloraError(f"device is {self.device!r}, expected cpu or cuda")

    def row_length(self, context: int) -> int:
        """Tokens of a row with a model of this context; MiniloraError if more are asked for."""
        if self.length is None:
            return min(DEFAULT_LENGTH, context)
        if self.length > context:
            raise MiniloraError(f"length is {self.length:,}, over the model's context of {context:,} tokens: lower it")
        return self.length


@dataclass(frozen=True)
class Memory:
    """Numbers of parameters, and bytes at the peak of a step; `peak` is the sum of the bytes.

    weights: the base, in the dtype that it is held in (a trained one in float32). adapter: all that it holds
    (A and B, DoRA's magnitudes, copies of what it trains whole). activations: what
    forward keeps for backward. working: everything else at the peak: results on their way, buffers that are used again,
    temporaries of the update.
    """

    parameters: int
    trained: int
    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    working: int

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimiser + self.activations + self.working


def step_memory(
    config: dict[str, Any], lora: LoraConfig | None, step: Step, held: np.dtype[Any]
) -> tuple[Memory, dict[str, tuple[int, ...]]]:
    """The memory of one step on the network of a config.json's contents, and the shapes of what is saved, by name.

    lora: the adapter that is trained; None: every parameter of the base is. held: the dtype that a frozen base is held
    in. Raises MiniloraError for a config, targets or a length that cannot be.
    """
    network = shape_network(config, held, _computes(step, held))
    base, ledger = dict(network.named_parameters()), Ledger()
    if lora is None:
        saved = base
        for parameter in saved.values():
            parameter.data = ShapeArray(parameter.shape, compute_dtype(held))
            parameter.requires_grad = True
    else:
        saved = attach(network, lora, ledger)
    trained = {name: parameter for name, parameter in saved.items() if parameter.requires_grad}
    kept = run(network, step, ledger, trained.values())
    ledger.passing(UPDATE_TEMPORARIES * max(parameter.data.nbytes for parameter in trained.values()))
    gradients = sum(parameter.grad.nbytes for parameter in trained.values() if parameter.grad is not None)
    memory = Memory(
        parameters=sum(parameter.size for parameter in base.values()),
        trained=sum(parameter.size for parameter in trained.values()),
        weights=_bytes(base),
        adapter=0 if lora is None else _bytes(saved),
        gradients=gradients,
        optimiser=MOMENTS * _bytes(trained),
        activations=kept,
        working=max(0, ledger.peak - gradients - kept),
    )
    return memory, {name: parameter.shape for name, parameter in saved.items()}


def run(network: CausalLM, step: Step, ledger: Ledger, trained: Iterable[Tensor]) -> int:
    """Two steps, forward and backward; the bytes that the second kept between them.

    The first leaves buffers and scratch behind, which the second's peak comes on top of.
    """
    length = step.row_length(network.config.max_position_embeddings)
    if (tokens := step.batch_size * length) > MOST_TOKENS:
        raise MiniloraError(
            f"batch_size is {step.batch_size:,}, which with rows of {length:,} is {tokens:,} tokens at once, expected "
            f"at most {MOST_TOKENS:,}: lower it"
        )
    shape, targets = (step.batch_size, length), np.zeros(step.batch_size * length, np.int64)
    labels = max(1, round(step.label_share * step.batch_size * (length - 1)))  # nothing predicts a row's first token
    targets[labels:] = IGNORED
    network.checkpoint = step.checkpoint
    batch = network.loss_batch(np.zeros(shape, np.int64), {"": targets.reshape(shape)}, np.ones(shape))
    kept = 0
    rules = Rules(ledger, on_gpu=step.device == "cuda", keeps_copies=not step.checkpoint)
    with rules.applied():
        for _ in range(2):
            for parameter in trained:
                parameter.grad = None
            (loss,) = network.loss_sums(batch).values()
            kept = ledger.alive - sum(copy.nbytes for copy in rules.copies.values())
            loss.backward(ShapeArray.taken(ledger, (), np.float32))
    return kept


def _computes(step: Step, held: np.dtype[Any]) -> Any:
    """The dtype of activations: on the CPU at least float32, on a GPU that of the weights.

    Only its size counts: NumPy's own float16 stands for bfloat16, too.
    """
    if step.device == "cuda" and held.itemsize == 2:
        return np.float16
    return np.float64 if held == np.float64 else np.float32


def _bytes(parameters: Mapping[str, Tensor]) -> int:
    return sum(parameter.data.nbytes for parameter in parameters.values())
