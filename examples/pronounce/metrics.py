"""How right a written pronunciation is: exact match and phoneme error rate, each with stress marks and without.

A word may have several accepted pronunciations; the one closest to what was written counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Over a list of words. Without stress, AH0, AH1 and AH2 are one phoneme."""

    words: int
    exact_match: float  # share of words
    phoneme_error_rate: float  # edits / phonemes of the reference, both summed over the words; may exceed 1
    exact_match_without_stress: float
    phoneme_error_rate_without_stress: float


def without_stress(pronunciation: str) -> str:
    """The pronunciation less its stress digits: "AH0 B AW1 T" -> "AH B AW T"."""
    return " ".join(phoneme.rstrip("012") for phoneme in pronunciation.split())


def edit_distance(written: Sequence[str], reference: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that turn one into the other (Levenshtein 1966)."""
    row = list(range(len(reference) + 1))  # row[j]: distance of the part of `written` read so far to reference[:j]
    for i, symbol in enumerate(written, start=1):
        diagonal, row[0] = row[0], i
        for j, expected in enumerate(reference, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (symbol != expected))
    return row[-1]


def closest(written: str, references: Sequence[str]) -> tuple[int, int]:
    """(edits, phonemes) of the accepted pronunciation with the lowest error rate."""
    pairs = [(edit_distance(written.split(), reference.split()), len(reference.split())) for reference in references]
    return min(pairs, key=lambda pair: pair[0] / pair[1])


def score(written: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Scores one written pronunciation per word against the accepted ones of that word."""
    if not written or len(written) != len(references):
        raise ValueError(f"{len(written)} pronunciations for {len(references)} words, expected one for each word")
    bare = [without_stress(text) for text in written]
    bare_references = [[without_stress(reference) for reference in accepted] for accepted in references]
    return Score(len(written), *_rates(written, references), *_rates(bare, bare_references))


def _rates(written: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """(exact match, phoneme error rate)"""
    pairs = [closest(text, accepted) for text, accepted in zip(written, references, strict=True)]
    exact = sum(edits == 0 for edits, _ in pairs) / len(pairs)
    return exact, sum(edits for edits, _ in pairs) / sum(phonemes for _, phonemes in pairs)
