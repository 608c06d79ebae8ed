"""The figures' common look: one or two panels, colours that colour-blind eyes tell apart, small files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.files import atomic_write

# Okabe & Ito 2008; the last is for what the others are compared with. Markers and dashes differ, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#767676")
MARKERS = "osD^v<>PX*"
MAP = "cividis"  # of maps: light and dark alike to colour-blind eyes, and in print


class Figure:
    """A row of panels; `axis` is the first. Raises MiniloraError where matplotlib (the extra `plot`) is missing."""

    def __init__(self, x: str, y: str, panels: int = 1) -> None:
        try:
            from matplotlib.figure import Figure as Canvas
        except ImportError:
            raise MiniloraError("a figure needs matplotlib, not installed here: pip install 'minilora[plot]'") from None
        self.canvas = Canvas(figsize=(6.4 if panels == 1 else 4.6 * panels, 3.6), dpi=80, layout="constrained")
        self.axes: list[Any] = list(self.canvas.subplots(1, panels, squeeze=False).flat)
        self.axis = self.axes[0]
        self.axis.set(xlabel=x, ylabel=y)


def save(figure: Figure, path: Path) -> None:
    """Finish all panels and write the PNG atomically."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        if not axis.images:
            axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}  # above, beside no data
            axis.legend(frameon=False, fontsize="small", ncols=2, columnspacing=1.0, **place)
    content = io.BytesIO()
    figure.canvas.savefig(content, format="png", metadata={"Software": None})
    atomic_write(path, content.getvalue())
