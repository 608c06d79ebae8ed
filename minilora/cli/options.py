"""Options that several commands share, as types: `def command(model: Model, device: Device = "cpu")`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help='A model directory, a .gguf file, "smollm2" or a hub id "owner/name".')]
AdapterDirectories = Annotated[
    list[Path] | None, typer.Option("--adapter", help="An adapter directory (PEFT); may be given several times.")
]
AdapterDirectory = Annotated[Path, typer.Option("--adapter", help="An adapter directory (PEFT).")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Hold the weights in float32, float64, float16 or bfloat16. Default: as stored; GGUF: float32."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
