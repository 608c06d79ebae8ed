"""docs/performance.md from docs/performance.json: the tables between its markers, targets beside results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from .cases import CASES, Case, Target

UNITS = {"seconds": "time", "peak_bytes": "peak memory", "private_bytes": "memory of its own"}


def value(side: dict[str, Any], quantity: str) -> float:
    return median(side["seconds"]) if quantity == "seconds" else side[quantity]


def reached(case: Case, sides: dict[str, Any], target: Target) -> float:
    """The quantity of the case's own side, as a share of the other's where the target names one."""
    own = value(sides[case.sides[0].name], target.quantity)
    return own / value(sides[target.against], target.quantity) if target.against else own


def seconds_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def amount(number: float, quantity: str) -> str:
    return seconds_text(number) if quantity == "seconds" else f"{number / 1e9:.2f} GB"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def measured_table(group: str, results: dict[str, Any]) -> str:
    """Median time, its spread, tokens/s and memory of every side of every case in a group."""
    rows = []
    for case in CASES.values():
        if case.group != group or case.name not in results:
            continue
        for number, side in enumerate(case.sides):
            found = results[case.name]["sides"][side.name]
            seconds = found["seconds"]
            middle = median(seconds)
            rate = f"{case.tokens / middle:.1f}" if case.tokens else ""
            spread = f"{seconds_text(min(seconds))} … {seconds_text(max(seconds))}"
            title = case.title if number == 0 else ""
            memory = f"{found['peak_bytes'] / 1e9:.2f} GB"
            rows.append((title, side.name, f"**{seconds_text(middle)}**", spread, rate, memory))
    return table(("case", "side", "median", "least … most", "tokens/s", "peak memory"), rows)


def targets_table(results: dict[str, Any]) -> str:
    """What was aimed at, and what was reached."""
    rows = []
    for case in CASES.values():
        if case.name not in results:
            continue
        for target in case.targets:
            found = reached(case, results[case.name]["sides"], target)
            if target.against:
                shown, limit = f"{found:.3f}", f"≤ {target.limit:.2f}"
            else:
                shown, limit = amount(found, target.quantity), f"≤ {amount(target.limit, target.quantity)}"
            if target.goal:
                limit += f" (goal {target.goal:.2f})"
            verdict = "met" if found <= target.limit else "**missed**"
            if target.goal and found <= target.goal:
                verdict = "goal met"
            against = f" against {target.against}" if target.against else ""
            rows.append((case.title, UNITS[target.quantity] + against, limit, shown, verdict))
    return table(("case", "quantity", "target", "reached", ""), rows)


def optimisations_table(results: dict[str, Any]) -> str:
    """What the training step costs without each optimisation."""
    rows = []
    for name, found in results.items():
        with_it, without = median(found["with"]), median(found["without"])
        gain = f"{(without / with_it - 1) * 100:+.1f} %"
        rows.append((name, found["where"], seconds_text(with_it), seconds_text(without), gain))
    return table(("optimisation", "where", "step with it", "without", "cost of leaving it out"), rows)


def environment_line(results: dict[str, Any]) -> str:
    machine = results["machine"]
    line = f"{machine['cores']} cores of {machine['cpu']} ({machine['vectors']}), {machine['system']}."
    for case in results["cases"].values():
        for side in case["sides"].values():
            about = ", ".join(f"{name} {version}" for name, version in side["environment"].items())
            if about not in line:
                line += f"\n\n{about}."
    return line


def sections(results: dict[str, Any]) -> dict[str, str]:
    """What stands between the markers of each name."""
    cases = results["cases"]
    groups = {group: measured_table(group, cases) for group in ("training", "inference", "loading")}
    return {
        "environment": environment_line(results),
        "targets": targets_table(cases),
        **groups,
        "optimisations": optimisations_table(results.get("optimisations", {})),
    }


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with what stands between `<!-- bench:NAME -->` and `<!-- /bench -->` replaced."""
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"the page has {count} places for {name}, expected 1")
    return page
