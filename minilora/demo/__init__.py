"""`minilora demo`: what LoRA claims, happening here in a minute or two, on the base model that the package holds.

In reading order:

    tasks.py       the three things that adapters learn, and their rows (data/README.md: where those come from)
    results.py     what the demo finds, as plain data
    show.py        the steps, from the first text of the base to the merged weights: each is a few public calls
    page.py        the results as sections of the HTML report
"""

from .results import Results
from .show import run_demo
from .tasks import TASKS, Task

__all__ = ["TASKS", "Results", "Task", "run_demo"]
