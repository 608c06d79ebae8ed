"""What `minilora inspect ADAPTER --spectrum` prints: a table of low-rank evidence, JSON, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .console import note, print_json, print_table, progress

if TYPE_CHECKING:
    from ..report import LayerSpectrum

MOST_VALUES = 8  # singular values that a line shows

Cell = Callable[["LayerSpectrum"], str]


def show(adapter: Path, model: str | None, against: Path | None, png: Path | None, as_json: bool) -> None:
    """Gather the evidence, with a bar while that takes, print it, and draw it to `png` if asked for."""
    from ..report import spectra
    from ..report.picture import draw_spectra

    found = spectra(adapter, model, against, progress)
    if as_json:
        given = {"path": str(adapter), "model": model, "against": None if against is None else str(against)}
        print_json(given | {"layers": as_data(found)})
    else:
        print_spectra(found, against)
    if any(layer.dora for layer in found):
        note("note: of DoRA's layers this is s · B A, before the norms of W + s · B A are set")
    if model is None and not as_json:
        note("note: --model BASE adds ‖ΔW‖/‖W‖ and the amplification factor")
    if png is not None:
        draw_spectra(found, adapter.name, png)
        note(f"wrote {png}")


def print_spectra(found: Sequence[LayerSpectrum], against: Path | None) -> None:
    """A line for each layer, and one with the medians of all."""
    columns: list[tuple[str, Cell]] = [
        ("layer", lambda layer: layer.module),
        ("rank>", lambda layer: f"{layer.rank} of {len(layer.values)}"),
        ("singular values of ΔW", lambda layer: values_text(layer.values)),
        ("eff. rank>", lambda layer: f"{layer.effective_rank:.2f}"),
        ("stable rank>", lambda layer: f"{layer.stable_rank:.2f}"),
        ("‖ΔW‖>", lambda layer: number(layer.norm)),
    ]
    if any(layer.base_norm is not None for layer in found):
        columns += [
            ("‖ΔW‖/‖W‖>", lambda layer: number(layer.share)),
            ("‖UᵀWV‖>", lambda layer: number(layer.projected_norm)),
            ("amplification>", lambda layer: number(layer.amplification)),
        ]
    if against is not None:
        columns += [("φ in>", lambda layer: last(layer.right)), ("φ out>", lambda layer: last(layer.left))]
    print_table([name for name, _ in columns], [[cell(layer) for _, cell in columns] for layer in found])
    typer.echo(f"{len(found)} layers; medians: {medians(found)}")
    if chances := [layer.chance for layer in found if layer.chance is not None]:
        outputs, inputs = (statistics.median(chance[side] for chance in chances) for side in (0, 1))
        typer.echo(
            f"φ: how much of one ΔW's directions lies among the other's (0 to 1), in {len(chances)} layers; random "
            f"ones would have {inputs:.2g} (in) and {outputs:.2g} (out)"
        )


def values_text(values: Iterable[float]) -> str:
    """All singular values, or the first ones and the last."""
    shown = [number(value) for value in values]
    if len(shown) > MOST_VALUES:
        shown[MOST_VALUES - 2 : -1] = ["…"]
    return " ".join(shown)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def last(similarity: Any) -> str:
    """φ of all directions of both adapters."""
    return "–" if similarity is None else f"{similarity[-1, -1]:.3f}"


def medians(found: Sequence[LayerSpectrum]) -> str:
    """Of all layers: effective rank, ‖ΔW‖, and what there is of the others."""
    parts = []
    for name in ("effective_rank", "norm", "share", "amplification"):
        values = [value for layer in found if (value := getattr(layer, name)) is not None]
        label = {"effective_rank": "effective rank", "norm": "‖ΔW‖", "share": "‖ΔW‖/‖W‖"}.get(name, name)
        if values:
            parts.append(f"{label} {statistics.median(values):.3g}")
    return ", ".join(parts)


def as_data(found: Sequence[LayerSpectrum]) -> list[dict[str, Any]]:
    """Of each layer everything, matrices as lists of rows."""
    return [
        {
            "module": layer.module,
            "out": layer.shape[0],
            "in": layer.shape[1],
            "scale": layer.scale,
            "dora": layer.dora,
            "singular_values": layer.values.tolist(),
            "rank": layer.rank,
            "effective_rank": layer.effective_rank,
            "stable_rank": layer.stable_rank,
            "norm": layer.norm,
            "base_norm": layer.base_norm,
            "relative_norm": layer.share,
            "projected_norm": layer.projected_norm,
            "amplification": layer.amplification,
            "similarity_in": None if layer.right is None else layer.right.tolist(),
            "similarity_out": None if layer.left is None else layer.left.tolist(),
        }
        for layer in found
    ]
