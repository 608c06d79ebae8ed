"""What a planted bug is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One bug: in minilora/`file`, the snippet `original`, which occurs there exactly once, becomes `mutated`.

    what: the mistake, in a few words. tests: what pytest is asked to run, of which one test has to fail.
    """

    file: str
    original: str
    mutated: str
    what: str
    tests: tuple[str, ...]

    def apply(self, source: str) -> str:
        """The source with the bug; ValueError where the snippet does not occur exactly once, or nothing changes."""
        count = source.count(self.original)
        if count != 1:
            raise ValueError(f"{self.file}: {self.original!r} occurs {count} times, expected once ({self.what})")
        if self.mutated == self.original:
            raise ValueError(f"{self.file}: {self.original!r} is not changed ({self.what})")
        return source.replace(self.original, self.mutated)

    def source(self) -> str:
        return (ROOT / "minilora" / self.file).read_text("utf-8")
