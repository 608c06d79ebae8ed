"""Training: `train(model, data, TrainConfig(...))` runs the loop that a user would write, and everything around it.

In reading order:

    config.py      what a run is: its settings, checked
    examples.py    what it is trained on, checked against the model
    loop.py        the loop itself: batches, steps, validation, saving, stopping
    checks.py      what is looked at on the way: the first step's gradients, and where a NaN came from
    table.py       what is going to be trained, as a table
    progress.py    what is seen while it runs: a bar in a terminal, lines in a log
    folder.py      what is written, where, and how a run goes on exactly where it stopped
    plot.py        the loss curve as a picture
    settings.py    settings in a TOML file, and the file that a run leaves behind

Left out: how one step is executed (step.py), and how gradients are used (optim.py).
"""

from .config import TrainConfig
from .loop import TrainingInterrupted, TrainResult, evaluate, train

__all__ = ["TrainConfig", "TrainResult", "TrainingInterrupted", "evaluate", "train"]
