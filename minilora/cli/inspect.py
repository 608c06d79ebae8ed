"""`minilora inspect`: what a model, an adapter or a GGUF file holds, read from its headers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import bytes_text, print_json, print_table, say
from .options import Json
from .spectrum import show as show_spectrum

if TYPE_CHECKING:
    from ..formats.checkpoint import TensorEntry
    from ..formats.listing import Listing

FACTS = (  # of config.json, in the order in which they are shown
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
ADAPTER_FACTS = (
    "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias",
    "model", "fine_tune_type", "num_layers", "lora_parameters",
)  # fmt: skip


def command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help='A model directory, an adapter directory, a .gguf or .safetensors file, "mini", "smollm2", a hub id.',
        ),
    ],
    all_layers: Annotated[
        bool, typer.Option("--all", help="A line for each tensor, instead of one for all layers' tensors of a kind.")
    ] = False,
    spectrum: Annotated[
        bool,
        typer.Option(
            "--spectrum", help="Of an adapter: each ΔW's singular values, effective rank, and what comes below."
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="With --spectrum: the adapter's base, for ‖ΔW‖/‖W‖ and the amplification factor."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="With --spectrum: another adapter, for the similarity of the two subspaces in each layer."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="With --spectrum: draw it into this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a model, an adapter or a GGUF file holds: shapes, dtypes, sizes, ranks, norms.

    Of each layer that an adapter changes it shows rank, scale and ‖ΔW‖_F; with --spectrum what its training found.
    """
    if spectrum:
        show_spectrum(Path(name).expanduser(), model, against, png, as_json)
        return
    for option, value in (("--model", model), ("--against", against), ("--png", png)):
        if value is not None:
            raise typer.BadParameter("expected --spectrum with it", param_hint=option)
    from ..formats.checkpoint import find_model
    from ..formats.listing import list_tensors

    path = Path(name).expanduser()
    listing = list_tensors(path if path.exists() else find_model(name))
    updates = updates_of(listing) if listing.format == "peft" else []
    if as_json:
        print_json(as_data(listing, updates))
        return
    say(f"{listing.path}: {headline(listing)}")
    say(facts(listing))
    if updates:
        print_updates(updates)
    shown = {name: entry for name, entry in listing.tensors.items() if not updates or not is_factor(name)}
    if shown:
        if updates:
            say("tensors besides A and B (biases and modules that are saved whole take the base's place):")
        print_tensors(shown, all_layers)


# --- tensors --------------------------------------------------------------------------------------------------------


def parameters(entries: Iterable[TensorEntry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)


def headline(listing: Listing) -> str:
    """What it is, how many parameters in which dtypes, and how large."""
    kind = {"model": "a model", "adapter": "an adapter", "tensors": "tensors"}[listing.kind]
    dtypes = Counter(entry.dtype for entry in listing.tensors.values())
    stored = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    count, size = parameters(listing.tensors.values()), bytes_text(listing.nbytes)
    return f"{kind} ({listing.format}), {count:,} parameters, {size}, {len(listing.tensors)} tensors ({stored})"


def facts(listing: Listing) -> str:
    """The sizes in its config, a line of `name value` pairs."""
    config = listing.config
    if listing.format == "gguf":
        architecture = f"{config.get('general.architecture')}."
        values = {key: value for key, value in config.items() if key.startswith(("general.", architecture))}
    else:
        wanted = ADAPTER_FACTS if listing.kind == "adapter" else FACTS
        values = {key: config[key] for key in wanted if config.get(key) not in (None, {}, [])}
    return "  " + "\n  ".join(f"{key} {shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def print_tensors(entries: Mapping[str, TensorEntry], all_layers: bool) -> None:
    """A line for each tensor, or for all that differ in their layer's number only and agree in shape and dtype."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for number, (name, entry) in enumerate(entries.items()):
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        kinds.setdefault((pattern, entry.shape, entry.dtype, number if all_layers else 0), []).append(name)
    rows = []
    for (pattern, shape, dtype, _), names in kinds.items():
        several = len(names) > 1
        count, size = math.prod(shape) * len(names), sum(entries[name].nbytes for name in names)
        cells = [pattern if several else names[0], str(len(names))] if not all_layers else [names[0]]
        rows.append([*cells, " × ".join(map(str, shape)), dtype, f"{count:,}", bytes_text(size)])
    print_table(["tensor", *([] if all_layers else ["number>"]), "shape>", "dtype", "parameters>", "size>"], rows)


# --- adapters -------------------------------------------------------------------------------------------------------


FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def is_factor(name: str) -> bool:
    return any(name.endswith(pair) for pair in FACTORS)


def updates_of(listing: Listing) -> list[dict[str, Any]]:
    """Of each adapted layer: its rank, scale and ‖ΔW‖_F = ‖s · B A‖_F (of a DoRA layer, before its normalisation)."""
    from ..errors import MiniloraError
    from ..formats.peft import CONFIG_FILE, lora_config
    from ..lora import PEFT_PREFIX
    from ..lora.statistics import update_norm
    from ..lora.targets import pattern_value

    config = lora_config(listing.config, listing.path / CONFIG_FILE)
    updates = []
    for key, a in sorted(listing.tensors.items(), key=lambda item: layer_order(item[0])):
        ends = next((pair for pair in FACTORS if key.endswith(pair[0])), None)
        if ends is None:
            continue
        module = key.removesuffix(ends[0])
        b = listing.tensors.get(module + ends[1])
        if b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            found = "is missing" if b is None else f"has shape {b.shape}"
            raise MiniloraError(f"{b.path if b else a.path}: {module}{ends[1]} {found} beside an A of {a.shape}")
        path = module.removeprefix(PEFT_PREFIX)
        rank = a.shape[0]
        scale = config.scale(rank, pattern_value(path, config.alpha_pattern, config.alpha))
        norm = update_norm(a.array(), b.array(), scale)
        updates.append(
            {"module": path, "in": a.shape[1], "out": b.shape[0], "rank": rank, "scale": scale, "dtype": a.dtype,
             "norm": norm, "bytes": a.nbytes + b.nbytes}
        )  # fmt: skip
    return updates


def layer_order(name: str) -> list[tuple[int, str]]:
    """Sorts names by the numbers in them: layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split(".")]


def print_updates(updates: list[dict[str, Any]]) -> None:
    rows = [
        [
            update["module"],
            f"{update['out']} × {update['in']}",
            str(update["rank"]),
            f"{update['scale']:g}",
            update["dtype"],
            bytes_text(update["bytes"]),
            f"{update['norm']:.4g}",
        ]
        for update in updates
    ]
    print_table(["layer", "ΔW>", "rank>", "scale>", "dtype", "size>", "‖ΔW‖>"], rows)
    total = math.sqrt(sum(update["norm"] ** 2 for update in updates))
    say(f"{len(updates)} layers, ‖ΔW‖ of all together {total:.4g}")
    above = [update for update in updates if update["rank"] > min(update["in"], update["out"])]
    if above:
        size = min(above[0]["in"], above[0]["out"])
        say(
            f"{len(above)} layers have a higher rank than their ΔW can have, first {above[0]['module']}: at most {size}"
        )


def as_data(listing: Listing, updates: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = [
        {"name": name, "shape": list(entry.shape), "dtype": entry.dtype, "bytes": entry.nbytes}
        for name, entry in listing.tensors.items()
    ]
    return {
        "path": str(listing.path),
        "kind": listing.kind,
        "format": listing.format,
        "parameters": parameters(listing.tensors.values()),
        "bytes": listing.nbytes,
        "config": listing.config,
        "tensors": tensors,
        **({"updates": updates} if listing.kind == "adapter" else {}),
    }
