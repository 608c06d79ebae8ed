"""python -m tests.mutants: plant every bug, and print which test noticed it. Exit status 1 if one was not noticed.

python -m tests.mutants                  all of them
python -m tests.mutants lora attention   those whose file or description has one of these words
"""

from __future__ import annotations

import argparse
import sys
import time

from .harness import run_all
from .planted import MUTANTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only bugs whose file or description has one of these words")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()
    chosen = [
        mutant
        for mutant in MUTANTS
        if not options.words or any(word in f"{mutant.file} {mutant.what}" for word in options.words)
    ]
    start, survivors = time.monotonic(), 0
    for number, outcome in enumerate(run_all(chosen, options.workers), 1):
        survivors += not outcome.killed_by
        killer = outcome.killed_by.rpartition("/")[2] or "NOT NOTICED"
        print(
            f"{number:3}  {outcome.mutant.file:26} {outcome.mutant.what:72} {killer}  {outcome.seconds:.1f} s",
            flush=True,
        )
    noticed = len(chosen) - survivors
    print(f"{noticed} of {len(chosen)} planted bugs were noticed, in {time.monotonic() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
