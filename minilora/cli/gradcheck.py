"""`minilora gradcheck`: finite differences against the gradients of a model and its adapter, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..errors import MiniloraError
from .console import note, print_json, print_table, progress
from .options import Device, Json, ModelName

ADAPTER = "0"
TEXT = "The frost performs its secret ministry, unhelped by any wind."  # language, which a model knows


def command(
    model: ModelName,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter directory (PEFT); without one, a new adapter on every linear layer.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the new adapter.")] = 8,
    text: Annotated[
        str, typer.Option(help="What the loss is taken on (random tokens for a model without a tokenizer).")
    ] = TEXT,
    length: Annotated[int, typer.Option(min=2, help="How many tokens the loss is taken on, at most.")] = 8,
    entries: Annotated[int, typer.Option(min=0, help="Entries to compare in each layer.")] = 1,
    directions: Annotated[int, typer.Option(min=0, help="Random directions to compare along in each layer.")] = 1,
    seed: Annotated[int, typer.Option(help="Chooses tokens, entries and directions.")] = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Check the gradients of your model and adapter against finite differences, in float64.

    A layer is compared along random directions through all of its A and B together, and in single entries. What lies
    below the noise of the difference is undecided, and never counts as passed. Exit status 1 if a gradient is wrong.
    """
    from ..comparison import GradientError
    from ..gradcheck import gradcheck_model
    from ..loading import load_model
    from ..lora import LoraConfig

    if entries + directions == 0:
        raise MiniloraError("--entries and --directions are both 0, so nothing would be compared: give one of them")
    loaded = load_model(model, device, "float64")
    if adapter is None:
        loaded.add_adapter(ADAPTER, LoraConfig(r=rank, alpha=2 * rank), seed=seed)
    else:
        loaded.load_adapter(ADAPTER, adapter)
    tokens = tokens_of(loaded, text, length, seed)
    note(f"{tokens.size} tokens, float64, on {loaded.device}")
    layers = len(loaded.network.blocks)
    with progress("layers", layers) as advance:
        reports = gradcheck_model(
            loaded, tokens, adapter=ADAPTER, entries=entries, directions=directions, seed=seed,
            progress=lambda group, report: advance(1),
        )  # fmt: skip
    if as_json:
        print_json({layer: as_data(report) for layer, report in reports.items()})
    else:
        print_reports(reports)
    for report in reports.values():
        try:
            report.raise_if_wrong()
        except GradientError as error:
            raise MiniloraError(str(error)) from None


def tokens_of(model: Any, text: str, length: int, seed: int) -> np.ndarray:
    """(1, T) tokens of the text, cut to `length`; random ones where the model has no tokenizer."""
    length = min(length, model.config.max_position_embeddings)
    if model.tokenizer is None:
        if text != TEXT:
            raise MiniloraError("the model has no tokenizer, which --text needs: leave it out for random tokens")
        return np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, length))
    tokens = model.tokenizer.encode(text)[:length]
    if len(tokens) < 2:
        raise MiniloraError(f"--text has {len(tokens)} tokens, expected at least 2: a loss needs one to predict")
    return np.array([tokens])


def as_data(report: Any) -> dict[str, Any]:
    return {
        "directions": report.directions_checked,
        "entries": report.checked,
        "undecided": report.inconclusive + report.directions_inconclusive,
        "zero": report.zero,
        "wrong": len(report.wrong),
        "worst_relative_error": report.error,
    }


def print_reports(reports: dict[str, Any]) -> None:
    columns = ("layer", "directions>", "entries>", "undecided>", "worst error>", "")
    rows = []
    for layer, report in reports.items():
        data = as_data(report)
        verdict = "WRONG" if report.wrong else "ok" if report.conclusive else "undecided"
        counts = [f"{data[key]}" for key in ("directions", "entries", "undecided")]
        rows.append((layer, *counts, f"{report.error:.1e}" if report.error else "in the noise", verdict))
    print_table(columns, rows)
    if not all(report.error for report in reports.values()):
        typer.echo("in the noise: the difference is not known to 1e-8 there; the gradient agrees within what is known")
    worst = max(report.error for report in reports.values())
    compared = sum(report.checked + report.directions_checked + len(report.wrong) for report in reports.values())
    typer.echo(f"{compared} comparisons in {len(reports)} layers; worst relative error {worst:.1e}")
