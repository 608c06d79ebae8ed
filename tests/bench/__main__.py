"""Measure minilora beside torch + transformers + PEFT, and write docs/performance.json and the tables of its page.

python -m tests.bench                       the training steps: about 10 minutes on two idle cores
python -m tests.bench decode prefill        these cases
python -m tests.bench inference loading     all cases of these tables
python -m tests.bench optimisations         the step without each optimisation in turn (or: optimisations=WORD)
python -m tests.bench --render              only write the tables again, from the JSON
python -m tests.bench --list                what there is

Results add up in the JSON, so cases can be run one by one. For times that nothing disturbs: chrt -r 1 python -m ...
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .cases import CASES
from .measure import ROOT, machine, measure, record
from .tables import filled, seconds_text, sections, targets_table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="cases or tables; default: training")
    parser.add_argument("--repeat", type=int, help="repetitions of each side (default: the case's own)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "performance.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--render", action="store_true", help="only write the tables again")
    parser.add_argument("--list", action="store_true", help="print the cases")
    options = parser.parse_args()
    if options.list:
        for case in CASES.values():
            print(f"{case.group:10} {case.name:17} {case.title}: {' | '.join(side.name for side in case.sides)}")
        return 0
    if not options.render:
        parts = options.parts or ["training"]
        for part in (part for part in parts if part.startswith("optimisations")):
            from .optimisations import measure_all

            measure_all(options.results, part.partition("=")[2], options.repeat or 3)
        for case in CASES.values():
            if case.name in parts or case.group in parts:
                print(f"{case.name}: {case.title}", flush=True)
                sides = measure(case, options.repeat)
                for name, found in sides.items():
                    times = ", ".join(map(seconds_text, found["seconds"]))
                    print(f"  {name:32} {found['peak_bytes'] / 1e9:.2f} GB  {times}  {found['environment']}")
                print(targets_table({case.name: {"sides": sides}}).partition("\n| --- |")[2], flush=True)
                record(options.results, case, sides)
        print(machine())
    if options.page.exists():
        results = json.loads(options.results.read_text("utf-8"))
        options.page.write_text(filled(options.page.read_text("utf-8"), sections(results)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
