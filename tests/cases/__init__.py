"""The registry of the gradient suite: every primitive, how to draw calls of it, and what else computes the same.

    check_primitive("silu_mul", call, device)      # everything that is asked of a primitive, on one call

general.py and fused.py hold the cases, check.py what is asked of them, kernels.py the same for what stands in for them.
"""

from . import fused, general
from .case import Call, Case
from .check import check_primitive
from .kernels import check_kernels

CASES: dict[str, Case] = general.CASES | fused.CASES

__all__ = ["CASES", "Call", "Case", "check_kernels", "check_primitive"]
