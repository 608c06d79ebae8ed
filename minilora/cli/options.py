"""Options that several commands share, as types, and what they are turned into: `open_model`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..model import Model

ModelName = Annotated[
    str, typer.Option("--model", help='A model directory, a .gguf file, "smollm2" or a hub id "owner/name".')
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
Dtype = Annotated[str, typer.Option(help="Hold the weights in float32, float64, float16 or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_model(name: str, adapters: Sequence[Path], device: str, dtype: str | None) -> Model:
    """The model with the adapters "0", "1", … on it, none of them selected."""
    from ..model import load_model

    model = load_model(name, device, dtype)
    for number, directory in enumerate(adapters):
        model.load_adapter(str(number), directory, trainable=False)
    model.set_adapter(None)
    return model
