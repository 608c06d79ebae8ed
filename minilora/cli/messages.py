"""An error as the command line shows it: one line, harmless to a terminal, with settings by the flags that one types.

The library names settings as Python does ("LoraConfig.init is 'x'", "target_modules 'q' matches no …", "found steps = 3
and epochs = 2"); whoever typed `--init` reads that.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..terminal import escaped

_BLAMED = re.compile(r"^(?:LoraConfig\.)?(\w+)(?= is | '| \[)")  # what the message begins with
_GIVEN = re.compile(r"\b(\w+) ?= ?(?:True\b)?(?=\S| and)")  # and what it says was given


def one_line(message: str, options: Collection[str]) -> str:
    """The message in a line; options: the names of the command's options, as Python writes them ("max_length")."""
    return with_flags(escaped(" ".join(message.split())), options)


def with_flags(message: str, options: Collection[str]) -> str:
    """The message with each setting that the command has an option for under the option's name."""
    from ..train.settings import ADAPTER_KEYS

    known = {name: name for name in options} | {"length": "max_length", "file_dtype": "adapter_dtype"}
    known |= {field: option for option, field in ADAPTER_KEYS.items()}

    def flag(found: re.Match[str]) -> str:
        option = known.get(found[1], "")
        if option not in options:
            return found[0]
        return f"--{option.replace('_', '-')}{'' if found[0].endswith(('True', found[1])) else ' '}"

    return _GIVEN.sub(flag, _BLAMED.sub(flag, message))
