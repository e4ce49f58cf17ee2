"""Reading runs: what can be read is read, and what was left out is said.

A run is a file of records (`.jsonl`, or `.jsonl.gz` as `share` writes it) or a folder that holds
one. Comparing needs no token times, so those, most of a line, are skipped unread.
"""

from __future__ import annotations

import gc
import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import orjson

from llmperf import REFERENCE, RUNS, findings, machine
from llmperf.measure import records

ENDINGS = (".jsonl", ".jsonl.gz")
TRACE, REQUESTS, NOTES = b', "trace": {', b'"requests": [', b'], "notes": '  # around token times
GPU_BUSY_PERCENT = 10


@dataclass(frozen=True)
class Run:
    """One machine's records (as mappings), and what to know before using them."""

    name: str  # the machine's short name; #2 for a second run of it
    records: tuple[Mapping, ...] = field(repr=False)
    environment: Mapping = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()  # what could not be read, one sentence each
    dirty: tuple[str, ...] = ()  # why its figures may be off: busy, on battery, unstable

    @cached_property
    def measured(self) -> list[Mapping]:
        """The runs that count: measured, ok, and not faster than their machine can be."""
        return [r for r in self.records if counts(r)]

    @property
    def hardware(self) -> str:
        """The card, or the processor of a machine without one: pairs must share it."""
        env = self.environment
        card = (env.get("gpus") or [{}])[0].get("name")
        return card or env.get("cpu_model") or "unknown"

    @property
    def caption(self) -> str:
        """The machine in one line."""
        try:
            return machine.caption(dict(self.environment))
        except (KeyError, TypeError, IndexError):
            return f"{self.hardware}, {self.environment.get('os') or 'no environment recorded'}"


def counts(record: Mapping) -> bool:
    """Measured, ok, and possible."""
    possible = (record.get("prediction") or {}).get("plausible") is not False
    measured = record.get("kind", "measure") == "measure" and record.get("status", "ok") == "ok"
    return measured and possible and bool(record.get("metrics"))


def load(paths: Iterable[Path | str | Run]) -> list[Run]:
    """The runs in these files and folders; a folder of runs gives all of them. A Run stays itself.

    Raises ValueError when a path does not exist, or when nothing in it can be read.
    """
    found: list[Run] = []
    runs: list[Run] = []
    seen: Counter = Counter()
    with _uncollected():
        for source in paths:
            own = [source] if isinstance(source, Run) else map(_load_one, _files(Path(source)))
            found += own
        for run in found:
            seen[run.name] += 1
            number = f"#{seen[run.name]}" if seen[run.name] > 1 else ""
            runs.append(replace(run, name=run.name + number))
    return runs


def shipped() -> list[Path]:
    """The runs that come with the kit, one folder a machine."""
    folder = REFERENCE / "runs"
    return sorted(p.parent for p in folder.glob("*/records.jsonl*")) if folder.is_dir() else []


def latest(path: Path | str = "") -> Run:
    """The run to judge: `path` if it has records, else what was last measured by hand (the newest
    file of each notebook), else the first run that came with the kit.

    Raises ValueError when there is none of them.
    """
    by_hand = {f.name[:2]: f for f in sorted((RUNS / "interactive").glob("*.jsonl")) if _full(f)}
    choices = [[Path(path)] if path and _full(Path(path)) else [], list(by_hand.values())]
    choices += _files(shipped()[0]) if shipped() else []
    for files in choices:
        if files:
            with _uncollected():
                return _load_one(files)
    raise ValueError("nothing was measured yet: run notebook 03 first")


def _full(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def published() -> list[Run]:
    """The published rows as runs, one a platform and card."""
    groups: dict[str, list] = {}
    for record in findings.published_records():
        env = record["environment"]
        name = f"published: {env['gpus'][0]['name']}, {env['os']}"
        groups.setdefault(name, []).append(record)
    return [Run(name, tuple(rows), rows[0]["environment"]) for name, rows in groups.items()]


def _files(path: Path) -> list[list[Path]]:
    """Files that make one run each. Notebooks run by hand leave one file each in one folder."""
    if not path.exists():
        raise ValueError(f"there is no run at {path}: name a folder under data/runs, or a file")
    if path.is_file():
        return [[path]]
    own = sorted(p for p in path.iterdir() if p.name.endswith(ENDINGS))
    whole = [p for p in own if p.name.startswith("records.jsonl")]
    if own:
        return [whole[:1] or own]
    below = [files for p in sorted(path.iterdir()) if p.is_dir() and (files := _found(p))]
    if not below:
        raise ValueError(f"{path} holds no records.jsonl: name a run's folder, or a shared file")
    return [files for group in below for files in group]


def _found(path: Path) -> list[list[Path]]:
    try:
        return _files(path)
    except ValueError:
        return []


def _load_one(files: Sequence[Path]) -> Run:
    rows, left_out = [], []
    for file in files:
        try:
            _read(file, rows, left_out)
        except OSError as error:
            left_out.append(f"{file.name}: {error.strerror or error}")
    if not rows:
        why = left_out[0] if left_out else "it is empty"
        raise ValueError(f"{files[0].name} holds no record that can be read ({why})")
    environments = [r["environment"] for r in rows if r.get("environment")]
    environment = environments[-1] if environments else {}
    lacking = len(rows) - len(environments)
    if lacking:
        left_out.append(f"{lacking} records without an environment: their machine is not known")
    name = _slug(environment) if environments else f"unknown ({files[0].stem.split('.')[0]})"
    return Run(name, tuple(rows), environment, tuple(left_out), tuple(_dirt(rows, environment)))


def _slug(environment: Mapping) -> str:
    try:
        return machine.slug(dict(environment))
    except (KeyError, TypeError, IndexError):
        return str(environment.get("os") or "unknown").lower()


def _read(file: Path, rows: list, left_out: list) -> None:
    """Append the file's records to `rows`, and one sentence a kind of fault to `left_out`."""
    faults: Counter = Counter()
    schemas: set[str] = set()
    seen: dict[bytes, dict] = {}
    for line in _lines(file, left_out):
        if not line.strip():
            continue
        try:
            record = _parse(line)
        except ValueError as error:
            faults[f"torn or no JSON ({str(error)[:60]})"] += 1
            continue
        if fault := _fault(record):
            faults[fault] += 1
            continue
        schema = record.get("schema", 0)
        if schema != records.SCHEMA:
            age = "newer" if schema > records.SCHEMA else "older"
            schemas.add(
                f"{file.name}: records of the {age} schema {schema}; what both know is read"
            )
        rows.append(_slim(record, seen))
    left_out += sorted(schemas)
    left_out += [f"{file.name}: {n} lines left out, {fault}" for fault, n in faults.items()]


def _fault(record) -> str | None:
    """Why a line cannot be used at all."""
    if not isinstance(record, dict) or not isinstance(record.get("condition"), dict):
        return "they are no records (no condition)"
    if not {"strategy", "level"} <= record["condition"].keys():
        return "their condition names no strategy and level"
    for name in ("metrics", "memory", "environment", "prediction"):
        record[name] = block = record.get(name) or {}
        if not isinstance(block, dict):
            return "their blocks have another form"
    return None


def _parse(line: bytes):
    """The line's JSON, cut at its token times where it is as `records.Store` writes it."""
    begin, end = line.find(REQUESTS, line.find(TRACE)), line.rfind(NOTES)
    if 0 <= begin < end:
        with suppress(ValueError):  # those names stood elsewhere in the line
            return orjson.loads(line[: begin + len(REQUESTS)] + line[end:])
    return orjson.loads(line)


def _slim(record: dict, seen: dict[bytes, dict]) -> dict:
    """Without its token times and reasons; what stands on many lines alike is kept once."""
    for name in ("condition", "environment"):
        record[name] = seen.setdefault(orjson.dumps(record[name]), record[name])
    record["metrics"].pop("reasons", None)  # the None that it explains says enough here
    if isinstance(record.get("trace"), dict):
        record["trace"]["requests"] = []
    return record


def _lines(file: Path, left_out: list) -> Iterator[bytes]:
    """Lines of a plain or packed file; a pack that ends early gives what it holds."""
    if file.name.endswith(".gz"):
        try:
            with gzip.open(file, "rb") as packed:
                yield from packed
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            left_out.append(f"{file.name}: the pack is torn ({error}); what came before is read")
        return
    with file.open("rb") as plain:
        yield from plain


@contextmanager
def _uncollected() -> Iterator[None]:
    """The collector would look again and again through 100,000 records that all stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _dirt(rows: Sequence[Mapping], env: Mapping) -> Iterator[str]:
    """Why these figures may be off, one sentence each."""
    measured = [r for r in rows if r.get("kind", "measure") == "measure"]
    warned = [r["warnings"][0] for r in measured if r.get("warnings")]
    if warned:
        yield f"{len(warned)} of {len(measured)} runs warn, most often: {_commonest(warned)}"
    if any(e.get("on_battery") for e in {id(e): e for e in map(_environment, measured)}.values()):
        yield "on battery"
    for card in (env.get("gpus") or [])[:1]:
        if (card.get("utilization_percent") or 0) > GPU_BUSY_PERCENT:
            yield f"{card.get('name')} was {card['utilization_percent']} % busy before the run"
    impossible = sum(r["prediction"].get("plausible") is False for r in measured)
    if impossible:
        yield f"{impossible} runs are faster than the machine can be, and left out"
    failed = Counter(r["status"] for r in measured if r.get("status", "ok") != "ok")
    if failed:
        yield "runs without a result: " + ", ".join(f"{n} {word}" for word, n in failed.items())


def _environment(record: Mapping) -> Mapping:
    return record["environment"]


def _commonest(texts: Sequence[str]) -> str:
    return Counter(texts).most_common(1)[0][0]
