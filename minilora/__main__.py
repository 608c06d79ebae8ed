"""`python -m minilora` is the command line."""

from .cli import main

main()
