"""Benchmarks: minilora beside torch + transformers + PEFT, on the same weights, in one run: `python -m tests.bench -h`.

cases.py says what is measured and what the targets are; ours.py and theirs.py do it; worker.py is the process that a
side runs in; measure.py takes the times; optimisations.py switches single optimisations off; tables.py writes
docs/performance.md from docs/performance.json.
"""
