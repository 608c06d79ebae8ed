"""What is going to be trained: a line for each target pattern, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ..lora import PEFT_PREFIX, LoraConfig
from ..lora.targets import matches, pattern_value

if TYPE_CHECKING:
    from ..model import Model


class Row(NamedTuple):
    """What one pattern matches. scale: of B A, alpha / r by default; "" for parameters of the base itself."""

    pattern: str
    layers: int
    rank: str
    scale: str
    trainable: int


class Summary(NamedTuple):
    """The rows of the table; all parameters that are trained, and all that there are, adapters included."""

    rows: list[Row]
    trainable: int
    total: int

    def text(self) -> str:
        """The table with a line of totals, as plain text of fixed columns."""
        cells = [("target", "layers", "rank", "scale", "trainable")]
        cells += [(row.pattern, f"{row.layers}", row.rank, row.scale, f"{row.trainable:,}") for row in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
        lines.insert(1, "-" * len(lines[0]))
        share = self.trainable / self.total
        return "\n".join([*lines, f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.3%})"])


def summarise(model: Model) -> Summary:
    """What `model.parameters()` would change, by target pattern, under the adapters that are selected now."""
    trained = model.parameters()
    base = {name: tensor for name, tensor in model.network.named_parameters() if name in trained}
    rows: list[Row] = []
    adapters_size = 0
    for adapter, weight in model.active_adapters.items():
        tensors = model.adapter_parameters(adapter)
        adapters_size += sum(tensor.size for tensor in tensors.values())
        shapes = {key: tensor.shape for key, tensor in tensors.items() if tensor.requires_grad}
        rows += _adapter_rows(model.adapters[adapter], shapes, weight)
    by_suffix: dict[str, list[int]] = {}
    for name, tensor in base.items():
        by_suffix.setdefault(".".join(name.split(".")[-2:]), []).append(tensor.size)
    rows += [Row(f"base: {suffix}", len(sizes), "", "", sum(sizes)) for suffix, sizes in by_suffix.items()]
    whole_base = sum(prod(tensor.shape) for _, tensor in model.network.named_parameters())
    return Summary(rows, sum(tensor.size for tensor in trained.values()), whole_base + adapters_size)


def _adapter_rows(config: LoraConfig, shapes: dict[str, tuple[int, ...]], weight: float) -> list[Row]:
    """A row for each pattern of a list; for "all-linear" or a regular expression, one for each ending that it found."""
    found: dict[str, dict[str, list[tuple[int, ...]]]] = {}  # pattern -> module -> shapes of its tensors
    for key, shape in shapes.items():
        module = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
        found.setdefault(_pattern_of(module, config.target_modules), {}).setdefault(module, []).append(shape)
    rows = []
    for pattern, modules in found.items():
        ranks = {module: pattern_value(module, config.rank_pattern, config.r) for module in modules}
        alphas = {module: pattern_value(module, config.alpha_pattern, config.alpha) for module in modules}
        scales = {config.scale(ranks[module], alphas[module]) * weight for module in modules}
        rows.append(
            Row(
                pattern,
                len(modules),
                ", ".join(str(rank) for rank in sorted(set(ranks.values()))),
                ", ".join(f"{scale:g}" for scale in sorted(scales)),
                sum(prod(shape) for tensors in modules.values() for shape in tensors),
            )
        )
    return rows


def _pattern_of(module: str, targets: str | Sequence[str]) -> str:
    if isinstance(targets, str):
        return f"{targets}: {module.rpartition('.')[2]}"
    return next(pattern for pattern in targets if matches(module, pattern))
