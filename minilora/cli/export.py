"""`minilora export`: an adapter in another tool's format."""

from __future__ import annotations


def command() -> None:
    """Write an adapter in another tool's format."""
