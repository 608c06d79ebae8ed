"""The one exception that minilora raises for bad input.

Its message is one line that says what was found, what was expected and how to mend it; the command line prints that
line and exits with status 1. Programming mistakes keep Python's own exceptions.
"""


class MiniloraError(Exception):
    """Bad input: the message is one line that says what was found, what was expected and how to mend it."""
