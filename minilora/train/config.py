"""`TrainConfig`: what a training run is, before anything is loaded. Every value is checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import MiniloraError
from ..optim import SCHEDULES

SAMPLES_PER_RUN = 8
DEFAULT_LENGTH = 1024  # tokens of a row where max_length is not given and the model's context allows it


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run; MiniloraError for a value that cannot be meant.

    out: the folder that everything is written to (see `folder.py`); None: nothing is written.
    steps, epochs: optimiser steps, or passes over the data; one of them, or neither for one epoch.
    batch_size: rows of one forward pass. accumulate: forward passes per step, their label tokens weighing the same.
    lr, betas, eps, weight_decay: AdamW's. max_grad_norm: the gradients' global norm is clipped to it (None: not).
    lora_plus_ratio: the learning rate of B, and of vectors, is this many times lr (LoRA+; None: the same).
    schedule: "constant", "linear" or "cosine", after a linear rise over `warmup`: a whole number of steps, or a
        fraction of all steps below 1.
    max_length: tokens of a row, longer ones are cut (None: 1024, or the model's context if that is shorter).
    packing: join whole documents into rows of max_length. mask_prompt: learn completions and assistant turns only.
    valid_fraction: the part of the training rows that is held back for validation, where there is no file for it.
    checkpoint: recompute each block in backward: less memory, about a third more time.
    eval_every: measure the validation loss every so many steps, before the first one too (None: at the end only).
    save_every: save every so many steps (None: at the end only). keep: how many earlier ones stay in checkpoints/.
    sample_prompt: texts that the model continues along the way, into metrics.jsonl, before the first step too.
    sample_every: after how many steps (None: eight times in a run).
    seed: decides the order of the data, and dropout. An adapter has a seed of its own.
    """

    out: str | Path | None = None
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    lora_plus_ratio: float | None = None
    warmup: int | float = 0.03
    schedule: str = "cosine"
    max_length: int | None = None
    packing: bool = False
    mask_prompt: bool = True
    valid_fraction: float = 0.0
    checkpoint: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 3
    sample_prompt: str | tuple[str, ...] | list[str] = ()
    sample_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.out is not None and (not isinstance(self.out, str | Path) or not str(self.out)):
            raise _bad("out", self.out, "a folder's name")
        if self.steps is not None and self.epochs is not None:
            raise MiniloraError(f"found steps = {self.steps} and epochs = {self.epochs}, expected one of them")
        for name in ("steps", "epochs", "eval_every", "save_every", "sample_every"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        for name, least in (("batch_size", 1), ("accumulate", 1), ("keep", 0), ("seed", 0)):
            self._whole(name, least)
        if self.max_length is not None:
            self._whole("max_length", 2)
        for name, hint in (("lr", "1e-4"), ("eps", "1e-8")):
            if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise _bad(name, getattr(self, name), f"a number above 0, e.g. {hint}")
        if self.max_grad_norm is not None and (not _is_number(self.max_grad_norm) or self.max_grad_norm <= 0):
            raise _bad("max_grad_norm", self.max_grad_norm, "a number above 0, e.g. 1.0, or none")
        if self.lora_plus_ratio is not None and (not _is_number(self.lora_plus_ratio) or self.lora_plus_ratio <= 0):
            raise _bad("lora_plus_ratio", self.lora_plus_ratio, "a number above 0, e.g. 16, or none")
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            raise _bad("weight_decay", self.weight_decay, "0 or more, e.g. 0.01")
        if (
            not isinstance(self.betas, tuple | list)
            or len(self.betas) != 2
            or not all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        ):
            raise _bad("betas", self.betas, "two numbers, each at least 0 and below 1, e.g. (0.9, 0.999)")
        object.__setattr__(self, "betas", tuple(self.betas))
        whole = isinstance(self.warmup, int) and not isinstance(self.warmup, bool)
        if not _is_number(self.warmup) or self.warmup < 0 or (not whole and self.warmup >= 1):
            raise _bad("warmup", self.warmup, "a whole number of steps, or a fraction of them below 1")
        if self.schedule not in SCHEDULES:
            raise _bad("schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        if not _is_number(self.valid_fraction) or not 0 <= self.valid_fraction < 1:
            raise _bad("valid_fraction", self.valid_fraction, "at least 0 and below 1, e.g. 0.05")
        for name in ("packing", "mask_prompt", "checkpoint"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "true or false")
        prompts = (self.sample_prompt,) if isinstance(self.sample_prompt, str) else self.sample_prompt
        if not isinstance(prompts, tuple | list) or not all(isinstance(text, str) and text for text in prompts):
            raise _bad("sample_prompt", self.sample_prompt, "a text to continue, or several")
        object.__setattr__(self, "sample_prompt", tuple(prompts))
        if self.sample_every is not None and not prompts:
            raise MiniloraError(
                f"found sample_every = {self.sample_every} without a sample_prompt to continue: give one"
            )
        if self.save_every is not None and self.out is None:
            raise MiniloraError(f"found save_every = {self.save_every} without out, the folder to save to: give out")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _bad(name, value, f"a whole number of at least {least}")

    def with_changes(self, **changes: Any) -> TrainConfig:
        """A copy with some fields replaced, checked like a new one."""
        return replace(self, **changes)

    def warmup_steps(self, total: int) -> int:
        """The steps that the learning rate rises over, of `total`."""
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * total)

    def samples_due(self, step: int, total: int) -> bool:
        """Whether the model's texts are taken after `step` steps of `total`."""
        every = self.sample_every or max(1, total // SAMPLES_PER_RUN)
        return bool(self.sample_prompt) and (step == total or step % every == 0)

    def row_length(self, context: int) -> int:
        """Tokens that a row may have with a model of this context; MiniloraError if more are asked for."""
        if self.max_length is None:
            return min(DEFAULT_LENGTH, context)
        if self.max_length > context:
            raise MiniloraError(
                f"max_length is {self.max_length:,}, over the model's context of {context:,} tokens: lower it"
            )
        return self.max_length


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bad(name: str, value: object, expected: str) -> MiniloraError:
    return MiniloraError(f"{name} is {value!r}, expected {expected}")
