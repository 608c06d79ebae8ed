"""`minilora export`: an adapter, checked against its base, in another tool's format."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AdapterDirectory, ModelName, open_model

if TYPE_CHECKING:
    from ..model import Model


def write_peft(model: Model, name: str, out: Path) -> None:
    """A PEFT directory: adapter_config.json and adapter_model.safetensors."""
    model.save_adapter(name, out)


class Format(StrEnum):
    PEFT = "peft"


WRITERS: dict[Format, Callable[[Model, str, Path], None]] = {Format.PEFT: write_peft}


def command(
    model: ModelName,
    adapter: AdapterDirectory,
    format: Annotated[Format, typer.Option(help="The tool to write for.")],
    out: Annotated[Path, typer.Option(help="What to write.")],
) -> None:
    """Write an adapter in another tool's format, after checking that it fits its base."""
    WRITERS[format](open_model(model, [adapter], "cpu", None), "0", out)
    typer.echo(f"wrote {out}")
