"""Faster NumPy for the primitives that training and decoding spend their time in, on any number of cores.

threads.py has the one mechanism; each other file speeds up the file of the same subject in ops/. Importing this package
registers them; `minilora.tensor.definitions_only()` switches them off.
"""

from . import attention, dora, elementwise, linear, loss, memory, rotary, rows, small, threads

__all__ = ["attention", "dora", "elementwise", "linear", "loss", "memory", "rotary", "rows", "small", "threads"]
