"""Faster functions for the maths of ops/, per device. Importing this registers them; no reader of ops/ needs them.

A kernel never defines anything: `tests/kernels` holds each to its primitive's definition. Those of GPUs are imported
when a GPU is first asked for, because they need CuPy.
"""

from importlib import import_module

from ..backend import gpu_loaders
from . import cpu

gpu_loaders.append(lambda: import_module(f"{__name__}.cuda"))

__all__ = ["cpu"]
