"""python -m examples.claims NAME|all [--model mini] [--device cpu] [--out docs/claims]: measure, draw, write pages."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.files import atomic_write, json_bytes

from . import NAMES
from .common import Base
from .page import DOCS, claim, measured, stem, write_pages


def run(name: str, base: Base, out: Path, seeds: int | None = None) -> None:
    """Measure one claim; leave NAME.json. seeds: instead of the claim's own number, where it takes seeds."""
    module = claim(name)
    chosen = settings(module, base, seeds)
    results = module.measure(base, **chosen)
    found = {
        "claim": name,
        "model": base.name,
        "device": base.device,
        "sizes": sizes(module.measure, chosen),
        "results": results,
    }
    atomic_write(out / f"{stem(name, base.name, base.device)}.json", json_bytes(found))
    verdict = module.verdict(results)
    print(f"{name} ({base.name}, {base.device}): {verdict.word}: {verdict.why}", flush=True)


def settings(module: Any, base: Base, seeds: int | None) -> dict[str, Any]:
    """What the claim's module sets for that model (SETTINGS, where mini's defaults do not suit it), and the seeds."""
    chosen = dict(getattr(module, "SETTINGS", {}).get(base.name, {}))
    if seeds is not None and "seeds" in inspect.signature(module.measure).parameters:
        chosen["seeds"] = seeds
    return chosen


def sizes(measure: Callable[..., Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Ranks, rates, steps, seeds, as measured: the chosen settings over the function's own; ways have names instead."""
    own = {name: parameter.default for name, parameter in inspect.signature(measure).parameters.items()}
    named = {name: value for name, value in own.items() if value is not inspect.Parameter.empty} | chosen
    return {name: value for name, value in named.items() if not isinstance(value, Mapping)}


def draw(name: str, out: Path) -> None:
    """The figures of a claim, from its numbers in the folder."""
    for found in measured(name, out):
        place = out / f"{stem(name, found['model'], found['device'])}.png"
        claim(name).draw(found["results"], place)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.claims", description="Measure the claims about LoRA.")
    parser.add_argument("names", nargs="*", choices=[*NAMES, "all", []], help="which claims", metavar="NAME")
    parser.add_argument("--model", default="mini", help="a model's name or path (default: mini)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--seeds", type=int, help="runs that differ by their seed alone (default: what the claim has)")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for numbers, figures and pages")
    parser.add_argument("--no-figures", action="store_true", help="the numbers only; --render draws them elsewhere")
    parser.add_argument("--render", action="store_true", help="figures and pages again, from the numbers there")
    options = parser.parse_args()
    if not options.names and not options.render:
        parser.error(f"which claim? {', '.join(NAMES)}, or all")
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}, expected at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    names = NAMES if "all" in options.names else options.names
    try:
        for name in names:
            run(name, Base(options.model, options.device), options.out, options.seeds)
            if not options.no_figures:
                draw(name, options.out)
                write_pages(options.out)
        if options.render:
            for name in NAMES:
                draw(name, options.out)
            write_pages(options.out)
    except MiniloraError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
