"""What the demo finds: plain data, in the order in which it is found. The terminal, the page and JSON all read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MOST_ROUNDING = 1e-4  # of the largest logit: what merging in float32 may move one by


@dataclass
class Learned:
    """One adapter. loss_before, loss_after: of validation rows, nats per token. correct: before, after, of how many."""

    name: str
    title: str
    about: str
    rows: int
    steps: int
    loss_before: float
    loss_after: float
    correct: tuple[int, int, int] | None
    seconds: float
    parameters: int
    bytes_on_disk: int


@dataclass
class Continued:
    """One prompt under the bare base ("base") and under each adapter, by name; the same seed draws all texts."""

    prompt: str
    texts: dict[str, str]


@dataclass
class Held:
    """Bytes that training holds besides the base's weights and the activations."""

    parameters: int
    gradients: int
    moments: int


@dataclass
class Merged:
    """Merging one adapter.

    difference: the largest |logit merged − logit with the adapter beside the weights| on a sentence; scale: the largest
    |logit| there. same_text: both continue it alike. restored: unmerging gave the base back bit for bit.
    pass_seconds: a forward pass of `pass_tokens` tokens; token_seconds: each token of a text being written; of "base",
    "adapter" (beside the weights) and "merged", medians of rounds taken in turn.
    """

    name: str
    difference: float
    scale: float
    same_text: bool
    restored: bool
    pass_tokens: int
    pass_seconds: dict[str, float]
    token_seconds: dict[str, float]


@dataclass
class Checked:
    """The gradient check: comparisons with central differences, and the worst relative error."""

    comparisons: int
    undecided: int
    wrong: int
    worst: float


@dataclass
class Results:
    """All of it. parameter_rows: the table of what was trained, as train/table.py has it."""

    model: str
    parameters: int
    model_bytes: int
    seed: int
    base_texts: dict[str, str] = field(default_factory=dict)
    learned: list[Learned] = field(default_factory=list)
    continued: list[Continued] = field(default_factory=list)
    one_batch_agrees: bool = False
    parameter_rows: list[dict[str, Any]] = field(default_factory=list)
    trainable: int = 0
    lora: Held | None = None
    full: Held | None = None
    merged: Merged | None = None
    checked: Checked | None = None
    seconds: float = 0.0

    def fault(self) -> str | None:
        """What was found that cannot be so if all is right; None: nothing."""
        merged, checked = self.merged, self.checked
        if merged is not None and not merged.difference <= MOST_ROUNDING * merged.scale:
            return f"merging changed the logits by {merged.difference:.2g}, of values up to {merged.scale:.2g}"
        if merged is not None and not merged.restored:
            return "unmerging did not give the base back bit for bit"
        if checked is not None and checked.wrong:
            return f"{checked.wrong} gradients differ from the finite differences"
        return None
