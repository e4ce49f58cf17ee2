"""Runs: the records of one machine, from a file (.jsonl, .jsonl.gz) or a folder with one."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from llmperf import REFERENCE, RUNS, machine
from llmperf.measure import Record
from llmperf.measure.frames import machine_in_words
from llmperf.measure.records import scan

ENDINGS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Run:
    """The records of one machine."""

    name: str  # the machine's short name; #2 for a second run of it
    records: tuple[Record, ...] = field(repr=False)
    environment: Mapping = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()  # what was not read, and why figures may be off

    @cached_property
    def measured(self) -> list[Record]:
        """The runs that count: measured, ok, and not faster than their machine can be."""
        return [r for r in self.records if r.counts]

    @property
    def hardware(self) -> str:
        """The card, or the processor of runs without one: pairs must share it."""
        on_card = any(r.condition.get("device") not in (None, "cpu") for r in self.records)
        card = (self.environment.get("gpus") or [{}])[0].get("name") if on_card else None
        return card or self.environment.get("cpu_model") or "unknown"

    @property
    def caption(self) -> str:
        """The machine in one line."""
        unknown = f"{self.hardware}, {self.environment.get('os') or 'no environment recorded'}"
        return machine_in_words(self.environment) or unknown


def load_runs(paths: Iterable[Path | str | Run]) -> list[Run]:
    """The runs in these files and folders; a folder of runs gives all. ValueError for none."""
    found: list[Run] = []
    for source in paths:
        found += [source] if isinstance(source, Run) else map(_load, _files(Path(source)))
    names = [run.name for run in found]
    numbers = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [
        replace(run, name=f"{run.name}#{n}" if n > 1 else run.name)
        for run, n in zip(found, numbers, strict=True)
    ]


def shipped_runs() -> list[Path]:
    """The runs that come with the kit, one folder a machine."""
    return sorted(p.parent for p in (REFERENCE / "runs").glob("*/records.jsonl*"))


def latest(path: Path | str = "", traces: bool = False) -> Run:
    """The run in `path` if it has records, else the newest file of each notebook run by hand, else
    the first run that came with the kit; with `traces` the times of its tokens too. ValueError when
    there is none of them.
    """
    files = _filled((RUNS / "interactive").glob("*.jsonl"))
    by_hand = {f.name[:2]: f for f in files}  # the last of each notebook
    if path and _filled([Path(path)]):
        return _load([Path(path)], traces)
    if by_hand:
        return _load(list(by_hand.values()), traces)
    if shipped_runs():  # shared, so without these times
        return load_runs(shipped_runs()[:1])[0]
    raise ValueError("nothing was measured yet: run notebook 03 first")


def published_runs() -> list[Run]:
    """The published rows as runs, one a platform and card."""
    from llmperf.findings.published import published_records

    groups: dict[str, list] = {}
    for r in published_records():
        name = f"published: {r.environment['gpus'][0]['name']}, {r.environment['os']}"
        groups.setdefault(name, []).append(r)
    return [Run(name, tuple(rows), rows[0].environment) for name, rows in groups.items()]


def _files(path: Path) -> list[list[Path]]:
    """Files that make one run each. Notebooks run by hand leave one file each in one folder; a
    shared file is a run."""
    if not path.exists():
        raise ValueError(f"there is no run at {path}: name a folder under data/runs, or a file")
    if not path.is_dir():
        return [[path]]
    files = _filled(p for p in path.iterdir() if p.name.endswith(ENDINGS))
    if own := [p for p in files if p.name.startswith("records.jsonl")][:1]:
        return [own]
    if files:
        by_hand = [p for p in files if p.suffix != ".gz"]
        return [[p] for p in files if p.suffix == ".gz"] + [by_hand] * bool(by_hand)
    folders = (p for p in sorted(path.iterdir()) if p.is_dir())
    below = [p for p in folders if any(_filled(p.rglob(f"*{end}")) for end in ENDINGS)]
    if not below:
        raise ValueError(f"{path} holds no records.jsonl: name a run's folder, or a shared file")
    return [files for p in below for files in _files(p)]


def _filled(paths: Iterable[Path]) -> list[Path]:
    """The files with content, sorted; a study that was ended at once leaves an empty one."""
    return sorted(p for p in paths if p.is_file() and p.stat().st_size)


def _load(files: Sequence[Path], traces: bool = False) -> Run:
    records: list[Record] = []
    faults: list[str] = []
    for file in files:
        found, unread = scan(file, traces)
        records += found
        faults += unread
    if not records:
        why = faults[0] if faults else "it is empty"
        name = f"{files[0].resolve().parent.name}/{files[0].name}"
        raise ValueError(f"{name} holds no record that can be read ({why})")
    environment = next((r.environment for r in reversed(records) if r.environment), {})
    unknown = f"unknown ({files[0].stem.split('.')[0]})"
    name = machine_in_words(environment, machine.slug) or unknown
    return Run(name, tuple(records), environment, (*faults, *_doubts(records)))


def _doubts(records: Sequence[Record]) -> Iterator[str]:
    """Why these figures may be off, one sentence each."""
    measured = [r for r in records if r.kind in ("measure", "failed")]
    warned = Counter(str(r.warnings[0]) for r in measured if r.warnings)
    if warned:
        often = warned.most_common(1)[0][0]
        yield f"warning on {warned.total()} of {len(measured)} runs, most often: {often}"
    if any(r.environment.get("on_battery") for r in measured):
        yield "on battery"
    if impossible := sum(not r.possible for r in measured):
        yield f"runs that are faster than the machine can be, and left out: {impossible}"
    if failed := [r for r in measured if r.status != "ok"]:
        counts = Counter(r.status for r in failed)
        said = ", ".join(f"{n} {word}" for word, n in counts.items())
        one = min(failed, key=lambda r: r.status == "skipped")  # one that was tried, if any was
        why = machine.first_line(one.reason or "no reason is kept")
        yield f"runs without a result: {said}; the first: {one.experiment}: {why}"
