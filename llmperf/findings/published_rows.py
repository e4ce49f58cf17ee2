"""The published log lines as records, so that they can be judged like anyone's."""

from __future__ import annotations

from functools import cache

from llmperf import REFERENCE, models, predict
from llmperf.findings import published_audit

GIB = 2**30
# What the publication ran: GPT-2 in fp32, Yi-6B in 16 bits, Yi-34B in 4 bits (AWQ).
MODELS = {
    "GPT2": ("gpt2", "fp32", None),
    "Yi-6B-Chat": ("yi-6b-chat", "fp16", None),
    "Yi-34B-Chat-4bits": ("yi-34b-chat-4bits", "fp16", "awq"),
}


@cache
def published_records() -> tuple[dict, ...]:
    """One record a published run: 164 lines are workers of runs, runs, and five quoted twice.

    A group's time is its total line, or its slowest worker where there is none. Times that no card
    could reach are marked implausible by the same audit as anyone's.
    """
    runs: dict[tuple, list[dict]] = {}
    for row in published_audit.audited():
        if row["experiment"] == "multiprocessing" and row["strategy"] == "batch":
            continue  # that page quotes the rows of the batch page
        runs.setdefault(_run(row), []).append(row)
    found = [_record(rows) for rows in runs.values()]
    return tuple(found + _device_levels())


def _run(row: dict) -> tuple:
    """Lines of one run: a single request or a batch is one line, a group has one a worker."""
    alone = row["line"] if row["strategy"] in ("sequential", "batch") else None
    keys = ("experiment", "platform", "gpu", "model", "strategy", "concurrency")
    return (*(row[k] for k in keys), alone)


def _record(rows: list[dict]) -> dict:
    row = max(rows, key=lambda r: (r["row"] == "total", float(r["seconds"])))
    level, seconds = int(row["concurrency"]), float(row["seconds"])
    audits = [r["audit"] for r in rows]
    where = [row[k] for k in ("platform", "gpu", "model", "strategy")]
    record = _bare(*where, level, f"published {row['experiment']}")
    tokens = level * int(row["new_tokens"])
    record["metrics"] = {
        "duration_s": seconds,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / seconds,
        "requests_ok": level,
    }
    held = {"reserved": row["reserved_gb"], "allocated": row["allocated_gb"]}
    record["memory"] = {
        k: {"status": "ok", "unit": "bytes", "max": float(v) * GIB} for k, v in held.items()
    }
    record["prediction"] |= {
        "plausible": all(a.plausible for a in audits),
        "why": audits[0].sentence,
    }
    return record


def _device_levels() -> list[dict]:
    """The table of device memory against processes; it has no times."""
    import csv

    with (REFERENCE / "process_vram.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    idle = {r["platform"]: float(r["device_used_gb"]) for r in rows if r["processes"] == "0"}
    found = []
    for row in rows:
        if row["processes"] == "0":
            continue
        level, platform = int(row["processes"]), row["platform"]
        record = _bare(platform, row["gpu"], row["model"], "processes", level, "published VRAM")
        used = {"first": idle[platform] * GIB, "max": float(row["device_used_gb"]) * GIB}
        inside = {"max": float(row["in_process_gb"]) * GIB}
        both = {"device_used": used, "reserved": inside}
        record["memory"] = {k: {"status": "ok", "unit": "bytes", **v} for k, v in both.items()}
        record["metrics"] = {"output_tokens": None}
        found.append(record)
    return found


def _bare(platform: str, gpu: str, model: str, strategy: str, level: int, experiment: str) -> dict:
    name, dtype, quantization = MODELS[model]
    shape = models.shape_of(name)
    return {
        "experiment": experiment,
        "kind": "measure",
        "status": "ok",
        "repeat": 0,
        "condition": {
            "strategy": strategy,
            "level": level,
            "loop": "recompute",
            "options": {},
            "model": name,
            "dtype": dtype,
            "quantization": quantization,
            "weights": "trained",
            "device": "cuda",
            "prompt_tokens": None,  # not given
            "new_tokens": 256,
        },
        "environment": {"os": platform, "gpus": [{"name": gpu}]},
        "metrics": {},
        "memory": {},
        "prediction": {"weights_bytes": predict.weights_bytes(shape, dtype, quantization)},
        "warnings": [],
    }
