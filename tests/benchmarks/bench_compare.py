"""`compare` over 100 runs of 1,000 records, read from files: `python bench_compare.py`."""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmperf import measure as experiment
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import metrics
from llmperf.measure.records import Record, Store

RUNS, CONDITIONS, REPEATS = 100, 100, 10
WANTED_S = 5.0


def record(level: int, repeat: int, speed: float) -> Record:
    """A whole record with the token times of `level` requests, as a study writes it."""
    times = tuple(0.1 + i * 0.03 / speed for i in range(24))
    requests = [RequestTrace(i, 32, 0.0, 0.0, 0.01, times, tuple(range(24))) for i in range(level)]
    trace = Trace(tuple(requests), times[-1] + 0.01)
    channel = {"status": "unavailable", "reason": "no NVIDIA GPU to ask", "unit": "bytes"}
    return Record(
        experiment="03-batch",
        condition={"strategy": "batch", "level": level, "loop": "cached", "options": {},
                   "model": "gpt2", "dtype": "fp32", "weights": "trained", "quantization": None,
                   "device": "cpu", "prompt_tokens": 32, "new_tokens": 24, "seed": level},
        repeat=repeat,
        environment=experiment.environment(),
        trace=trace.to_dict(),
        token_digest=trace.digest(),
        metrics=metrics.summarize(trace),
        memory={name: channel for name in ("device_used", "power", "rss", "uss", "reserved")},
        prediction={"plausible": True, "mbu": 0.4, "why": "a sentence of usual length " * 4},
    )  # fmt: skip


def write(folder: Path) -> int:
    """The runs as files, all alike but for their speed; returns their size in bytes."""
    one = folder / "run-0" / "records.jsonl"
    store = Store(one)
    for i in range(CONDITIONS):
        for repeat in range(REPEATS):
            store.append(record(1 + i % 10, 100 * i + repeat, 1.0))
    lines = one.read_text(encoding="utf-8").splitlines()
    draw = random.Random(0)
    for n in range(1, RUNS):
        other = folder / f"run-{n}"
        other.mkdir()
        text = (l.replace('"torch": "2', f'"torch": "{n}') for l in lines)  # noqa: E741
        shifted = (t.replace('"duration_s": 0.8', f'"duration_s": 0.8{draw.randrange(9)}')
                   for t in text)  # fmt: skip
        (other / "records.jsonl").write_text("\n".join(shifted) + "\n", encoding="utf-8")
    return sum(p.stat().st_size for p in folder.glob("*/records.jsonl"))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name))
        command = [sys.executable, "-m", "llmperf", "compare", name]
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
    print(f"{RUNS} runs of {CONDITIONS * REPEATS:,} records, {size / 1e6:.0f} MB;", end=" ")
    print(f"{len(done.stdout)} characters came out")
    print(f"seconds of the whole command: {[round(s, 2) for s in seconds]}, wanted: {WANTED_S:g}")


if __name__ == "__main__":
    main()
