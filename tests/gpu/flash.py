"""Check the attention kernel against its definition in float32, then time it beside torch's sdpa: on one NVIDIA GPU.

python -m tests.gpu.flash                     check and time
python -m tests.gpu.flash --check             only check (or --time)
python -m tests.gpu.flash --sweep             time each kernel with the tilings of SWEEP

Inputs are drawn anew each time (the seed is printed; --seed repeats one). Arrays that the kernel writes hold NaN before
it runs. Exits 1 if a shape failed; the others run all the same.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import statistics
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import cupy
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minilora import ops
from minilora.backend import dtype_of
from minilora.kernels.cuda import attention as kernel
from minilora.kernels.cuda.attention import Tiling

BOUND = 1e-2  # ‖found − expected‖ / ‖expected‖
NAMES = ("o", "dq", "dk", "dv")


class Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens}, {self.heads}/{self.kv_heads} heads of {self.width}"


LENGTHS = (1, 17, 64, 128, 200, 512, 2048)
CHECKED = [
    *(Shape(2 if tokens < 2048 else 1, tokens, 32, 32, 128) for tokens in LENGTHS),
    *(Shape(2, tokens, 9, 3, 64) for tokens in LENGTHS),
    Shape(3, 333, 12, 12, 64), Shape(8, 512, 12, 12, 64), Shape(1, 4097, 4, 1, 128), Shape(2, 200, 32, 8, 64),
    Shape(2, 77, 8, 1, 128),
]  # fmt: skip
TIMED = [
    Shape(1, 2048, 32, 32, 128), Shape(1, 512, 32, 32, 128), Shape(8, 512, 9, 3, 64), Shape(1, 256, 9, 3, 64),
    Shape(8, 512, 12, 12, 64), Shape(1, 8192, 32, 8, 128), Shape(1, 32768, 32, 8, 64),
]  # fmt: skip
# Each kernel's candidates; the tilings in use come first.
SWEEP = {
    64: {
        "FORWARD": [Tiling(2, 64, 2), Tiling(2, 32, 3), Tiling(2, 32, 4), Tiling(1, 64, 4), Tiling(1, 64, 3)],
        "DQ": [Tiling(2, 64, 2), Tiling(2, 32, 2), Tiling(2, 32, 4), Tiling(1, 64, 4), Tiling(1, 64, 3)],
        "DKDV": [Tiling(1, 64, 3), Tiling(1, 64, 2), Tiling(2, 32, 1), Tiling(1, 32, 3), Tiling(1, 32, 4)],
    },
    128: {
        "FORWARD": [Tiling(2, 32, 2), Tiling(1, 64, 3), Tiling(1, 64, 2), Tiling(1, 32, 3)],
        "DQ": [Tiling(1, 64, 2), Tiling(1, 32, 2), Tiling(1, 32, 3), Tiling(2, 32, 1)],
        "DKDV": [Tiling(1, 32, 2), Tiling(1, 64, 1), Tiling(1, 32, 1)],
    },
}


# --- inputs ---------------------------------------------------------------------------------------------------------


def normal(random: Any, *shape: int) -> Any:
    """A bfloat16 array of standard normal numbers."""
    return random.standard_normal(shape, dtype=np.float32).astype(dtype_of("bfloat16"))


def inputs(shape: Shape, random: Any, fused: bool = False) -> tuple[Any, Any, Any, Any]:
    """q, k, v and do; with `fused`, q, k and v are views of one array, as a fused product gives them."""
    batch, tokens, heads, kv_heads, width = shape
    do = normal(random, batch, tokens, heads, width)
    if fused:
        together = normal(random, batch, tokens, heads + 2 * kv_heads, width)
        return *(together[:, :, part] for part in (
            slice(heads), slice(heads, heads + kv_heads), slice(heads + kv_heads, None)
        )), do  # fmt: skip
    return *(normal(random, batch, tokens, count, width) for count in (heads, kv_heads, kv_heads)), do


def segment_numbers(shape: Shape, kind: str, seed: int) -> Any:
    """packed: runs of random lengths, then padding (0); scattered: numbers in no order, as int32."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 5, (shape.batch, shape.tokens))
    if kind == "scattered":
        return cupy.asarray(numbers.astype(np.int32))
    numbers = 1 + np.cumsum(random.random((shape.batch, shape.tokens)) < 8 / shape.tokens, axis=1)
    numbers[:, shape.tokens - shape.tokens // 10 :] = 0
    return cupy.asarray(numbers)


def run(q: Any, k: Any, v: Any, do: Any, **options: Any) -> list[Any]:
    """o, dq, dk, dv, written into memory that held NaN."""
    empty = cupy.empty

    def poisoned(*arguments: Any, **options: Any) -> Any:
        array = empty(*arguments, **options)
        array.view(np.uint8).fill(0xFF)
        return array

    cupy.empty = poisoned
    try:
        o, vjp = kernel.attention(q, k, v, **options)
        return [o, *vjp(do)]
    finally:
        cupy.empty = empty


def error(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖; entries below 1e-4 count as 1e-4 (with one token, dq and dk are zero)."""
    found, expected = found.astype(np.float32), expected.astype(np.float32)
    return float(cupy.linalg.norm(found - expected)) / max(float(cupy.linalg.norm(expected)), 1e-4 * found.size**0.5)


# --- checks ---------------------------------------------------------------------------------------------------------


def check(shape: Shape, fused: bool, segments: str | None, seed: int) -> str:
    """A line of errors; AssertionError where one is past the bound, or a second run gives other bits."""
    q, k, v, do = inputs(shape, cupy.random.default_rng(seed), fused)
    options = {
        "scale": shape.width**-0.5,
        "segments": None if segments is None else segment_numbers(shape, segments, seed),
    }
    assert kernel.applies(q, k, v, **options), "applies() says no"
    found = run(q, k, v, do, **options)
    again = run(q, k, v, do, **options)
    o, vjp = ops.attention.definition(*(x.astype(np.float32) for x in (q, k, v)), **options)
    errors = [error(a, b) for a, b in zip(found, [o, *vjp(do.astype(np.float32))], strict=True)]
    line = "  ".join(f"{name} {value:.1e}" for name, value in zip(NAMES, errors, strict=True))
    for name, a, b in zip(NAMES, found, again, strict=True):
        assert bool((a.view(np.uint16) == b.view(np.uint16)).all()), f"{name} has other bits the second time; {line}"
    assert all(value < BOUND for value in errors), line
    return line


def check_all(seed: int) -> int:
    failures = 0
    for shape, fused, segments in itertools.product(CHECKED, (False, True), (None, "packed", "scattered")):
        label = f"{shape}{', fused' if fused else ''}{f', {segments} segments' if segments else ''}"
        try:
            print(f"ok    {label}: {check(shape, fused, segments, seed)}", flush=True)
        except AssertionError as problem:
            failures += 1
            print(f"WRONG {label}: {problem}", flush=True)
        except Exception:  # a compiler's or a driver's message: the other shapes are to run all the same
            failures += 1
            print(f"FAILED {label}: {traceback.format_exc(limit=-3)}", flush=True)
        seed += 1
        cupy.get_default_memory_pool().free_all_blocks()
    return failures


# --- times ----------------------------------------------------------------------------------------------------------

# The device spins while the host queues what is timed, so that launches from Python do not show.
SPIN = cupy.RawKernel(
    'extern "C" __global__ void spin(long long cycles) {'
    " const long long start = clock64(); while (clock64() - start < cycles) {} }",
    "spin",
)
SPIN_CYCLES = 40_000_000  # about 20 ms


def microseconds(function: Callable[[], Any], queued: int, rounds: int = 7) -> float:
    """The median over `rounds` of a call's time, `queued` calls at once. CuPy's and torch's work share a stream."""
    function()
    times = []
    for _ in range(rounds):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        SPIN((1,), (1,), (np.int64(SPIN_CYCLES),))
        start.record()
        for _ in range(queued):
            function()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) * 1000 / queued)
    return statistics.median(times)


def as_torch(x: Any) -> torch.Tensor:
    """The same memory as a (B, H, T, d) tensor that sdpa takes."""
    return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16).transpose(1, 2)


def as_cupy(x: torch.Tensor) -> Any:
    """Back to (B, T, H, d)."""
    return cupy.from_dlpack(x.detach().transpose(1, 2).contiguous().view(torch.int16)).view(dtype_of("bfloat16"))


def pairs(shape: Shape) -> int:
    return shape.batch * shape.heads * shape.tokens * (shape.tokens + 1) // 2


def time_ours(shape: Shape, arrays: tuple[Any, ...], segments: Any = None) -> tuple[float, float, list[Any]]:
    """Microseconds forward and backward, and the results."""
    q, k, v, do = arrays
    options = {"scale": shape.width**-0.5, "segments": segments}
    queued = 50 if pairs(shape) * shape.width < 1 << 34 else 3
    forward = microseconds(lambda: kernel.attention(q, k, v, **options), queued)
    o, vjp = kernel.attention(q, k, v, **options)
    return forward, microseconds(lambda: vjp(do), queued), [o, *vjp(do)]


def time_torch(shape: Shape, arrays: tuple[Any, ...], backend: SDPBackend) -> tuple[float, float, list[Any]]:
    q, k, v, do = (as_torch(x) for x in arrays)
    leaves = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
    queued = 50 if pairs(shape) * shape.width < 1 << 34 else 3

    def forward() -> torch.Tensor:
        return scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=shape.heads != shape.kv_heads)

    with sdpa_kernel(backend):
        o = forward()
        back = lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)  # noqa: E731
        results = [as_cupy(x) for x in (o, *back())]
        return microseconds(forward, queued), microseconds(back, queued), results


def time_all(seed: int) -> int:
    failures = 0
    rows = []
    for shape in TIMED:
        arrays = inputs(shape, cupy.random.default_rng(seed))
        flops = 4 * pairs(shape) * shape.width
        ours: tuple[float, float, list[Any]] | None = None
        for name in ("ours", "ours, packed 512", "torch flash", "torch cudnn"):
            try:
                if name == "ours":
                    ours = forward, backward, results = time_ours(shape, arrays)
                elif name.startswith("ours"):
                    runs = cupy.arange(shape.tokens)[None] // 512
                    forward, backward, results = time_ours(
                        shape, arrays, cupy.ascontiguousarray(cupy.broadcast_to(runs, (shape.batch, shape.tokens)))
                    )
                    results = []
                else:
                    backend = SDPBackend.FLASH_ATTENTION if name == "torch flash" else SDPBackend.CUDNN_ATTENTION
                    forward, backward, results = time_torch(shape, arrays, backend)
            except RuntimeError as problem:
                print(f"{shape}, {name}: {str(problem).splitlines()[0]}")
                failures += name == "ours"
                continue
            apart = ""
            if ours is not None and name.startswith("torch"):
                apart = " ".join(f"{error(a, b):.0e}" for a, b in zip(ours[2], results, strict=True))
            ratio = f"{forward / ours[0]:6.2f} {backward / ours[1]:6.2f}" if ours else ""
            rows.append(
                f"{shape!s:32} {name:17} {forward:9.1f} {backward:9.1f} {flops / forward / 1e6:6.0f} "
                f"{2.5 * flops / backward / 1e6:6.0f}  {ratio:13}  {apart}"
            )
            print(rows[-1], flush=True)
        cupy.get_default_memory_pool().free_all_blocks()
        torch.cuda.empty_cache()
    print(f"\n{'shape':32} {'':17} {'fwd us':>9} {'bwd us':>9} {'TFLOP/s fwd, bwd':>13}  time / ours   apart from ours")
    print("\n".join(rows))
    return failures


def sweep(seed: int, width: int) -> None:
    """Each kernel's time with its tiling in use and with the candidates, a candidate of each kernel at once."""
    chosen = dict(kernel.TILINGS[width])
    shapes = [shape for shape in TIMED if shape.width == width]
    candidates = itertools.zip_longest(*(SWEEP[width][kind] for kind in chosen))
    for tilings in [tuple(chosen.values()), *candidates]:
        kernel.kernel.cache_clear()
        kernel.TILINGS[width] = {kind: tiling or chosen[kind] for kind, tiling in zip(chosen, tilings, strict=True)}
        print(*(f"{kind} {tuple(tiling)}" for kind, tiling in kernel.TILINGS[width].items()), sep="   ")
        for shape in shapes:
            try:
                parts = by_kernel(shape, seed)
            except (RuntimeError, cupy.cuda.driver.CUDADriverError) as problem:
                print(f"    {shape!s:32} {str(problem).splitlines()[0]}")
                continue
            listed = "  ".join(f"{name} {value:8.1f}" for name, value in parts.items())
            print(f"    {shape!s:32} {listed}", flush=True)
    kernel.TILINGS[width] = chosen
    kernel.kernel.cache_clear()


def by_kernel(shape: Shape, seed: int) -> dict[str, float]:
    """Microseconds of forward, of dq and of dk, dv: the other launch of a backward pass is left out in turn."""
    q, k, v, do = inputs(shape, cupy.random.default_rng(seed))
    queued = 50 if pairs(shape) * shape.width < 1 << 34 else 3
    result = {"forward": microseconds(lambda: kernel.attention(q, k, v, scale=0.1), queued)}
    _, vjp = kernel.attention(q, k, v, scale=0.1)
    vjp(do)
    launch = kernel.launch
    for name in ("attention_dq", "attention_dkdv"):

        def only(called: str, *arguments: Any, name: str = name) -> None:
            if called == name:
                launch(called, *arguments)

        kernel.launch = only
        try:
            result[name.removeprefix("attention_")] = microseconds(lambda: vjp(do), queued)
        finally:
            kernel.launch = launch
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.flash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare with the definition")
    parser.add_argument("--time", action="store_true", help="only take times")
    parser.add_argument("--sweep", action="store_true", help="time other tilings")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of the inputs")
    options = parser.parse_args()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    print(f"{properties['name'].decode()}, CuPy {cupy.__version__}, torch {torch.__version__}, seed {options.seed}")
    failures = 0
    # CuPy and torch work on one stream, so that events of one time the other.
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        if options.check or not (options.time or options.sweep):
            failures += check_all(options.seed)
        if options.time or not (options.check or options.sweep):
            failures += time_all(options.seed)
        if options.sweep:
            for width in SWEEP:
                sweep(options.seed, width)
    print(f"{failures} failed" if failures else "all right")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
