"""One run as one small file that can be given away: no names, paths, host names or keys in it."""

from __future__ import annotations

import contextlib
import getpass
import gzip
import ipaddress
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llmperf.findings.runs import Run, load_runs
from llmperf.measure import Record

# Only what is listed leaves the machine; a field added later stays until it is listed.
KEPT = ("experiment", "repeat", "status", "kind", "reason", "recorded_at", "metrics", "memory",
        "prediction", "agreement", "warnings", "schema")  # fmt: skip
CONDITION = ("strategy", "level", "loop", "dtype", "weights", "quantization", "device",
             "prompt_tokens", "new_tokens", "sampling", "stop", "seed", "arrivals",
             "slo")  # fmt: skip
ENVIRONMENT = ("os", "os_version", "kernel", "architecture", "container", "virtual_machine",
               "cpu_model", "cpu_isa", "cores_physical", "cores_logical", "cores_allowed",
               "cores_quota", "last_level_cache_bytes", "ram_total_bytes", "ram_available_bytes",
               "power_plan", "on_battery", "load_average", "cpu_others_percent", "hags",
               "mps_daemon", "python", "gil_enabled", "switch_interval_s", "packages",
               "reasons")  # fmt: skip
GPU = ("name", "driver", "driver_model", "memory_total_bytes", "memory_used_bytes",
       "memory_free_bytes", "utilization_percent", "power_limit_w", "pcie_gen_max",
       "pcie_width_max", "compute_capability", "reasons")  # fmt: skip
PRIVATE_OPTIONS = re.compile(r"(?i)url|host|key|token|path|server|model")
SECRETS = [
    (re.compile(pattern), word)
    for pattern, word in (
        (r"\b(?:hf|sk|ghp|gho|pat|glpat|xox[bap]|gsk|nvapi)[-_][\w-]{8,}", "<key>"),
        (r"\bAKIA[0-9A-Z]{12,}|\bAIza[\w-]{20,}", "<key>"),
        (r"(?i)\b(?:bearer|basic)\s+[\w.~+/=-]{6,}", "<key>"),
        (r"(?i)(?:token|password|passwd|secret|api[-_]?key)[\"']?\s*[:=]\s*[\"']?[^\s\"',}]+",
         "<key>"),
        (r"\b[\w.+-]+@[\w-]+\.[\w.]+|\b\w+://\S+", "<address>"),
        (r"(?i)\b(?:[a-z0-9-]+\.)+(?:com|org|net|edu|gov|io|ai|dev|cloud|local|lan|internal|corp"
         r"|home|localdomain|intranet)\b(?::\d+)?", "<address>"),
        (r"(?:\b[A-Za-z]:)?\\{1,2}[^\s\"':;,]+|(?<![\w.<~])~?/[^\s\"':;,]+", "<path>"),
    )
]  # fmt: skip
# Names that give nobody away, and words of the records themselves.
COMMON = {"root", "user", "admin", "home", "localhost", "ubuntu", "jovyan", "cpu", "gpu", "cuda",
          "linux", "windows", "wsl2", "docker", "batch", "threads", "processes"}  # fmt: skip


def share(source: Path | str, target: Path | str | None = None) -> Path:
    """Pack the run in `source` into `target` (default: `<machine>.jsonl.gz` here); its path.

    Token times and tokens are left out: a comparison needs none, and they are most of the size.
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
            file.writelines(lines(runs[0]))
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}") from None
    return target


def lines(run: Run) -> Iterator[str]:
    """The lines of the pack, one a record."""
    private = private_words()
    for record in run.records:
        known = asdict(record)
        kept = {name: known[name] for name in KEPT}
        kept |= {"condition": _condition(record), "trace": _trace(record), "run_id": "shared"}
        kept = scrub(kept, private)
        # A WSL2 kernel's version looks like an internet address.
        kept["environment"] = scrub(_environment(record.environment), private, addresses=False)
        yield json.dumps(kept, ensure_ascii=False) + "\n"


def private_words() -> tuple[str, ...]:
    """The words that name this user and machine; a name with blanks gives each of its words."""
    words = {Path.home().name, *Path.home().name.split(), *socket.gethostname().split(".")}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may lack a name
        words |= {getpass.getuser(), *getpass.getuser().split()}
    known = {w for w in words if len(w) >= 3 and w.lower() not in COMMON}
    return tuple(sorted(known, key=len, reverse=True))


def scrub(value, private: Sequence[str] = (), addresses: bool = True):
    """The value with private words, keys, paths and addresses in its texts and keys replaced."""
    if isinstance(value, Mapping):
        return {
            scrub(k, private, addresses): scrub(v, private, addresses) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub(v, private, addresses) for v in value]
    if not isinstance(value, str):
        return value
    for word in private:
        value = re.sub(rf"(?i)(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", "<name>", value)
    for pattern, word in SECRETS:
        value = pattern.sub(word, value)
    if addresses:
        value = re.sub(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b", "<address>", value)
        value = re.sub(r"(?i)(?<![\w:])[0-9a-f:]*:[0-9a-f:.]+", _without_ipv6, value)
    return value


def _without_ipv6(found: re.Match) -> str:
    with contextlib.suppress(ValueError):
        ipaddress.IPv6Address(found[0].rstrip("."))
        return "<address>"
    return found[0]


def _environment(env: Mapping) -> dict:
    cards = [{k: c[k] for k in GPU if k in c} for c in env.get("gpus") or []]
    return {key: env[key] for key in ENVIRONMENT if key in env} | {"gpus": cards}


def _condition(record: Record) -> dict:
    """A model in a folder of the user's own keeps no name; a hub id is public."""
    c = record.condition
    model = str(c.get("model"))
    local = re.match(r"[./~\\]|[A-Za-z]:", model) or model.count("/") > 1 or "\\" in model
    options = c.get("options") or {}
    return {name: c[name] for name in CONDITION if name in c} | {
        "model": "<a local model>" if local else model,
        "options": {k: v for k, v in options.items() if not PRIVATE_OPTIONS.search(k)},
    }


def _trace(record: Record) -> dict | None:
    """The notes, which findings read."""
    return record.trace and {"requests": [], "notes": record.trace.get("notes") or {}}
