"""Kernels for NVIDIA GPUs through CuPy: cuBLAS by way of gemm.py, and the .cu files beside their launchers.

Each .cu file says what it computes, where that is defined, and its roofline. Importing this package registers all of
them; `minilora.tensor.definitions_only()` switches them off.
"""

from . import attention, elementwise, gemm, linear, lists, loss, norm, rows

__all__ = ["attention", "elementwise", "gemm", "linear", "lists", "loss", "norm", "rows"]
