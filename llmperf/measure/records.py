"""The store: one JSON record a line, appended whole and flushed to disk.

A record is one run of one condition: what was asked, on which machine, every token's time, memory,
the prediction beside it, and a status. What failed is a record too.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmperf import RUNS, machine
from llmperf.decoding.trace import Trace

SCHEMA = 1
STATUSES = ("ok", "oom", "error", "skipped")


@dataclass(frozen=True)
class Record:
    """One run. `metrics`, `memory` and `prediction` are empty unless the status is `ok`."""

    experiment: str  # the notebook it belongs to, for instance 03-batch
    condition: dict  # strategy, level, loop, options, model, dtype, weights, lengths, sampling
    repeat: int
    status: str = "ok"
    kind: str = "measure"  # warmup and reference runs are kept apart and never counted
    reason: str | None = None  # why the status is not ok
    run_id: str = ""
    recorded_at: str = ""  # UTC, ISO 8601
    environment: dict = field(default_factory=dict)
    trace: dict | None = None  # Trace.to_dict(): raw times and tokens
    token_digest: str | None = None
    metrics: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    prediction: dict = field(default_factory=dict)
    agreement: dict | None = None  # with sequential, on the requests that both have
    warnings: list = field(default_factory=list)  # "unstable: ...", shown in captions
    schema: int = SCHEMA

    @property
    def key(self) -> str:
        """What makes a record the same record: experiment, kind, condition and repeat."""
        return key(self.experiment, self.kind, self.condition, self.repeat)

    def to_trace(self) -> Trace:
        """The run as a Trace; raises ValueError when it has none."""
        if self.trace is None:
            raise ValueError(f"a record with status {self.status!r} has no trace: {self.reason}")
        return Trace.from_dict(self.trace)


def key(experiment: str, kind: str, condition: Mapping, repeat: int) -> str:
    """A short digest; equal for equal conditions in whatever order their entries stand."""
    text = json.dumps([experiment, kind, condition, repeat], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """An append-only file of records. Opening it repairs a torn last line."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise ValueError(
                f"cannot write records to {self.path.name} in {self.path.parent}"
                f" ({error.strerror}): choose a folder that you may write to"
            ) from None
        self._drop_torn_line()
        self.keys = {r.key for r in self.read()}

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def append(self, record: Record) -> None:
        """Write one record as one line and flush it to the disk. A record already there is left."""
        if record.key in self.keys:
            return
        line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.keys.add(record.key)

    def read(self) -> list[Record]:
        """Every record in the file, in the order of writing."""
        return read(self.path)

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            warnings.warn(f"{self.path.name}: a torn last line was dropped", stacklevel=3)
            with self.path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)


def open_store(path: str, experiment: str) -> Store:
    """The store a notebook writes to: `path`, or when that is empty a new file of its own.

    A study gives all its notebooks one path; stepping through by hand measures anew each time.
    """
    if not path:
        now = datetime.datetime.now()
        path = RUNS / "interactive" / f"{experiment}-{now:%Y%m%d-%H%M%S}.jsonl"
    return Store(path)


def read(path: Path | str) -> list[Record]:
    """The records of a file. Lines that cannot be read are left out with a warning that says why.

    Fields of a newer schema that this version does not know are left out; missing ones get their
    defaults.
    """
    known = set(Record.__dataclass_fields__)
    found, left_out = [], []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if data.get("schema", SCHEMA) > SCHEMA:
                left_out.append(f"line {number}: schema {data['schema']} is newer than {SCHEMA}")
            found.append(Record(**{k: v for k, v in data.items() if k in known}))
        except (ValueError, TypeError, AttributeError) as error:
            left_out.append(f"line {number}: {error}")
    if left_out:
        warnings.warn(
            f"{Path(path).name}: {len(left_out)} left out or cut: {left_out[0]}", stacklevel=2
        )
    return found


def frame(records: Iterable[Record]):
    """One row a record as a pandas DataFrame: condition, metrics and memory in flat columns.

    Metrics that are distributions give their median (`ttft_ms`); memory gives each channel's
    highest value (`max_rss_bytes`). What is not known is missing, never 0.
    """
    import pandas as pd

    return pd.DataFrame([_flat(r) for r in records])


def _flat(record: Record) -> dict:
    row = {
        "experiment": record.experiment,
        "kind": record.kind,
        "repeat": record.repeat,
        "status": record.status,
        "reason": record.reason,
        "run_id": record.run_id,
        "machine": machine.caption(record.environment) if record.environment else None,
    }
    row.update({k: _scalar(v) for k, v in record.condition.items()})
    row.update({k: _median(v) for k, v in record.metrics.items() if k != "reasons"})
    row.update({k: v for k, v in record.prediction.items() if not isinstance(v, dict | list)})
    for name, channel in record.memory.items():
        row[f"max_{name}_{channel['unit']}"] = channel.get("max")
    if record.agreement:
        row["agree"], row["compared"] = record.agreement["agree"], record.agreement["total"]
    row["warnings"] = "; ".join(record.warnings)
    return row


def _scalar(value):
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def _median(value):
    return value.get("median") if isinstance(value, dict) else value
