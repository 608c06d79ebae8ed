"""`minilora export`: an adapter, checked against its base, in another tool's format; or a whole model as GGUF."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import MiniloraError
from .console import note
from .options import ModelName, open_model


class Format(StrEnum):
    PEFT = "peft"
    MLX = "mlx"
    GGUF = "gguf"


class Dtype(StrEnum):
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


def command(
    model: ModelName,
    format: Annotated[
        Format,
        typer.Option(
            help="The tool to write for. peft: a directory for PEFT, vLLM, transformers; mlx: a directory for mlx-lm; "
            "gguf: a file for llama.cpp and Ollama."
        ),
    ],
    out: Annotated[Path, typer.Option(help="What to write: a directory, or with gguf a file.")],
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="An adapter: a directory (PEFT, mlx-lm) or a .gguf file. With --format gguf it may be left out: the "
            "model itself is then written, which llama.cpp needs beside the adapter."
        ),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="With gguf: the whole model with the adapter merged into it.")
    ] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="With gguf: how a whole model's matrices are stored. Default: f16.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
) -> None:
    """Write an adapter in another tool's format, after checking that it fits its base.

    The formats can also be read: --adapter takes a directory of PEFT or mlx-lm, or a GGUF adapter. With --format gguf a
    whole model is written too: the base (without --adapter) or the merged one (--merged).
    """
    whole = format is Format.GGUF and (merged or adapter is None)
    if adapter is None and (merged or not whole):
        raise typer.BadParameter("is missing: give the adapter", param_hint="--adapter")
    if merged and not whole:
        raise typer.BadParameter(
            f"goes with --format gguf; a merged model for {format} is a directory: minilora merge",
            param_hint="--merged",
        )
    if dtype is not None and not whole:
        raise typer.BadParameter("goes with a whole model: --format gguf and --merged", param_hint="--dtype")
    check_out(out, format, [Path(model), *([] if adapter is None else [adapter])], overwrite)
    if whole:
        rounding = write_model(model, adapter, out, dtype or Dtype.F16)
        typer.echo(
            f"wrote {out} ({dtype or Dtype.F16}; rounding moved no matrix by more than {rounding:.2g} of its norm)"
        )
        return
    assert adapter is not None
    write_adapter(model, adapter, format, out)
    typer.echo(f"wrote {out}")


def check_out(out: Path, format: Format, sources: list[Path], overwrite: bool) -> None:
    """MiniloraError where writing to `out` would cost something that was not meant."""
    if any(source.exists() and out.exists() and out.samefile(source) for source in sources):
        raise MiniloraError(f"--out {out} is what is read, which would be lost: choose another name")
    if out.exists() and out.is_dir() == (format is Format.GGUF):
        found, expected = ("directory", "file") if out.is_dir() else ("file", "directory")
        raise MiniloraError(f"--out {out} is a {found}, expected a {expected} or nothing there: choose another name")
    if not overwrite and out.exists() and (out.is_file() or any(out.iterdir())):
        raise MiniloraError(f"--out {out} is there already: choose another name, or give --overwrite")


def write_adapter(name: str, adapter: Path, format: Format, out: Path) -> None:
    """Load the adapter onto its base, which checks that it fits, and write it."""
    from ..formats import gguf_adapter, mlx

    model = open_model(name, [adapter], "cpu", None)
    if format is Format.PEFT:
        model.save_adapter("0", out)
        return
    config, tensors = model.saved_adapter("0")
    tied = model.network.head_is_tied
    if format is Format.MLX:
        mlx.write_adapter(out, config, tensors, model.config, tied, base_model=model.source)
    else:
        gguf_adapter.write_adapter(out, config, tensors, model.config, tied, name=adapter.resolve().name)


def write_model(name: str, adapter: Path | None, out: Path, dtype: Dtype) -> float:
    """The base, or base and adapter merged (and compared on a probe batch), as one GGUF file."""
    from ..formats.gguf_write import window_note

    if adapter is None:
        model = open_model(name, [], "cpu", None)
    else:
        from .merge import merge

        model = open_model(name, [adapter], "cpu", "float32")
        merge(model, None, None)
    if about_window := window_note(model.config):
        note(f"note: {about_window}")
    return model.save_gguf(out, dtype)
