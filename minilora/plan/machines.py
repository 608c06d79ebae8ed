"""What a plan is held against: the memory of common graphics cards and computers.

A card's memory is its nominal GiB (of a card that spends some of it on error correction, what its driver then reports)
less what its driver and CUDA context take. Of a computer's memory a part belongs to the system and other programs. Both
parts are stated here, so that a reader may put his own.
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 1 << 30
CUDA_CONTEXT = GIB // 2  # driver, CUDA context, cuBLAS workspaces
SYSTEM_SHARE = 0.2  # of a computer's memory, for the system and other programs
PROGRAM = 150_000_000  # Python, NumPy, the BLAS's buffers, a tokenizer


class Machine(NamedTuple):
    """memory: nominal, in GiB. device: what computes there, "cpu" or "cuda"."""

    name: str
    memory: int
    device: str

    @property
    def usable(self) -> int:
        """Bytes that a plan's peak may have."""
        if self.device == "cuda":
            return self.memory * GIB - CUDA_CONTEXT
        return int(self.memory * GIB * (1 - SYSTEM_SHARE)) - PROGRAM


COMPUTERS = tuple(
    Machine(f"{kind} with {memory} GB", memory, "cpu")
    for kind, memory in (("laptop", 8), ("laptop", 16), ("laptop", 32), ("desktop", 64), ("desktop", 128))
)
CARDS = tuple(
    Machine(name, memory, "cuda")
    for name, memory in (
        ("RTX 4060", 8),
        ("RTX 3060, 4070", 12),
        ("T4", 15),
        ("RTX 4080", 16),
        ("L4, A10", 22),
        ("RTX 3090, 4090", 24),
        ("RTX 5090, V100", 32),
        ("A100 40 GB", 40),
        ("L40S", 44),
        ("RTX 6000 Ada", 48),
        ("A100, H100 80 GB", 80),
        ("H200", 141),
        ("B200", 180),
    )
)
MARGINS = {  # what `usable` leaves to others, in words
    "cpu": f"{SYSTEM_SHARE:.0%} of a computer's memory is left to the system, {PROGRAM // 10**6} MB to the program",
    "cuda": f"{CUDA_CONTEXT / GIB:g} GiB of a card are left to its driver and the CUDA context",
}
MACHINES = {"cpu": COMPUTERS, "cuda": CARDS}
