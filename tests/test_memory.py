"""What the memory counters say, with and without /proc."""

import builtins
import mmap
import sys

import pytest

from minilora.memory import memory_bytes, peak_memory_bytes

MB = 1 << 20


@pytest.fixture
def without_proc(monkeypatch):
    opened = builtins.open

    def refuse(path, *args, **kwargs):
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)


def test_the_peak_stays_when_the_memory_is_given_back():
    before = memory_bytes()
    with mmap.mmap(-1, 64 * MB) as pages:  # of its own: an allocator may give memory that the process holds already
        for start in range(0, 64 * MB, mmap.PAGESIZE):
            pages[start] = 1
        assert memory_bytes() - before > 60 * MB
    assert memory_bytes() - before < 32 * MB
    assert peak_memory_bytes() - before > 60 * MB


def test_without_proc_both_counts_are_the_peak_of_getrusage(without_proc):
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert peak <= peak_memory_bytes() <= memory_bytes() < peak + 64 * MB


def test_where_the_system_says_nothing_the_peak_is_zero(without_proc, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_bytes() == 0
