"""`minilora merge`: adapters put into their base, checked on a probe batch, and written as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MiniloraError
from ..files import check_writable
from .console import note, print_json, print_table
from .options import AdapterDirectories, Device, Json, ModelName, Weights, open_model, weights_of

if TYPE_CHECKING:
    from numpy import ndarray

    from ..lora import Rounding
    from ..model import Model

# The largest logit difference that is let pass, as a fraction of the largest logit: what rounding W' to this dtype (or
# to these blocks) once explains, with room. Weights that are merged wrongly are off by about the size of the logits.
TOLERANCES = {
    "float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1, "Q8_0": 1.5e-1, "Q4_1": 5e-1, "Q4_0": 5e-1,
}  # fmt: skip
PROBE_ROWS, PROBE_LENGTH = 4, 64  # random tokens
WORST = 5  # layers that are shown of a requantised model


class Quantised(StrEnum):
    DEQUANTISE = "dequantise"
    REQUANTISE = "requantise"


def command(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The directory to write: a Hugging Face model with its tokenizer.")],
    adapter: AdapterDirectories = None,
    weight: Weights = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Write float32, float64, float16 or bfloat16. Default: as stored; a GGUF's float32."),
    ] = None,
    quantised: Annotated[
        Quantised | None,
        typer.Option(
            help="Of a GGUF in blocks (Q8_0, Q4_0, Q4_1): dequantise merges into float32 weights, exactly; requantise "
            "rounds the merged weights to such blocks again and shows what that loses. Default: dequantise, and say so."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest logit difference allowed, as a fraction of the largest logit. Default: 1e-4 for float32, "
            "0.02 for float16, 0.15 for bfloat16, 1e-10 for float64, 0.15 for Q8_0, 0.5 for Q4_0 and Q4_1.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in --out.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Merge adapters into their base and write the result as a Hugging Face directory.

    Several adapters are merged as the sum of their updates, each times its --weight. Before anything is written, the
    logits of the merged model are compared with those of base and adapters on a batch of random tokens. As one GGUF
    file for llama.cpp the merged model is written by: minilora export --format gguf --merged.
    """
    adapters = list(adapter or [])
    if not adapters:
        raise typer.BadParameter("is missing: give one or several", param_hint="--adapter")
    if dtype is not None and quantised is Quantised.REQUANTISE:
        raise typer.BadParameter("does not go with --quantised requantise: blocks have no dtype", param_hint="--dtype")
    weights = weights_of(adapters, weight)
    check_out(out, model, adapters, overwrite)
    loaded = open_model(model, adapters, device, dtype_to_load(dtype, quantised))
    check_quantised(model, loaded, quantised)
    report = merge(loaded, dtype, tolerance, weights, quantised)
    loaded.save(out)
    if as_json:
        lost = {name: rounding._asdict() for name, rounding in report["requantised"].items()}
        about = {"model": model, "adapters": [str(path) for path in adapters], "weights": list(weights.values())}
        print_json(about | {"out": str(out)} | report | {"requantised": lost})
        return
    print_roundings(report["requantised"])
    typer.echo(
        f"largest logit difference between merged and unmerged {report['difference']:.3g}, allowed "
        f"{report['bound']:.3g} (logits up to {report['largest_logit']:.3g}, which the adapter moves by up to "
        f"{report['moved']:.3g})"
    )
    form = f"the values of {report['dtype']} blocks as float32" if report["requantised"] else report["dtype"]
    typer.echo(f"wrote {out} ({form}{'' if loaded.tokenizer else ', without a tokenizer: the base has none'})")


def dtype_to_load(dtype: str | None, quantised: Quantised | None) -> str | None:
    """Weights are merged in at least float32 and rounded once, to what is written."""
    if quantised is not None:
        return "stored"
    return None if dtype is None else "float64" if dtype == "float64" else "float32"


def check_quantised(name: str, model: Model, quantised: Quantised | None) -> None:
    """Say what happens to a GGUF's blocks; MiniloraError where a choice was made and there are none."""
    from ..formats.checkpoint import find_model
    from ..formats.gguf_blocks import FORMS
    from ..formats.gguf_file import open_gguf
    from ..ops import CompressedWeight

    if quantised is not None:
        if not any(isinstance(p.data, CompressedWeight) for _, p in model.network.named_parameters()):
            raise MiniloraError(
                f"{name} has no weights in blocks ({', '.join(FORMS)}), which --quantised is for: leave it out"
            )
        return
    path = find_model(name)
    if path.suffix == ".gguf" and path.is_file():
        types = {tensor.dtype for tensor in open_gguf(path).tensors.values()} & set(FORMS)
        if types:
            note(
                f"the base is quantised ({', '.join(sorted(types))}): merged into its dequantised weights; "
                "--quantised requantise would round the result to blocks again"
            )


def print_roundings(requantised: Mapping[str, Rounding]) -> None:
    """What requantising lost: a summary, and the layers where it is most."""
    if not requantised:
        return
    errors, updates = ([getattr(lost, field) for lost in requantised.values()] for field in ("error", "update"))
    typer.echo(
        f"requantised {len(requantised)} weights: relative error {median(errors):.2g} in the median, up to "
        f"{max(errors):.2g}; the adapter had changed them by {median(updates):.2g} in the median"
    )
    worst = sorted(requantised.items(), key=lambda item: -item[1].error)[:WORST]
    print_table(
        ["largest errors", "error>", "update>"],
        [[name, f"{lost.error:.3g}", f"{lost.update:.3g}"] for name, lost in worst],
    )
    drowned = sum(lost.error > lost.update for lost in requantised.values())
    if drowned:
        note(
            f"warning: in {drowned} of {len(requantised)} weights rounding to blocks moved more than the adapter did: "
            "little of it may be left; --quantised dequantise keeps all of it"
        )


def check_out(out: Path, model: str, adapters: list[Path], overwrite: bool) -> None:
    """MiniloraError where writing to `out` would cost something that was not meant."""
    for name, source in (("--model", Path(model)), *(("--adapter", adapter) for adapter in adapters)):
        if source.exists() and out.exists() and out.samefile(source):
            raise MiniloraError(f"--out {out} is the directory of {name}, which would be lost: choose another one")
    if out.exists() and not out.is_dir():
        raise MiniloraError(f"--out {out} is a file, expected a directory or nothing there: choose another name")
    check_writable(out)
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise MiniloraError(
            f"--out {out} is there already and not empty: choose another directory, or give --overwrite"
        )


def merge(
    model: Model,
    dtype: str | None,
    tolerance: float | None,
    weights: Mapping[str, float] | None = None,
    quantised: str | None = None,
) -> dict[str, Any]:
    """Merge the weighted adapters (by default "0"), round to `dtype`, and compare the logits; MiniloraError where they
    differ by too much.
    """
    import numpy as np

    from ..backend import cast, dtype_of
    from ..ops import CompressedWeight

    weights = weights or {"0": 1.0}

    tokens = probe(model)
    model.set_adapter(None)
    base = float64_logits(model, tokens)
    model.set_adapter(weights)
    unmerged = float64_logits(model, tokens)
    requantised = model.merge_adapter(weights, quantised)
    if dtype is not None:
        for _, parameter in model.network.named_parameters():
            plain = parameter.data.dense() if isinstance(parameter.data, CompressedWeight) else parameter.data
            parameter.data = cast(plain, dtype_of(dtype))
    merged = float64_logits(model, tokens)
    written = widest_rounding(model, requantised)
    difference, largest = float(np.abs(merged - unmerged).max()), float(np.abs(unmerged).max())
    bound = (TOLERANCES[written] if tolerance is None else tolerance) * largest
    if not difference <= bound:  # NaN is not
        raise MiniloraError(
            f"the merged model's logits differ from those of base and adapter by up to {difference:.3g}, over the "
            f"{bound:.3g} that rounding to {written} explains: nothing was written; try "
            f"{'--quantised dequantise' if requantised else '--dtype float32'}, or a larger --tolerance"
        )
    if (moved := float(np.abs(unmerged - base).max())) == 0:
        note("warning: the adapter changes no logit: is it trained?")
    return {
        "difference": difference, "bound": bound, "largest_logit": largest, "moved": moved, "dtype": written,
        "requantised": requantised,
    }  # fmt: skip


def probe(model: Model) -> ndarray:
    """The same random tokens (B, T) for every merge."""
    import numpy as np

    length = min(PROBE_LENGTH, model.config.max_position_embeddings)
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (PROBE_ROWS, length))


def float64_logits(model: Model, tokens: ndarray) -> ndarray:
    import numpy as np

    from ..backend import to_numpy

    return to_numpy(model.logits(tokens)).astype(np.float64)


def widest_rounding(model: Model, requantised: Mapping[str, Rounding]) -> str:
    """The least precise dtype among the model's matrices, or form among the requantised ones: what decides how far
    rounding moves the logits.
    """
    matrices = {name: parameter.data for name, parameter in model.network.named_parameters() if parameter.ndim == 2}
    kinds = {str(data) if name in requantised else data.dtype.name for name, data in matrices.items()}
    return max(kinds, key=lambda kind: TOLERANCES[kind])
