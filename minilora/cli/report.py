"""`minilora report`: a run's folder as one self-contained HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..train.folder import REPORT
from .console import note, print_json, print_table
from .options import Json


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders that `minilora train --out` wrote, or folders with such in them."),
    ],
    out: Annotated[
        Path | None, typer.Option(help=f"The file to write. Default: {REPORT} in the folder that is given.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The runs' base, to compare ΔW with W. Default: what each run names.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an HTML page of a run, or of several: loss, learning rate, gradient norms, samples, spectra."""
    from ..report.page import report_on, write_page
    from ..report.run import find_runs, read_run

    folders = [folder for path in runs for folder in find_runs(path.expanduser())]
    if out is None:
        if len(runs) > 1:
            raise typer.BadParameter("expected it with several runs: which file to write", param_hint="--out")
        out = runs[0].expanduser() / REPORT
    read = [read_run(folder, model) for folder in folders]
    write_page(report_on(read), out)
    summary = [as_data(run) for run in read]
    if as_json:
        print_json({"report": str(out), "bytes": os.path.getsize(out), "runs": summary})
        return
    print_table(
        ["run", "steps>", "loss>", "lowest validation loss>", "adapted layers>", "‖ΔW‖>"],
        [
            [
                facts["name"],
                f"{facts['steps']:,}",
                f"{facts['loss']:.4f}",
                "" if facts["lowest_validation_loss"] is None else f"{facts['lowest_validation_loss']:.4f}",
                str(facts["adapted_layers"]),
                f"{facts['update_norm']:.4g}",
            ]
            for facts in summary
        ],
    )
    for run in read:
        if run.note:
            note(f"note: {run.name}: {run.note}")
    note(f"wrote {out}")


def as_data(run: Any) -> dict[str, Any]:
    return {
        "name": run.name,
        "path": str(run.path),
        "steps": run.records[-1]["step"],
        "loss": run.last("loss"),
        "lowest_validation_loss": min(run.column("validation_loss")[1], default=None),
        "adapted_layers": len(run.layers),
        "update_norm": sum(layer.norm**2 for layer in run.layers) ** 0.5,
        "base": run.base,
    }
