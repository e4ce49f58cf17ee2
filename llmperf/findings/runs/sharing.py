"""One run as one small file that can be given away: no names, paths, host names or keys in it."""

from __future__ import annotations

import contextlib
import getpass
import gzip
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmperf.findings.runs.loading import Run, load

# Only what is listed leaves the machine; a field added later stays until it is listed.
KEPT = ("experiment", "condition", "repeat", "status", "kind", "reason", "recorded_at",
        "environment", "trace", "metrics", "memory", "prediction", "agreement", "warnings",
        "schema")  # fmt: skip
ENVIRONMENT = ("os", "os_version", "kernel", "architecture", "container", "virtual_machine",
               "cpu_model", "cpu_isa", "cores_physical", "cores_logical", "cores_allowed",
               "cores_quota", "last_level_cache_bytes", "ram_total_bytes", "ram_available_bytes",
               "power_plan", "on_battery", "load_average", "cpu_others_percent", "hags",
               "mps_daemon", "python", "gil_enabled", "switch_interval_s", "packages",
               "gpus", "reasons")  # fmt: skip
NOT_OF_A_CARD = ("uuid", "serial", "processes", "bus_id")
SECRETS = (
    (re.compile(r"\b(?:hf|sk|ghp|gho|pat|glpat|xox[bap])[-_][\w-]{8,}"), "<key>"),
    (re.compile(r"(?i)\b(?:bearer\s+|(?:token|password|api[-_]?key)\s*[:=]\s*)\S+"), "<key>"),
    (re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.]+"), "<address>"),
    (re.compile(r"\b\w+://\S+"), "<address>"),
    (re.compile(r"(?:\b[A-Za-z]:)?\\{1,2}[^\s\"':;,]+|(?<![\w.<~])~?/[^\s\"':;,]+"), "<path>"),
)
# Not in an environment: a WSL2 kernel's version looks like one.
IP = (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "<address>")
# Names that give nobody away, and words of the records themselves.
COMMON = {"root", "user", "admin", "home", "localhost", "ubuntu", "jovyan", "cpu", "gpu", "cuda",
          "linux", "windows", "wsl2", "docker", "batch", "threads", "processes"}  # fmt: skip


def share(source: Path | str, target: Path | str | None = None) -> Path:
    """Pack the run in `source` into `target` (default: `<machine>.jsonl.gz` here); its path.

    Token times and tokens are left out: a comparison needs none, and they are most of the size.
    Raises ValueError when there is no run, several, or the target exists.
    """
    runs = load([source])
    if len(runs) != 1:
        raise ValueError(f"{source} holds {len(runs)} runs: name one of its folders")
    target = Path(target or f"{runs[0].name}.jsonl.gz")
    if not target.name.endswith(".jsonl.gz"):
        target = target.with_name(target.name + ".jsonl.gz")
    if target.exists():
        raise ValueError(f"{target.name} is there already: name another file, or remove it")
    try:
        with gzip.open(target, "wt", encoding="utf-8") as file:
            file.writelines(lines(runs[0]))
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}") from None
    return target


def lines(run: Run) -> Iterator[str]:
    """The lines of the pack, one a record."""
    own = own_words()
    for record in run.records:
        kept = {key: record[key] for key in KEPT if key in record}
        kept["condition"] = _condition(record["condition"])
        kept["trace"] = _trace(record.get("trace"))
        kept = scrub(kept, own, (*SECRETS, IP))
        kept["environment"] = scrub(_environment(record["environment"]), own)
        kept["run_id"] = "shared"
        yield json.dumps(kept, ensure_ascii=False) + "\n"


def own_words() -> tuple[str, ...]:
    """The words that name this user and machine."""
    words = {Path.home().name, socket.gethostname(), socket.gethostname().split(".")[0]}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may lack a name
        words.add(getpass.getuser())
    return tuple(sorted(w for w in words if len(w) >= 3 and w.lower() not in COMMON))


def scrub(value, own: Sequence[str] = (), patterns=SECRETS):
    """The value with paths, addresses, keys and own words in its texts replaced."""
    if isinstance(value, Mapping):
        return {k: scrub(v, own, patterns) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(v, own, patterns) for v in value]
    if not isinstance(value, str):
        return value
    for pattern, word in patterns:
        value = pattern.sub(word, value)
    for word in own:
        value = re.sub(rf"(?i)(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", "<name>", value)
    return value


def _environment(env: Mapping) -> dict:
    kept = {key: env[key] for key in ENVIRONMENT if key in env}
    cards = kept.get("gpus") or []
    kept["gpus"] = [
        {k: v for k, v in c.items() if k not in NOT_OF_A_CARD} | {"reasons": c.get("reasons", {})}
        for c in cards
    ]
    return kept


def _condition(condition: Mapping) -> dict:
    """A model in a folder of the user's own keeps no name; a hub id is public."""
    model = str(condition.get("model"))
    local = re.match(r"[./~\\]|[A-Za-z]:", model) or model.count("/") > 1 or "\\" in model
    options = {k: v for k, v in (condition.get("options") or {}).items() if not _address(k)}
    return {**condition, "model": "<a local model>" if local else model, "options": options}


def _address(key: str) -> bool:
    return any(word in key.lower() for word in ("url", "host", "key", "token", "path", "server"))


def _trace(trace: Mapping | None) -> dict | None:
    """Notes and duration: what findings read. Workers are named by number, not by process."""
    if trace is None:
        return None
    return {"requests": [], "notes": dict(trace.get("notes") or {})}
