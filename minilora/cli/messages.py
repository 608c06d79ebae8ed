"""An error as the command line shows it: one line, harmless to a terminal, with settings by the flags that one types.

The library names settings as Python does ("LoraConfig.init is 'x'", "target_modules 'q' matches no …", "found steps = 3
and epochs = 2"); whoever typed `--init` reads that.
"""

from __future__ import annotations

import re
from collections.abc import Set

from ..terminal import escaped

# Options whose values are names of files, which a message may begin with and which may be these very words.
PLACES = {"model", "data", "out", "adapter", "config", "against", "png", "messages", "predictions"}
# What the message begins with, and what it says was given; neither "steps is a file" nor the path runs/lr=1e-4/rank=8.
_BLAMED = re.compile(r"^(?:LoraConfig\.)?(\w+)(?= is (?!an? |no |not )| has '| '| \[)")
_GIVEN = re.compile(r"(?<![^\s(])(\w+) ?= ?(?!\S*[/\\])(?:True\b)?(?=\S| and)")


def one_line(message: str, options: Set[str]) -> str:
    """The message in a line; options: the names of the command's options, as Python writes them ("max_length")."""
    return with_flags(escaped(" ".join(message.split())), options)


def with_flags(message: str, options: Set[str]) -> str:
    """The message with each setting that the command has an option for under the option's name."""
    from ..train.settings import ADAPTER_KEYS

    known = {name: name for name in options - PLACES} | {"length": "max_length", "file_dtype": "adapter_dtype"}
    known |= {field: option for option, field in ADAPTER_KEYS.items()}

    def flag(found: re.Match[str]) -> str:
        option = known.get(found[1], "")
        if option not in options:
            return found[0]
        return f"--{option.replace('_', '-')}{'' if found[0].endswith(('True', found[1])) else ' '}"

    return _GIVEN.sub(flag, _BLAMED.sub(flag, message))
