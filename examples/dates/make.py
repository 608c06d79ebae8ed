"""Write the little data set of this folder: dates in words, and the same dates in ISO 8601.

    python examples/dates/make.py

Every row is {"prompt": "Write 5 March 2021 as an ISO 8601 date.\n", "completion": "2021-03-05"}: English dates in six
spellings. No date of the test or validation file is in the training file, in any spelling.
"""

import datetime
import json
import random
from pathlib import Path

SIZES = {"train": 480, "valid": 32, "test": 100}


def spellings(date: datetime.date) -> list[str]:
    """The ways that a date is written here."""
    month, day, year = date.strftime("%B"), date.day, date.year
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return [
        f"{day} {month} {year}",
        f"{month} {day}, {year}",
        f"the {day}{suffix} of {month} {year}",
        f"{month} {day}{suffix}, {year}",
        f"{day}-{month[:3]}-{year}",
        f"{month[:3]} {day} {year}",
    ]


def main() -> None:
    choose = random.Random(0)
    first = datetime.date(1900, 1, 1).toordinal()
    last = datetime.date(2099, 12, 31).toordinal()
    days = iter(choose.sample(range(first, last + 1), sum(SIZES.values())))
    for name, size in SIZES.items():
        rows = []
        for _ in range(size):
            date = datetime.date.fromordinal(next(days))
            prompt = f"Write {choose.choice(spellings(date))} as an ISO 8601 date.\n"
            rows.append({"prompt": prompt, "completion": date.isoformat()})
        path = Path(__file__).parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
