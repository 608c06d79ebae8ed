"""Loads a file or folder into train, valid and test examples, and accounts for every row that was cut or dropped."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import MiniloraError
from ..files import not_there
from .encoding import Encoder, Example, Tokenizer
from .rows import read_rows

SPLITS = ("train", "valid", "test")
ROWS_AT_ONCE = 1024  # rows that the tokenizer gets in one call


@dataclass
class FileReport:
    """What became of the rows of one file."""

    path: Path
    format: str = ""
    rows: int = 0
    truncated: int = 0  # of the rows that were kept
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    unused_keys: set[str] = field(default_factory=set)

    def dropped_by_reason(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items()))


@dataclass
class Dataset:
    """The examples of each split (empty where there is none), and what was left out on the way."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    max_length: int
    files: dict[str, FileReport]  # by split; a part taken off train has no file of its own
    files_not_read: list[str]

    @property
    def dropped(self) -> dict[str, dict[str, int]]:
        """Dropped rows: split -> reason -> count."""
        return {split: dict(report.dropped) for split, report in self.files.items()}

    def summary(self) -> str:
        """A line per split: rows kept, truncated, dropped and why; tokens, and how many of them are learned."""
        lines = []
        for split, examples in zip(SPLITS, (self.train, self.valid, self.test), strict=True):
            if not examples:
                continue
            tokens = sum(len(example.tokens) for example in examples)
            labels = sum(example.label_count for example in examples)
            parts = [f"{split}: {len(examples):,} rows, {tokens:,} tokens, {labels:,} learned"]
            if report := self.files.get(split):
                parts.append(f"{report.path.name} has {report.rows:,} rows ({report.format})")
                if report.truncated:
                    parts.append(f"{report.truncated:,} truncated to {self.max_length:,} tokens")
                if report.dropped:
                    parts.append(f"{report.dropped.total():,} dropped: {report.dropped_by_reason()}")
                if report.unused_keys:
                    parts.append(f"keys not used: {', '.join(sorted(report.unused_keys))}")
            else:
                parts.append("taken off the training rows")
            lines.append("; ".join(parts))
        if self.files_not_read:
            lines.append(f"not read: {', '.join(self.files_not_read)}")
        return "\n".join(lines)


def load_data(
    path: str | Path,
    tokenizer: Tokenizer | None,
    max_length: int,
    mask_prompt: bool = True,
    valid_fraction: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Reads a .jsonl file (all of it `train`), or a folder with any of train.jsonl, valid.jsonl and test.jsonl.

    Only completions and assistant turns are learned, unless mask_prompt=False. Rows longer than max_length tokens lose
    their right end; one that has no label left is dropped and counted. valid_fraction takes that part of the training
    rows, at least one, chosen by the seed, as `valid`. Raises MiniloraError that names file and line for data that does
    not fit.
    """
    path = Path(path)
    if tokenizer is None:
        raise MiniloraError("found a model without a tokenizer; text needs one; put tokenizer.json beside the model")
    if max_length < 2:
        raise MiniloraError(
            f"max_length is {max_length}; expected at least 2 tokens, one to predict the other; raise it"
        )
    if seed < 0:
        raise MiniloraError(f"seed is {seed}; expected at least 0; raise it")
    if not 0 <= valid_fraction < 1:
        raise MiniloraError(f"valid_fraction is {valid_fraction}; expected at least 0 and below 1; 0.05 is usual")
    files, not_read = find_files(path)
    if valid_fraction and ("valid" in files or "train" not in files):
        fact = "has a valid.jsonl already" if "valid" in files else "has no train.jsonl to take it from"
        raise MiniloraError(f"valid_fraction is {valid_fraction}, but {path} {fact}; leave valid_fraction out")

    encoder = Encoder(tokenizer)
    reports = {split: FileReport(file) for split, file in files.items()}
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for split, report in reports.items():
        examples[split] = _load_file(report, encoder, max_length, mask_prompt)
    if valid_fraction:
        examples["train"], examples["valid"] = _split_off(examples["train"], valid_fraction, seed, path)
    return Dataset(**examples, max_length=max_length, files=reports, files_not_read=not_read)


def find_files(path: Path) -> tuple[dict[str, Path], list[str]]:
    """The file of each split that there is, and the names of other .jsonl files in the folder.

    Raises MiniloraError where there is no file to read.
    """
    if path.is_dir():
        files = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").is_file()}
        others = sorted(file.name for file in path.glob("*.jsonl") if file not in files.values())
        if not files:
            found = ", ".join(others) or "no .jsonl file"
            raise MiniloraError(
                f"{path}: found {found}; expected train.jsonl, valid.jsonl or test.jsonl; rename or add files"
            )
        return files, others
    if not path.exists():
        raise not_there(path, "a .jsonl file, or a folder with train.jsonl")
    return {"train": path}, []


def _load_file(report: FileReport, encoder: Encoder, max_length: int, mask_prompt: bool) -> list[Example]:
    rows = read_rows(report.path)
    examples: list[Example] = []
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        report.format = chunk[0].format
        report.rows += len(chunk)
        report.unused_keys.update(*(row.unused_keys for row in chunk))
        for example, full_length in encoder.examples(chunk, max_length, mask_prompt):
            truncated = full_length > max_length
            if example.label_count:
                examples.append(example)
                report.truncated += truncated
            elif truncated:
                report.dropped[f"with no label within {max_length:,} tokens"] += 1
            else:
                report.dropped["with nothing to predict"] += 1
    if not report.rows:
        raise MiniloraError(
            f'{report.path}: found no rows; expected one JSON object per line such as {{"text": "..."}}; fill it'
        )
    if not examples:
        raise MiniloraError(
            f"{report.path}: all {report.rows:,} rows were dropped: {report.dropped_by_reason()}; "
            "expected rows with something to learn within max_length; raise max_length or shorten what comes first"
        )
    return examples


def _split_off(examples: list[Example], fraction: float, seed: int, path: Path) -> tuple[list[Example], list[Example]]:
    """(train, valid), both in the order of the file."""
    if len(examples) < 2:
        raise MiniloraError(
            f"{path}: found one usable row; valid_fraction needs at least two; add rows or leave it out"
        )
    size = min(max(round(fraction * len(examples)), 1), len(examples) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:size].tolist())
    train = [example for number, example in enumerate(examples) if number not in chosen]
    return train, [examples[number] for number in sorted(chosen)]
