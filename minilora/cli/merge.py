"""`minilora merge`: an adapter put into its base, checked on a probe batch, and written as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MiniloraError
from .console import note, print_json
from .options import AdapterDirectory, Device, Json, ModelName, open_model

if TYPE_CHECKING:
    from numpy import ndarray

    from ..model import Model

# The largest logit difference that is let pass, as a fraction of the largest logit: what rounding W' to this dtype once
# explains, with room. Weights that are merged wrongly are off by about the size of the logits themselves.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1}
PROBE_ROWS, PROBE_LENGTH = 4, 64  # random tokens


def command(
    model: ModelName,
    adapter: AdapterDirectory,
    out: Annotated[Path, typer.Option(help="The directory to write: a Hugging Face model with its tokenizer.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Write float32, float64, float16 or bfloat16. Default: as stored; a GGUF's float32."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest logit difference allowed, as a fraction of the largest logit. Default: 1e-4 for float32, "
            "0.02 for float16, 0.15 for bfloat16, 1e-10 for float64.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in --out.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base and write the result as a Hugging Face directory.

    Before anything is written, the logits of the merged model are compared with those of base and adapter on a batch of
    random tokens.
    """
    check_out(out, model, adapter, overwrite)
    # Merged in at least float32 and rounded once, to what is written.
    loaded = open_model(
        model, [adapter], device, None if dtype is None else "float64" if dtype == "float64" else "float32"
    )
    report = merge(loaded, dtype, tolerance)
    loaded.save(out)
    if as_json:
        print_json({"model": model, "adapter": str(adapter), "out": str(out)} | report)
        return
    typer.echo(
        f"largest logit difference between merged and unmerged {report['difference']:.3g}, allowed "
        f"{report['bound']:.3g} (logits up to {report['largest_logit']:.3g}, which the adapter moves by up to "
        f"{report['moved']:.3g})"
    )
    typer.echo(
        f"wrote {out} ({report['dtype']}{'' if loaded.tokenizer else ', without a tokenizer: the base has none'})"
    )


def check_out(out: Path, model: str, adapter: Path, overwrite: bool) -> None:
    """MiniloraError where writing to `out` would cost something that was not meant."""
    for name, source in (("--model", Path(model)), ("--adapter", adapter)):
        if source.exists() and out.exists() and out.samefile(source):
            raise MiniloraError(f"--out {out} is the directory of {name}, which would be lost: choose another one")
    if out.exists() and not out.is_dir():
        raise MiniloraError(f"--out {out} is a file, expected a directory or nothing there: choose another name")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise MiniloraError(
            f"--out {out} is there already and not empty: choose another directory, or give --overwrite"
        )


def merge(model: Model, dtype: str | None, tolerance: float | None) -> dict[str, Any]:
    """Merge adapter "0", round to `dtype`, and compare the logits; MiniloraError where they differ by too much."""
    import numpy as np

    from ..backend import cast, dtype_of

    tokens = probe(model)
    model.set_adapter(None)
    base = float64_logits(model, tokens)
    model.set_adapter("0")
    unmerged = float64_logits(model, tokens)
    model.merge_adapter("0")
    if dtype is not None:
        for _, parameter in model.network.named_parameters():
            parameter.data = cast(parameter.data, dtype_of(dtype))
    merged = float64_logits(model, tokens)
    written = widest_rounding(model)
    difference, largest = float(np.abs(merged - unmerged).max()), float(np.abs(unmerged).max())
    bound = (TOLERANCES[written] if tolerance is None else tolerance) * largest
    if not difference <= bound:  # NaN is not
        raise MiniloraError(
            f"the merged model's logits differ from those of base and adapter by up to {difference:.3g}, over the "
            f"{bound:.3g} that rounding to {written} explains: nothing was written; try --dtype float32, or a larger "
            "--tolerance"
        )
    if (moved := float(np.abs(unmerged - base).max())) == 0:
        note("warning: the adapter changes no logit: is it trained?")
    return {"difference": difference, "bound": bound, "largest_logit": largest, "moved": moved, "dtype": written}


def probe(model: Model) -> ndarray:
    """The same random tokens (B, T) for every merge."""
    import numpy as np

    length = min(PROBE_LENGTH, model.config.max_position_embeddings)
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (PROBE_ROWS, length))


def float64_logits(model: Model, tokens: ndarray) -> ndarray:
    import numpy as np

    from ..backend import to_numpy

    return to_numpy(model.logits(tokens)).astype(np.float64)


def widest_rounding(model: Model) -> str:
    """The least precise dtype among the model's matrices, which decides how far rounding moves the logits."""
    dtypes = {parameter.data.dtype.name for _, parameter in model.network.named_parameters() if parameter.ndim == 2}
    return max(dtypes, key=lambda name: TOLERANCES[name])
