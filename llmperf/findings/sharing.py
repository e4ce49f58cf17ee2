"""One run as one small file that can be given away: figures and listed words, no free text."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from llmperf.findings.runs import Run, load_runs
from llmperf.measure import Record

# Only what is listed leaves the machine; a field added later stays until it is listed.
KEPT = ("experiment", "repeat", "status", "kind", "recorded_at", "metrics", "memory",
        "prediction", "agreement", "schema")  # fmt: skip
CONDITION = ("strategy", "level", "loop", "options", "dtype", "weights", "quantization", "device",
             "prompt_tokens", "new_tokens", "sampling", "stop", "seed", "arrivals",
             "slo")  # fmt: skip
ENVIRONMENT = ("os", "os_version", "kernel", "architecture", "container", "virtual_machine",
               "cpu_model", "cpu_isa", "cores_physical", "cores_logical", "cores_allowed",
               "cores_quota", "last_level_cache_bytes", "ram_total_bytes", "ram_available_bytes",
               "power_plan", "on_battery", "load_average", "cpu_others_percent", "hags",
               "mps_daemon", "python", "gil_enabled", "switch_interval_s")  # fmt: skip
GPU = ("name", "driver", "driver_model", "memory_total_bytes", "memory_used_bytes",
       "memory_free_bytes", "utilization_percent", "power_limit_w", "pcie_gen_max",
       "pcie_width_max", "compute_capability")  # fmt: skip
# The fields whose text is a word of the kit or a fact of the hardware. All other text is dropped:
# a reason or a warning may quote a path, an address or a key.
WORDS = {"experiment", "status", "kind", "recorded_at", "strategy", "loop", "dtype", "weights",
         "quantization", "device", "unit", "clock", "limit", "memory_level", "engine", "variant",
         "stream", "os", "os_version", "kernel", "architecture", "container", "virtual_machine",
         "cpu_model", "cpu_isa", "power_plan", "python", "name", "driver", "driver_model",
         "compute_capability"}  # fmt: skip
FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")


def share(source: Path | str, target: Path | str | None = None) -> Path:
    """Pack the run in `source` into `target` (default: `<machine>.jsonl.gz` here); its path.

    Raises ValueError when there is no run, several, or the target exists.
    """
    runs = load_runs([source])
    if len(runs) != 1:
        raise ValueError(f"{source} holds {len(runs)} runs: name one of its folders")
    target = Path(target or re.sub(r"[^\w-]+", "-", runs[0].name).strip("-"))
    if not target.name.endswith(".jsonl.gz"):
        target = target.with_name(target.name + ".jsonl.gz")
    if target.exists():
        raise ValueError(f"{target.name} is there already: name another file, or remove it")
    try:
        with gzip.open(target, "wt", encoding="utf-8") as file:
            file.writelines(_lines(runs[0]))
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}") from None
    return target


def _lines(run: Run) -> Iterator[str]:
    for r in run.records:
        notes = (r.trace or {}).get("notes") or {}
        kept = _picked(vars(r), KEPT) | {
            "condition": _picked(r.condition, CONDITION),
            "environment": _picked(r.environment, ENVIRONMENT),
            "trace": r.trace and {"requests": [], "notes": notes},
        }
        kept = without_free_text(kept)
        kept["run_id"], kept["warnings"] = "shared", ["unstable"] * bool(r.warnings)
        kept["condition"]["model"] = _public_model(r)
        cards = r.environment.get("gpus") or []
        kept["environment"]["gpus"] = [without_free_text(_picked(card, GPU)) for card in cards]
        kept["environment"]["packages"] = r.environment.get("packages") or {}
        yield json.dumps(kept, ensure_ascii=False) + "\n"


def _picked(values: Mapping, names: tuple[str, ...]) -> dict:
    return {name: values[name] for name in names if name in values}


def without_free_text(value, field: str = ""):
    """The value with its numbers; of its texts those in a field of WORDS, else None."""
    if isinstance(value, Mapping):
        return {k: without_free_text(v, k) for k, v in value.items() if FIELD_NAME.fullmatch(k)}
    if isinstance(value, list | tuple):
        return [without_free_text(v, field) for v in value]
    return None if isinstance(value, str) and field not in WORDS else value


def _public_model(record: Record) -> str:
    """A model in a folder of the user's own keeps no name; a hub id is public."""
    model = str(record.condition.get("model"))
    local = re.match(r"[./~\\]|[A-Za-z]:", model) or model.count("/") > 1 or "\\" in model
    return "<a local model>" if local else model
