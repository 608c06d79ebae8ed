"""The examples of a run, whatever they were handed over as, checked against the model before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import Batches, Dataset, Example, batches, load_data
from ..errors import MiniloraError
from .config import TrainConfig
from .progress import Quiet

if TYPE_CHECKING:
    from ..model import Model


@dataclass(frozen=True)
class Examples:
    """What is trained on, what is validated on (perhaps nothing), and the most tokens that a row may have."""

    train: Sequence[Example]
    valid: Sequence[Example]
    max_length: int

    def plan(self, config: TrainConfig, epoch: int) -> Batches:
        """The batches of an epoch."""
        return batches(self.train, config.batch_size, config.seed, epoch, config.packing, self.max_length)


def examples_of(
    model: Model,
    data: str | Path | Dataset | Sequence[Example],
    valid: Sequence[Example] | None,
    config: TrainConfig,
    show: Quiet,
) -> Examples:
    """The examples of `data`, with an account of rows kept, cut and dropped, and of padding, shown.

    Raises MiniloraError for data that cannot be trained on, and for validation that is asked for without rows for it.
    """
    context = model.config.max_position_embeddings
    length = config.row_length(context)
    if isinstance(data, str | Path):
        fraction = 0.0 if valid is not None else config.valid_fraction
        data = load_data(data, model.tokenizer, length, config.mask_prompt, fraction, config.seed)
    elif config.valid_fraction:
        raise MiniloraError("valid_fraction splits a file that is read from a path: hand other rows over as valid=")
    if isinstance(data, Dataset):
        show.line(data.summary())
        train: Sequence[Example] = data.train
        valid = data.valid if valid is None else valid
    else:
        train, valid = data, valid or []
    if not train:
        raise MiniloraError("there are no rows to train on: expected a train split with at least one")
    if config.max_length is None:  # rows that were not cut here may be longer than the default
        length = max(length, *(len(example.tokens) for example in [*train, *valid]))
    for split, examples in (("training", train), ("validation", valid)):
        _check(split, examples, min(length, context), model.config.vocab_size)
    if config.eval_every and not valid:
        raise MiniloraError(
            f"found eval_every = {config.eval_every} and no rows to validate on: give a folder with valid.jsonl, "
            "or valid_fraction, or leave eval_every out"
        )
    found = Examples(train, valid, length)
    show.line(f"each epoch: {found.plan(config, 0).summary()}")
    return found


def _check(split: str, examples: Sequence[Example], length: int, vocabulary: int) -> None:
    for number, example in enumerate(examples):
        if len(example.tokens) > length:
            raise MiniloraError(
                f"{split} example {number} has {len(example.tokens):,} tokens, over the {length:,} that a row may have "
                "(max_length, or the model's context): cut it"
            )
        if not example.label_count:
            raise MiniloraError(f"{split} example {number} has no label that counts, expected at least one: drop it")
        if (highest := int(example.tokens.max())) >= vocabulary:
            raise MiniloraError(
                f"{split} example {number} has the token {highest}, expected less than {vocabulary}, the model's "
                "vocabulary: is the tokenizer another model's?"
            )
