"""The process that one side of a case runs in: `python -m tests.bench.worker PROGRAM JOB OPTIONS`.

It makes the job ready and says so; then, each time that a line comes in, runs it once and prints the seconds. At the
end of its input it prints what it is: peak memory, versions, BLAS kernels. Every message is one line of JSON.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from importlib import import_module
from importlib.metadata import version

from .common import Job

PACKAGES = {"ours": ("numpy",), "theirs": ("torch", "transformers", "peft")}


def main(program: str, job: str, options: str, calls: str) -> None:
    side = import_module(f".{program}", __package__)
    prepared: Job = getattr(side, job)(**json.loads(options))
    answer("ready")
    for _ in sys.stdin:
        prepared.before()
        begin = time.perf_counter()
        for _ in range(int(calls)):
            prepared.run()
        answer((time.perf_counter() - begin) / int(calls))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer({"peak_bytes": peak, "private_bytes": private_bytes(), "environment": environment(program)})


def answer(message: object) -> None:
    print(json.dumps(message), flush=True)


def private_bytes() -> int:
    """Resident memory of this process that is no mapped file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def environment(program: str) -> dict[str, str]:
    """Versions, and the matrix-product kernels that this process runs."""
    from threadpoolctl import threadpool_info

    found = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES[program]}
    for library in threadpool_info():
        if library["user_api"] == "blas" and (program == "ours" or "torch" in library["filepath"]):
            kernel = library.get("architecture") or library["version"]
            found["blas"] = f"{library['internal_api']} {kernel}, {library['num_threads']} threads"
    if program == "theirs":
        import torch

        found["blas"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
