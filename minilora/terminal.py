"""Text that a model or a file holds, as a terminal may be given it."""

from __future__ import annotations

from typing import TextIO

KEPT = "\n\t"
# C0 (with ESC, which begins a terminal's commands), DEL and C1 (with CSI, which is ESC [ in one character).
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in KEPT}


def escaped(text: str) -> str:
    """The text with control characters written out, ESC as \\x1b; line breaks and tabs stay."""
    return text.translate(_ESCAPES)


def for_stream(text: str, stream: TextIO) -> str:
    """The text as `stream` gets it: escaped for a terminal, where it could move the cursor, change colours or worse; as
    it is for a file or a pipe.
    """
    return escaped(text) if stream.isatty() else text
