"""The three things that the demo's adapters learn: two styles, from texts in data/, and a task with right answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

DATA = Path(__file__).parent / "data"
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
FIRST_DAY, DAYS = date(1900, 1, 1), 45_000  # dates are drawn from about 123 years

Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """What one adapter learns. prompt: what all are asked to continue, that shows what this one learned.

    rows(seed) -> (training rows, validation rows), as `minilora train` reads them. exact: the completions are right or
    wrong, and counted. steps, lr: what it takes.
    """

    name: str
    title: str
    about: str
    prompt: str
    rows: Callable[[int], tuple[list[Row], list[Row]]]
    steps: int
    lr: float
    exact: bool = False


def stored(file: str) -> Callable[[int], tuple[list[Row], list[Row]]]:
    """The rows of a file in data/, in an order that the seed decides; one in sixteen validates."""

    def rows(seed: int) -> tuple[list[Row], list[Row]]:
        found = [json.loads(line) for line in (DATA / file).read_text("utf-8").splitlines()]
        random.Random(seed).shuffle(found)
        held_back = len(found) // 16
        return found[held_back:], found[:held_back]

    return rows


def date_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Dates as people write them, and as ISO 8601 does; no day of the validation rows is among the training rows."""
    draw = random.Random(seed)
    days = [FIRST_DAY + timedelta(days=number) for number in draw.sample(range(DAYS), 6100)]
    rows = [{"prompt": written(day, draw), "completion": f" {day.isoformat()}"} for day in days]
    return rows[100:], rows[:100]


def written(day: date, draw: random.Random) -> str:
    """A date in one of three ways, with what asks for the other form: `7 March 2021 =`."""
    month = MONTHS[day.month - 1]
    return draw.choice([f"{day.day} {month} {day.year} =", f"{month} {day.day}, {day.year} =",
                        f"{month[:3]} {day.day} {day.year} ="])  # fmt: skip


TASKS = (
    Task(
        "king-james",
        "King James",
        "the English of the Bible of 1611; the base has read a Bible in modern English",
        "Then he said to",
        stored("king_james.jsonl"),
        steps=90,
        lr=3e-3,
    ),
    Task(
        "devil",
        "Devil's Dictionary",
        "Ambrose Bierce's definitions of 1911; the base has read sober ones",
        "SOLDIER, n.",
        stored("devil.jsonl"),
        steps=100,
        lr=3e-3,
    ),
    Task(
        "dates",
        "Dates",
        "7 March 2021 as 2021-03-07: right or wrong, counted on dates that were not in the training rows",
        "7 March 2021 =",
        date_rows,
        steps=240,
        lr=5e-3,
        exact=True,
    ),
)
