"""Faster functions for the maths of ops/, per device. Importing this registers them; no reader of ops/ needs them.

A kernel never defines anything: `tests/kernels` holds each to its primitive's definition.
"""

from . import cpu

__all__ = ["cpu"]
