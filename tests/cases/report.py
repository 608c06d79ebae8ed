"""python -m tests.cases.report: run the registry, record the worst errors, and write docs/gradients.md.

python -m tests.cases.report                  on the CPU
python -m tests.cases.report --device cuda    on a GPU; both records go into one page
python -m tests.cases.report --render         write the page again from what is recorded in docs/gradients.json
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from minilora.backend import parse_device
from minilora.tensor import PRIMITIVES, Primitive
from tests.cases import CASES, Call, check_kernels, check_primitive
from tests.cases.case import for_each
from tests.kernels.test_cpu import large_calls

ROOT = Path(__file__).parents[2]
PAGE, RECORD = ROOT / "docs" / "gradients.md", ROOT / "docs" / "gradients.json"
EXAMPLES = 100
SUITE = ("tests/test_gradcheck.py", "tests/ops", "tests/kernels", "tests/lora/test_laws.py", "tests/models")


# --- running ----------------------------------------------------------------------------------------------------------


def measure(device: str, examples: int = EXAMPLES) -> dict[str, Any]:
    """The worst errors of every primitive and kernel over `examples` calls of each."""
    primitives: dict[str, dict[str, float]] = {}
    kernels: dict[str, dict[str, float]] = defaultdict(dict)

    def note_kernel(kernel: str, dtype: str, error: float) -> None:
        _note(kernels[kernel], dtype, error)

    for name, case in CASES.items():
        primitives[name] = {}
        note = partial(_note, primitives[name])
        for_each(case.calls, examples, partial(_check_both, name, device, note, note_kernel))
        if name in large_calls():
            check_kernels(name, case, large_calls()[name], device, ("float64", "float32"), note_kernel)
    return {"machine": machine(device), "examples": examples, "primitives": primitives, "kernels": dict(kernels)}


def _note(worst: dict[str, float], against: str, error: float) -> None:
    worst[against] = float(f"{max(error, worst.get(against, 0.0)):.0e}")  # one digit: what the page shows


def _check_both(name: str, device: str, note: Any, note_kernel: Any, call: Call) -> None:
    check_primitive(name, CASES[name], call, device, note)
    check_kernels(name, CASES[name], call, device, record=note_kernel)


def machine(device: str) -> str:
    kind, index = parse_device(device)
    if kind == "cpu":
        return f"{platform.machine()}, NumPy {__import__('numpy').__version__}"
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    return f"{name}, CuPy {cupy.__version__}"


def run_suite(device: str) -> str:
    """pytest's own last line for the gradient suite on the device: how many passed."""
    command = [sys.executable, "-m", "pytest", "-q", "--device", device, *SUITE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()
    return re.sub(r" in [\d.]+s.*", "", last).strip("= ")


# --- the page ---------------------------------------------------------------------------------------------------------


def formula_and_source(primitive: Primitive) -> tuple[str, str]:
    """The formula and its derivatives, and the papers, out of a primitive's docstring."""
    text = inspect.cleandoc(primitive.__doc__ or "")
    paragraphs = text.split("\n\n")
    first = " ".join(paragraphs[0].split())
    sources = re.findall(r"\(([^()]*\b(?:19|20)\d\d[^()]*)\)", " ".join(text.split()))
    for source in sources:
        first = first.replace(f"({source})", "")
    first = re.sub(r"\s+([.:,;])", r"\1", first).strip()
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ") and "=" in line]
    derivatives = [re.sub(r"\s+", " ", re.split(r"\s{2,}(?=\(|only |since )", line)[0]) for line in lines]
    for source in sources:
        derivatives = [line.replace(f"({source})", "").rstrip(" ,") for line in derivatives]
    return "<br>".join([first, *derivatives]).replace("|", "\\|"), "; ".join(sources) or "elementary"


def render(records: dict[str, Any]) -> str:
    cpu, cuda = records["cpu"], records.get("cuda")
    lines = [
        "# Gradients",
        "",
        "<!-- Written by `python -m tests.cases.report`. -->",
        "",
        *INTRODUCTION.strip().splitlines(),
        "",
        f"CPU: {cpu['machine']}, {cpu['examples']} calls of each primitive; `pytest` on the suite: {cpu['suite']}.",
        "",
        f"GPU: {cuda['machine']}, {cuda['examples']} calls of each primitive; "
        f"`pytest --device cuda` on the suite: {cuda['suite']}."
        if cuda
        else "GPU: not recorded yet (`python -m tests.cases.report --device cuda`).",
        "",
        "## Primitives",
        "",
        "The worst relative error, in norm, of value and gradients against the composition, and of gradients against",
        "finite differences, both in float64; and of float32 against float64 for the same inputs.",
        "",
        "| primitive | formula | source | composition, CPU | differences, CPU | float32, CPU | composition, GPU "
        "| differences, GPU | float32, GPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in CASES:
        formula, source = formula_and_source(PRIMITIVES[name])
        cells = [
            f"{record['primitives'][name].get(against, 0.0):.0e}"
            if record and name in record["primitives"]
            else "not yet recorded"
            for record in (cpu, cuda)
            for against in ("composition", "differences", "float32")
        ]
        lines.append(f"| `{name}` | {formula} | {source} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Kernels",
        "",
        "The worst relative error, in norm, of value and gradients against the definition in float64.",
        "",
        "| kernel | float64 | float32 | bfloat16 | float16 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in (cpu, cuda):
        for kernel, errors in sorted((record or {}).get("kernels", {}).items()):
            cells = [
                f"{errors[dtype]:.0e}" if dtype in errors else "–"
                for dtype in ("float64", "float32", "bfloat16", "float16")
            ]
            lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """
Every derivative here is written by hand, and checked three ways, over shapes (axes of length 1, none at all,
broadcast), strides, dtypes and every set of trained inputs (`tests/cases`):

    hand-derived vjp  =  autograd of the same function composed of other primitives  =  finite differences in float64

The differences are central, extrapolated, and know their own error (`minilora/differences.py`): a gradient below the
noise floor counts as undecided, never as passed (`minilora/comparison.py`). Whole networks of every family, each
adapter's laws (merging, rows, accumulation, packing, checkpointing) and every kernel have tests of the same kind.

Under dropout, gradients are checked with the masks held fixed; that they are projections of the merged weight's
gradient, dA = s Bᵀ dW and dB = s dW Aᵀ, is then no law, since A reads another input than W.

The suite is itself tested: `python -m tests.mutants` plants more than two hundred bugs (a dropped term, a wrong sign, a
missing scale, a transpose, a stale cache, a mask that is off by one …), one at a time, and prints the test that noticed
each. A model of your own is checked by `minilora gradcheck --model M [--adapter DIR]`.
"""


def write_pages(records: dict[str, Any]) -> None:
    """docs/gradients.md, and the tables of the book that are taken from the same record."""
    PAGE.write_text(render(records), "utf-8")
    runpy.run_path(str(ROOT / "docs" / "site" / "fill.py"), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cases.report", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help=f"calls of each primitive (default: {EXAMPLES})")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page from the record")
    options = parser.parse_args()
    records = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    if options.render:
        write_pages(records)
        return
    kind = options.device.partition(":")[0]
    records[kind] = measure(options.device, options.examples) | {"suite": "running"}
    for _ in range(2):  # first without the suite's result, since one of its tests compares the page with the record
        RECORD.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", "utf-8")
        write_pages(records)
        if records[kind]["suite"] == "running":
            records[kind]["suite"] = run_suite(options.device)


if __name__ == "__main__":
    main()
