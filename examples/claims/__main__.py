"""python -m examples.claims NAME|all [--model mini] [--out docs/claims]: measure, draw, write the page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minilora.errors import MiniloraError
from minilora.files import atomic_write, json_bytes

from . import NAMES
from .page import DOCS, claim, measured, stem, write_pages


def run(name: str, model: str, out: Path) -> None:
    """Measure one claim; leave NAME.json and NAME.png."""
    module = claim(name)
    results = module.measure(model)
    module.draw(results, out / f"{stem(name, model)}.png")
    atomic_write(out / f"{stem(name, model)}.json", json_bytes({"claim": name, "model": model, "results": results}))
    verdict = module.verdict(results)
    print(f"{name} ({model}): {verdict.word}: {verdict.why}", flush=True)


def draw_again(out: Path) -> None:
    """The figure of all numbers in the folder."""
    for name in NAMES:
        for found in measured(name, out):
            claim(name).draw(found["results"], out / f"{stem(name, found['model'])}.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.claims", description="Measure the claims about LoRA.")
    parser.add_argument("names", nargs="*", choices=[*NAMES, "all", []], help="which claims", metavar="NAME")
    parser.add_argument("--model", default="mini", help="a model's name or path (default: mini)")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for numbers, figures and pages")
    parser.add_argument("--render", action="store_true", help="figures and pages again, from the numbers there")
    options = parser.parse_args()
    if not options.names and not options.render:
        parser.error(f"which claim? {', '.join(NAMES)}, or all")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in NAMES if "all" in options.names else options.names:
            run(name, options.model, options.out)
            write_pages(options.out)
        if options.render:
            draw_again(options.out)
        write_pages(options.out)
    except MiniloraError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
