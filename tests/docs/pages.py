"""The fenced blocks of the README and of docs/, with what the pages say about running them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BY_NAME = {path.relative_to(ROOT).as_posix(): path for path in PAGES}

FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1$", re.M | re.S)
FILLED = re.compile(r"<!-- filled: .*?<!-- end -->", re.S)  # the package's own source: tests/docs/test_filled.py
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\n\n?$", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the text block right behind it, and why it is not run (or None)."""

    page: str
    line: int
    language: str
    text: str
    printed: str | None
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page in order; what docs/site/fill.py writes is left out, line by line."""
    text = FILLED.sub(lambda match: re.sub("[^\n]", "", match[0]), text)
    fences = list(FENCE.finditer(text))
    found = []
    for number, fence in enumerate(fences):
        following = fences[number + 1] if number + 1 < len(fences) else None
        adjacent = (
            following is not None and following[2] == "text" and not text[fence.end() : following.start()].strip()
        )
        reason = NOT_RUN.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start()) + 1
        printed = following[3] if adjacent and following is not None else None
        found.append(Block(page, line, fence[2], fence[3], printed, reason[1] if reason else None))
    return found


def all_blocks() -> list[Block]:
    return [block for page, path in BY_NAME.items() for block in blocks(page, path.read_text("utf-8"))]
