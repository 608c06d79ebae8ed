"""Training data: JSON Lines in, token ids with labels out, and batches of them.

In reading order:

    rows.py        lines of a file -> checked rows of one format, or an error that names the line
    encoding.py    a row -> token ids, and labels on exactly the completion or the assistant's turns
    dataset.py     a file or folder -> train, valid and test examples, and an account of what was dropped
    batching.py    examples -> batches of similar length or of packed documents, in an order that the seed decides

Left out: the one-position shift between labels and predictions (the model does it, as in Hugging Face), the division
of the loss, and devices: everything here is NumPy on the host.
"""

from .batching import Batch, Batches, batch_stream, batches
from .dataset import Dataset, load_data
from .encoding import IGNORED, Example

__all__ = ["IGNORED", "Batch", "Batches", "Dataset", "Example", "batch_stream", "batches", "load_data"]
