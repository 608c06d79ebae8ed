"""Options that several commands share, as types, and what they are turned into: `open_model`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..model import Model

ModelName = Annotated[
    str, typer.Option("--model", help='A model directory, a .gguf file, "mini", "smollm2" or a hub id "owner/name".')
]
AdapterDirectories = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        help="An adapter: a directory (PEFT, mlx-lm) or a .gguf file; may be given several times.",
        show_default=False,
    ),
]
AdapterDirectory = Annotated[
    Path, typer.Option("--adapter", help="An adapter: a directory (PEFT, mlx-lm) or a .gguf file.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Weights = Annotated[
    list[float] | None,
    typer.Option("--weight", help="A weight for each --adapter, in their order; may be negative. Default: 1."),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Hold the weights in float32, float64, float16 or bfloat16; stored: as the file has them, the blocks of a "
        "GGUF (Q8_0, Q4_0, Q4_1) too, which takes less memory and more time."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def weights_of(adapters: Sequence[Path], weights: Sequence[float] | None) -> dict[str, float]:
    """{name that open_model gives: weight} of each adapter; wrong usage where there are not as many of both."""
    given = list(weights or [1.0] * len(adapters))
    if len(given) != len(adapters):
        raise typer.BadParameter(
            f"is given {len(given)} times for {len(adapters)} adapters, expected once for each", param_hint="--weight"
        )
    return {str(number): weight for number, weight in enumerate(given)}


def open_model(name: str, adapters: Sequence[Path], device: str, dtype: str | None) -> Model:
    """The model with the adapters "0", "1", … on it, none of them selected."""
    from ..loading import load_model

    model = load_model(name, device, dtype)
    for number, directory in enumerate(adapters):
        model.load_adapter(str(number), directory, trainable=False)
    model.set_adapter(None)
    return model
