"""`minilora export`: an adapter, checked against its base, in another tool's format; or a whole model as GGUF."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MiniloraError
from ..files import check_writable
from .console import note
from .options import AdapterDirectories, ModelName, Weights, open_model, weights_of

if TYPE_CHECKING:
    from ..model import Model


class Format(StrEnum):
    PEFT = "peft"
    MLX = "mlx"
    GGUF = "gguf"


class How(StrEnum):
    CAT = "cat"
    SVD = "svd"


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
    adapter: AdapterDirectories = None,
    weight: Weights = None,
    combination: Annotated[
        How | None,
        typer.Option(
            help="How several become one. cat: exact, their ranks add up (default); svd: the nearest of --rank."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With svd: the rank. Default: the largest among the adapters of a layer.")
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

    The formats can also be read: --adapter takes a directory of PEFT or mlx-lm, or a GGUF adapter. Several adapters
    become one: the sum of their updates, each times its --weight. With --format gguf a whole model is written too: the
    base (without --adapter, which llama.cpp needs beside an adapter) or the merged one (--merged).
    """
    adapters = list(adapter or [])
    weights = weights_of(adapters, weight)
    whole = format is Format.GGUF and (merged or not adapters)
    if not adapters and (merged or not whole):
        raise typer.BadParameter("is missing: give the adapter", param_hint="--adapter")
    if merged and not whole:
        raise typer.BadParameter(
            f"goes with --format gguf; a merged model for {format} is a directory: minilora merge",
            param_hint="--merged",
        )
    if dtype is not None and not whole:
        raise typer.BadParameter("goes with a whole model: --format gguf and --merged", param_hint="--dtype")
    if combination is not None and (whole or not (len(adapters) > 1 or weight)):
        raise typer.BadParameter("goes with several adapters, or a --weight", param_hint="--combination")
    if rank is not None and combination is not How.SVD:
        raise typer.BadParameter("goes with --combination svd", param_hint="--rank")
    check_out(out, format, [Path(model), *adapters], overwrite)
    if whole:
        rounding = write_model(model, adapters, weights, out, dtype or Dtype.F16)
        typer.echo(
            f"wrote {out} ({dtype or Dtype.F16}; rounding moved no matrix by more than {rounding:.2g} of its norm)"
        )
        return
    loaded = open_model(model, adapters, "cpu", None)
    name = "0"
    if len(adapters) > 1 or weight:
        name = combined(loaded, weights, combination or How.CAT, rank)
    write_adapter(loaded, name, format, out, "-".join(path.resolve().name for path in adapters))
    typer.echo(f"wrote {out}")


def combined(model: Model, weights: dict[str, float], combination: How, rank: int | None) -> str:
    """The name of the adapter that the weighted ones become on the model; says its rank and what it lost."""
    report = model.combine_adapters("combined", weights, combination, rank)
    ranks = sorted(set(report.ranks.values()))
    loss = "exact" if combination is How.CAT else f"relative error {report.relative_error:.3g}"
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    note(f"{len(weights)} adapters combined by {combination}: {span}, {loss}")
    return "combined"


def check_out(out: Path, format: Format, sources: list[Path], overwrite: bool) -> None:
    """MiniloraError where writing to `out` would cost something that was not meant."""
    if any(source.exists() and out.exists() and out.samefile(source) for source in sources):
        raise MiniloraError(f"--out {out} is what is read, which would be lost: choose another name")
    if out.exists() and out.is_dir() == (format is Format.GGUF):
        found, expected = ("directory", "file") if out.is_dir() else ("file", "directory")
        raise MiniloraError(f"--out {out} is a {found}, expected a {expected} or nothing there: choose another name")
    check_writable(out)
    if not overwrite and out.exists() and (out.is_file() or any(out.iterdir())):
        raise MiniloraError(f"--out {out} is there already: choose another name, or give --overwrite")


def write_adapter(model: Model, name: str, format: Format, out: Path, title: str) -> None:
    """Write the adapter `name`, which fits its base, under a title where the format has one."""
    from ..formats import gguf_adapter, mlx

    if format is Format.PEFT:
        model.save_adapter(name, out)
        return
    config, tensors = model.saved_adapter(name)
    tied = model.network.head_is_tied
    if format is Format.MLX:
        mlx.write_adapter(out, config, tensors, model.config, tied, base_model=model.source)
    else:
        gguf_adapter.write_adapter(out, config, tensors, model.config, tied, name=title)


def write_model(name: str, adapters: list[Path], weights: dict[str, float], out: Path, dtype: Dtype) -> float:
    """The base, or base and adapters merged (and compared on a probe batch), as one GGUF file."""
    from ..formats.gguf_write import window_note

    if not adapters:
        model = open_model(name, [], "cpu", None)
    else:
        from .merge import merge

        model = open_model(name, adapters, "cpu", "float32")
        merge(model, None, None, weights)
    if about_window := window_note(model.config):
        note(f"note: {about_window}")
    return model.save_gguf(out, dtype)
