"""Memory: bytes in use, the peak so far, and giving back what is not used."""

from __future__ import annotations

import os
import sys

from .backend import on_device


def memory_bytes(device: str = "cpu") -> int:
    """Bytes in use now: the process's resident set on the CPU, CuPy's pool on a GPU.

    Without /proc (macOS, Windows) the system tells only the peak, and that is what the CPU's count is there.
    """
    if device.startswith("cuda"):
        with on_device(device):
            return int(sys.modules["cupy"].get_default_memory_pool().total_bytes())
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far, in bytes.

    Without /proc (macOS) it is getrusage's count, which begins at the peak of the process that started this one; where
    that is missing too (Windows) it is 0.
    """
    peak = _peak_in_proc()
    return _peak_of_getrusage() if peak is None else peak


def _peak_in_proc() -> int | None:
    """What Linux says in /proc; None where there is no /proc, or it does not say."""
    try:
        with open("/proc/self/status") as status:
            line = next((line for line in status if line.startswith("VmHWM:")), None)
    except OSError:
        return None
    return None if line is None else int(line.split()[1]) * 1024


def _peak_of_getrusage() -> int:
    """0 where Python has no getrusage."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_unused(device: str) -> None:
    """Give back what CuPy's pool holds and nothing uses (nothing to do on the CPU)."""
    if device.startswith("cuda"):
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
