"""Taking the times: every side in a fresh process of its own, one repetition of each side in turn."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import Case, Side

ROOT = Path(__file__).parent.parent.parent
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # a setting of one machine's that would choose another BLAS kernel


class Worker:
    """The process of a side: started, made ready and warmed up by one run that does not count."""

    def __init__(self, side: Side, calls: int, warm_up: bool = True) -> None:
        variables = {name: value for name, value in os.environ.items() if name not in UNSET}
        arguments = [side.program, side.job, json.dumps(side.options), str(calls)]
        self.side = side
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=variables | {"PYTHONPATH": str(ROOT)},
        )
        self.seconds: list[float] = []
        self._answer()
        if warm_up:
            self.run()
            self.seconds.clear()

    def run(self) -> None:
        """One repetition."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.seconds.append(self._answer())

    def close(self) -> dict[str, Any]:
        """End the process; its times, its memory and what it ran on."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        result = {**self._answer(), "seconds": self.seconds}
        self.process.wait()
        return result

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line[:1] in '"{0123456789':  # not what a library prints
                return json.loads(line)
        assert self.process.stderr is not None
        raise RuntimeError(f"{self.side} ended:\n{self.process.stderr.read()[-2000:]}")


def measure(case: Case, repeat: int | None = None) -> dict[str, Any]:
    """Seconds of every repetition of every side, A B A B, with the memory of its process: {side: {...}}."""
    repeat = repeat or case.repeat
    if not case.fresh:
        workers = [Worker(side, case.calls) for side in case.sides]
        for _ in range(repeat):
            for worker in workers:
                worker.run()
        return {worker.side.name: worker.close() for worker in workers}
    results: dict[str, Any] = {}
    for _ in range(repeat):
        for side in case.sides:
            worker = Worker(side, case.calls, warm_up=False)
            worker.run()
            result = worker.close()
            result["seconds"] = [*results.get(side.name, {}).get("seconds", []), *result["seconds"]]
            results[side.name] = result
    return results


def machine() -> dict[str, Any]:
    """The processor and how many of its cores this process may use."""
    name = platform.processor()
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
            if line.startswith("flags"):
                widest = next((flag for flag in ("avx512f", "avx2") if flag in line.split()), "no AVX2")
    return {"cpu": name, "vectors": widest, "cores": len(os.sched_getaffinity(0)), "system": platform.system()}


def record(file: Path, case: Case, sides: dict[str, Any]) -> None:
    """Put a case's results into the JSON file, beside those of other cases and in place of its own earlier ones."""
    results = json.loads(file.read_text("utf-8")) if file.exists() else {"cases": {}}
    results["machine"] = machine()
    results["cases"][case.name] = {"options": [asdict(side) for side in case.sides], "sides": sides}
    file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
