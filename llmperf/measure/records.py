"""The store of records, one JSON line a run, and its one reader."""

import datetime
import gzip
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, get_type_hints

import orjson
from filelock import FileLock, Timeout

from llmperf import RUNS
from llmperf.decoding.trace import Trace

SCHEMA = 1
MOST_LINE_BYTES = 64 * 2**20  # a longer line is no record
MOST_DAMAGED = 10_000  # lines; after these a file is not read further
# What two runs share when their times are compared as times of two strategies.
WORK = ("model", "dtype", "quantization", "weights", "loop", "prompt_tokens", "new_tokens",
        "sampling", "arrivals", "slo")  # fmt: skip
PLACE = ("device", "hardware", "os")


@dataclass(frozen=True)
class Record:
    """One run. Where a request failed, `metrics` are of what came; a run that raised has none."""

    experiment: str  # the notebook, for instance 03-batch
    condition: dict  # strategy, level, loop, options, model, dtype, weights, lengths, sampling
    repeat: int
    status: str = "ok"
    kind: str = "measure"  # or warmup, reference, watched, twin, failed: stored, and never counted
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
        """Equal for records of the same experiment, kind, condition and repeat."""
        return digest(self.experiment, self.kind, self.condition, self.repeat)

    @property
    def possible(self) -> bool:
        """Whether the run is no faster than its machine can be."""
        return self.prediction.get("plausible") is not False

    @property
    def counts(self) -> bool:
        """Whether the run was measured, ended ok, and is possible."""
        measured = self.kind == "measure" and self.status == "ok"
        return measured and self.possible and bool(self.metrics or self.memory)

    @property
    def notes(self) -> Mapping:
        """What the strategy noted of the run."""
        notes = (self.trace or {}).get("notes")
        return notes if isinstance(notes, Mapping) else {}

    def metric(self, quantity: str) -> float | None:
        """A number in the metrics: `output_tokens_per_s`, `ttft_ms.median`."""
        value = self.metrics
        for name in quantity.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return as_number(value)


TYPES = get_type_hints(Record)


def as_number(value) -> float | None:
    """A number as it is; None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def digest(*parts: str | int | Mapping | None) -> str:
    """A short digest; equal for equal parts, whatever the order of a mapping's entries."""
    text = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(text).hexdigest()[:16]


def place(environment: Mapping) -> str | None:
    """Processor, first card and system in words; None where the processor is not known."""
    cards = environment.get("gpus") or [{}]
    words = environment.get("cpu_model"), cards[0].get("name"), environment.get("os")
    return words[0] and ", ".join(str(word) for word in words if word)


class NotWritten(RuntimeError):
    """A record could not be written, and the file is as it was: no fault of what was measured."""


class Store:
    """An append-only file of records with one writing process. Opening it repairs a torn line."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        name = self.path.name
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{name} is not a file: name a file for the records")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The system drops this lock when the process dies; stores of one process share it.
            self._lock = FileLock(f"{self.path}.lock", is_singleton=True, thread_local=False)
            self._lock.acquire(timeout=0)
            with self.path.open("ab"):
                pass
        except Timeout:
            raise ValueError(
                f"another process writes to {name}: wait until it ends, or name another file"
            ) from None
        except OSError as error:
            raise ValueError(
                f"cannot write records to {name} in {self.path.parent}"
                f" ({error.strerror}): choose a folder that you may write to"
            ) from None
        self._repair_last_line()
        kept = self.read()
        self.keys = {r.key for r in kept}
        self.machines = {machine for r in kept if (machine := place(r.environment))}
        self._references = [r for r in kept if r.kind == "reference"]

    def reference(self, wanted: Record, loop: str) -> Trace | None:
        """The trace of a reference like `wanted`, of any experiment, that ran in this loop with the
        same packages and has at least as many requests; None if the store holds none."""
        kind = lambda r: digest(r.condition | {"level": 0}, r.environment.get("packages"))  # noqa: E731
        for r in (r for r in self._references if r.notes.get("loop") == loop):
            with suppress(KeyError, TypeError):  # a damaged trace
                trace = Trace.from_dict(r.trace)
                if len(trace.requests) >= wanted.condition["level"] and kind(r) == kind(wanted):
                    return trace
        return None

    def append(self, record: Record) -> None:
        """Write one record as one line and flush it to the disk; a known key is not written again.

        Raises NotWritten when that fails, as on a full disk.
        """
        if record.key in self.keys:
            return
        text = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
        line = memoryview(text.encode(errors="replace"))  # a lone surrogate becomes a ?
        with self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except BaseException as error:
                file.truncate(size)
                if not isinstance(error, OSError):
                    raise
                why = f"cannot write to {self.path.name} ({error.strerror}): make room"
                raise NotWritten(f"{why}, then go on with --resume") from error
        self.keys.add(record.key)
        if record.kind == "reference":
            self._references.append(record)

    def read(self) -> list[Record]:
        """The records of the file (see `scan`); what was left out is a warning."""
        found, left_out = scan(self.path)
        if left_out:
            warnings.warn("; ".join(left_out), stacklevel=2)
        return found

    def _repair_last_line(self) -> None:
        """End a whole last line with a newline; drop a torn one with a warning."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        with self.path.open("r+b") as file:
            try:
                _parse(data[end:])
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            except ValueError:
                warnings.warn(f"{self.path.name}: a torn last line was dropped", stacklevel=3)
                file.truncate(end)


def open_store(path: str, experiment: str) -> Store:
    """The store a notebook writes to: `path`, or a new file when that is empty."""
    if not path:
        now = datetime.datetime.now()
        path = RUNS / "interactive" / f"{experiment}-{now:%Y%m%d-%H%M%S}.jsonl"
    return Store(path)


def scan(path: Path | str, traces: bool = True) -> tuple[list[Record], list[str]]:
    """The records of a plain or gzip file, and one sentence for each kind of line left out.

    Of a newer schema the known fields are read; of an older one the missing fields get their
    defaults. Without `traces` the requests of each trace are dropped. Raises ValueError when the
    path is not a file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.name} is not a file of records")
    found: dict[str, Record] = {}
    notes: dict[str, list[int]] = {}  # message → line numbers
    number = bad = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(_lines(file), 1):
                why = ""
                try:
                    record = _parse(line, traces)
                    if record.schema > SCHEMA:
                        why = f"schema {record.schema} is newer: known fields were read"
                    if found.setdefault(record.key, record) is not record:
                        why = "a record that was read before"
                except ValueError as error:
                    bad, why = bad + 1, str(error) if line.strip() else ""
                if why:
                    notes.setdefault(why, []).append(number)
                if bad > MOST_DAMAGED:
                    raise EOFError(f"more than {MOST_DAMAGED:,} lines are not records")
    except (EOFError, zlib.error, OSError) as error:
        notes[f"the file was read up to there ({error})"] = [number]
    _judge_again(found.values())
    return _without_repaired(found), [
        f"{path.name}, line {lines[0]}: {why}" + f" ({len(lines)} lines)" * (len(lines) > 1)
        for why, lines in notes.items()
    ]


def _without_repaired(found: Mapping[str, Record]) -> list[Record]:
    """All but the failures whose run went through later, after a resume."""
    kept, went_through = [], set()
    for key, r in reversed(found.items()):
        if r.kind != "failed" or replace(r, kind="measure").key not in went_through:
            kept.append(r)
        if r.status == "ok":
            went_through.add(key)
    return kept[::-1]


def _judge_again(found: Collection[Record]) -> None:
    """Hold runs that seemed impossible against the highest bandwidth that the file knows: other
    programs may have kept the samples low that were known when they ran."""
    name = "most_read_bytes_per_s"
    most = max((as_number(r.prediction.get(name)) or 0 for r in found), default=0)
    for r in (r for r in found if not r.possible):
        known, mbu, mfu = (as_number(r.prediction.get(key)) for key in (name, "mbu", "mfu"))
        if known and mbu and mbu * known <= most and (mfu or 0) <= 1:
            r.prediction["plausible"] = True


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, each cut at MOST_LINE_BYTES."""
    while line := file.readline(MOST_LINE_BYTES):
        yield line
        while len(line) == MOST_LINE_BYTES and line[-1:] != b"\n":
            line = file.readline(MOST_LINE_BYTES)


def _parse(line: bytes, traces: bool = True) -> Record:
    """One line as a Record; ValueError in a few words."""
    try:
        data = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))  # an editor may add the mark
    except ValueError:
        raise ValueError("incomplete, or not JSON") from None
    if not isinstance(data, dict):
        raise ValueError("not a record")
    known = {k: v for k, v in data.items() if k in TYPES and v is not None}
    wrong = [k for k, v in known.items() if not isinstance(v, TYPES[k])]
    wrong += [k for k in ("experiment", "condition", "repeat") if k not in known]
    if wrong or not _usable(known):
        wrong = wrong or ["condition, memory or environment"]
        raise ValueError(f"{', '.join(wrong)}: missing or of another type")
    if not traces and "trace" in known:
        known["trace"]["requests"] = []
    return Record(**known)


def _usable(blocks: Mapping) -> bool:
    """Whether the fields that are read without a check of their own have the right type."""
    c, cards = blocks["condition"], blocks.get("environment", {}).get("gpus") or []
    level, options = c.get("level"), c.get("options") or {}
    named = isinstance(c.get("strategy"), str) and isinstance(level, int) and level > 0
    if not named or not isinstance(options, dict) or not isinstance(cards, list):
        return False
    return all(isinstance(x, dict) for x in (*cards, *blocks.get("memory", {}).values()))
