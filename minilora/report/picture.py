"""The evidence of an adapter as one PNG: how its spectra fall off, and per block and kind of layer what it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiniloraError
from ..files import atomic_write
from .spectrum import LayerSpectrum, by_kind

COLOURS = "cividis"  # of maps: light and dark alike to colour-blind eyes, and in print
MARKERS = "osD^v<>PX*"


def draw_spectra(layers: Sequence[LayerSpectrum], title: str, path: Path) -> None:
    """Write the PNG atomically. Panels: spectra, effective rank, ‖ΔW‖; with a base ‖ΔW‖/‖W‖ and amplification; with
    another adapter φ(i, j).

    Raises MiniloraError where matplotlib (the extra `plot`) is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MiniloraError("a picture needs matplotlib, not installed here: pip install 'minilora[plot]'") from None
    maps: list[tuple[str, Callable[[LayerSpectrum], float | None]]] = [
        ("effective rank of ΔW", lambda layer: layer.effective_rank),
        ("‖ΔW‖", lambda layer: layer.norm),
    ]
    if any(layer.base_norm is not None for layer in layers):
        maps[1:] = [
            ("‖ΔW‖ / ‖W‖", lambda layer: layer.share),
            ("amplification ‖ΔW‖ / ‖UᵀWV‖", lambda layer: layer.amplification),
        ]
    compared = [layer for layer in layers if layer.right is not None]
    panels = 1 + len(maps) + 2 * bool(compared)
    columns = 2 if panels <= 4 else 3
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), dpi=150, layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(rows, columns).flat)
    draw_decay(axes[0], layers)
    for axis, (name, value) in zip(axes[1:], maps, strict=False):
        draw_map(figure, axis, layers, name, value)
    if compared:
        for axis, side in zip(axes[1 + len(maps) :], ("right", "left"), strict=False):
            draw_similarity(figure, axis, compared, side)
    for axis in axes[panels:]:
        axis.set_axis_off()
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_decay(axis: Any, layers: Sequence[LayerSpectrum]) -> None:
    """σ_i / σ_1 on a logarithmic axis: for each kind of layer the median over its blocks."""
    for number, (kind, blocks) in enumerate(by_kind(layers).items()):
        spectra = [layer.values / layer.values[0] for layer in blocks.values() if layer.rank]
        if not spectra:
            continue
        length = min(map(len, spectra))
        median = np.median([values[:length] for values in spectra], axis=0)
        marker = MARKERS[number % len(MARKERS)]
        axis.plot(range(1, length + 1), median, f"{marker}-", color=f"C{number % 10}", markersize=4, label=kind)
    axis.set(yscale="log", xlabel="i", ylabel="σᵢ / σ₁, median over blocks", title="singular values of ΔW")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(frameon=False, fontsize="small")


def draw_map(
    figure: Any, axis: Any, layers: Sequence[LayerSpectrum], name: str, value: Callable[[LayerSpectrum], float | None]
) -> None:
    """A value for each kind of layer (rows) and block (columns)."""
    kinds = by_kind(layers)
    last = max(block for blocks in kinds.values() for block in blocks)
    grid = np.full((len(kinds), last + 1), np.nan)
    for row, blocks in enumerate(kinds.values()):
        for block, layer in blocks.items():
            found = value(layer)
            grid[row, block] = np.nan if found is None else found
    image = axis.imshow(grid, aspect="auto", cmap=COLOURS, interpolation="nearest")
    axis.set(xlabel="block", title=name)
    axis.set_yticks(range(len(kinds)), list(kinds), fontsize="small")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis)


def draw_similarity(figure: Any, axis: Any, layers: Sequence[LayerSpectrum], side: str) -> None:
    """φ(i, j), the mean over all layers that both adapters have."""
    found = [getattr(layer, side) for layer in layers]
    rows, columns = (min(similarity.shape[axis] for similarity in found) for axis in (0, 1))
    mean = np.mean([similarity[:rows, :columns] for similarity in found], axis=0)
    image = axis.imshow(
        mean,
        origin="lower",
        vmin=0,
        vmax=1,
        cmap=COLOURS,
        extent=(0.5, columns + 0.5, 0.5, rows + 0.5),
        aspect="auto",
    )
    where = {"right": "inputs", "left": "outputs"}[side]
    axis.set(
        xlabel="j, of the other adapter",
        ylabel="i, of this adapter",
        title=f"φ(i, j) of {side} directions ({where}), mean",
    )
    for direction in (axis.xaxis, axis.yaxis):
        direction.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis)
