"""The whole study from an empty cache: minutes, the share of measured runs, and the levels.

python tests/benchmarks/bench_study.py       # run it; the exit status is 1 past a bound
python tests/benchmarks/bench_study.py RUN   # of a run's folder; it is 1 where a level is missing
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from llmperf.measure import frame
from llmperf.study import answer, study

MOST_S, LEAST_SHARE = 600.0, 0.45  # on two cores
LEVELS = {  # of the default profile
    "batch": {*range(1, 11), 16},
    "coroutine": {1, 5, 10},
    "threads": {1, 2, 3, 5, 10},
    "processes": {1, 2, 3},
}


def figures(folder: Path) -> tuple[bool, bool]:
    """Print the figures of a run; whether it is quick enough, and whether it has all levels."""
    run, seconds = answer.load(folder), sum(study.load_state(folder).seconds.values())
    measured = sum(r.metric("duration_s") or 0 for r in run.measured)
    print(f"{seconds / 60:.1f} minutes, {measured / seconds:.0%} of them measured runs")
    rows = frame(r for r in run.measured if "arrivals" not in r.condition)
    found = {name: set(levels) for name, levels in rows.groupby("strategy")["level"]}
    for name in LEVELS:
        print(f"{name}: {', '.join(map(str, sorted(found.get(name, ()))))}")
    missing = {name: sorted(want - found.get(name, set())) for name, want in LEVELS.items()}
    print("levels that are missing:", {k: v for k, v in missing.items() if v} or "none")
    return seconds <= MOST_S and measured >= LEAST_SHARE * seconds, not any(missing.values())


def main() -> tuple[bool, bool]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "llmperf", "run", "--out", str(folder)]
        subprocess.run(command, env=os.environ | {"LLMPERF_CACHE": scratch}, check=True)
        return figures(folder)


if __name__ == "__main__":
    sys.exit(not figures(Path(sys.argv[1]))[1] if sys.argv[1:] else not all(main()))
