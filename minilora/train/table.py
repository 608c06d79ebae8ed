"""What is going to be trained: a line for each target pattern, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ..lora import PEFT_PREFIX, LoraConfig
from ..lora.targets import matches, pattern_value
from .checks import factor_of

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
    """The rows of the table; all parameters that are trained, and all that there are, adapters included.

    excess: of layers whose rank is above their own size, (name, rank, the smaller of their widths).
    """

    rows: list[Row]
    trainable: int
    total: int
    excess: list[tuple[str, int, int]]

    def text(self) -> str:
        """The table with a line of totals, as plain text of fixed columns."""
        cells = [("target", "layers", "rank", "scale", "trainable")]
        cells += [(row.pattern, f"{row.layers}", row.rank, row.scale, f"{row.trainable:,}") for row in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
        lines.insert(1, "-" * len(lines[0]))
        share = self.trainable / self.total
        lines.append(f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.3%})")
        if self.excess:
            name, rank, size = self.excess[0]
            lines.append(
                f"{len(self.excess)} layers have a higher rank than their ΔW can have, first {name}: rank {rank}, and "
                f"its ΔW has at most {size}, for which rank {size} is enough"
            )
        return "\n".join(lines)


def summarise(model: Model) -> Summary:
    """What `model.parameters()` would change, by target pattern, under the adapters that are selected now."""
    trained = model.parameters()
    base = {name: tensor for name, tensor in model.network.named_parameters() if name in trained}
    rows: list[Row] = []
    excess: list[tuple[str, int, int]] = []
    adapters_size = 0
    for adapter, weight in model.active_adapters.items():
        tensors = model.adapter_parameters(adapter)
        adapters_size += sum(tensor.size for tensor in tensors.values())
        shapes = {key: tensor.shape for key, tensor in tensors.items() if tensor.requires_grad}
        low_rank = {key: shape for key, shape in shapes.items() if ".lora_" in key}
        rows += _adapter_rows(model.adapters[adapter], low_rank, weight)
        rows += _rows_by_suffix("own copy", {key: shape for key, shape in shapes.items() if key not in low_rank})
        excess += _above_their_size({key: tensor.shape for key, tensor in tensors.items()})
    rows += _rows_by_suffix("base", {name: tensor.shape for name, tensor in base.items()})
    whole_base = sum(prod(tensor.shape) for _, tensor in model.network.named_parameters())
    return Summary(rows, sum(tensor.size for tensor in trained.values()), whole_base + adapters_size, excess)


def _rows_by_suffix(kind: str, shapes: dict[str, tuple[int, ...]]) -> list[Row]:
    """A row for all parameters of whole modules whose names end alike."""
    by_suffix: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        by_suffix.setdefault(".".join(name.replace(".base_layer", "").split(".")[-2:]), []).append(prod(shape))
    return [Row(f"{kind}: {suffix}", len(sizes), "", "", sum(sizes)) for suffix, sizes in by_suffix.items()]


def _above_their_size(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, int, int]]:
    """(name, rank, size) of the layers whose A (r, in) and B (out, r) have r above size = min(in, out)."""
    found = []
    for key, shape in shapes.items():
        if (factor := factor_of(key)).endswith("_A"):
            out_features = shapes[key.replace(factor, f"{factor[:-1]}B")][0]
            found.append((key.removeprefix(PEFT_PREFIX).partition(".lora_")[0], shape[0], min(shape[1], out_features)))
    return [(path, rank, size) for path, rank, size in found if rank > size]


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
