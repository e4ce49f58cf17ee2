"""Run the scenarios and add a line for each to data/reference/reliability.csv.

    python tests/reliability/run.py [NAME=COUNT ...]

Without arguments everything runs at its full count, which takes some hours. Parts of a count may be
run one after another: each line of the table is a part with its own seed.
"""

import csv
import datetime
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers of all tests

from scenarios import SCENARIOS  # noqa: E402

from llmperf import REFERENCE, machine  # noqa: E402

FULL = {"killed_studies": 50, "interrupted_studies": 30, "full_disks": 20, "random_inputs": 100_000,
        "random_requests": 20_000, "hostile_models": 1_000, "hostile_archives": 300,
        "hostile_reports": 50, "long_run": 60}  # fmt: skip
FIELDS = ("what", "count", "date", "machine", "outcome")  # the long run counts minutes


def main() -> int:
    asked = {name: float(n) for name, n in (a.split("=") for a in sys.argv[1:])} or FULL
    path, failed = REFERENCE / "reliability.csv", False
    where = machine.slug(machine.describe())
    for name, number in asked.items():
        count = number if name == "long_run" else int(number)
        seed = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = SCENARIOS[name](count, seed, Path(folder))
            except AssertionError as error:
                outcome, failed = f"FAILED: {error}", True
        print(f"{name} {count:g}: {outcome}", flush=True)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            if new:
                rows.writerow(FIELDS)
            rows.writerow([name, f"{count:g}", datetime.date.today(), where, outcome])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
