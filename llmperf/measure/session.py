"""measure(): conditions × repeats in a seeded, interleaved order; each run becomes a Record."""

from __future__ import annotations

import datetime
import gc
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from llmperf import machine, strategies
from llmperf.decoding.trace import Trace, agreement
from llmperf.measure import prediction, results
from llmperf.measure.condition import Condition
from llmperf.measure.records import Record, Store
from llmperf.measure.results import Results, condition_key
from llmperf.memory import Sampler

WARMUP_TOKENS = 2  # a warm-up run generates this many tokens: a prefill and a decode step
WARMUP_RUNS = 3  # at most; fewer when two in a row take the same time
SETTLED = 0.10  # two warm-up runs within 10 % of each other count as settled
REFERENCE_REQUESTS = 4  # requests of a condition that are compared with `sequential`
LEAST_FOR_WIDTH = 8  # repeats before an interval may end a measurement (`stats.narrow_enough`)
# Errors of the condition itself: it fails again however often it is tried.
LASTING = (ValueError, TypeError, LookupError, NotImplementedError, AssertionError)


def measure(
    experiment: str,
    conditions: Sequence[Condition],
    store: Store,
    *,
    repeats: int = 3,
    seed: int = 0,
    width: float | None = None,
    max_repeats: int = 30,
    expect: bool = False,
    twin: bool = False,
    progress: bool | None = None,
    sampler: Sampler | None = None,
    limits: Mapping | None = None,
) -> Results:
    """Run every condition `repeats` times, interleaved, and store a record of each run.

    Runs that the store already holds are not repeated, so a killed study goes on where it was. With
    `width`, rounds are added up to `max_repeats` until every condition's interval of tokens/s is
    narrower than that share of its median. A condition that fails is a record with a status, and
    the others go on; one that surely does not fit is not tried, see `prediction.refusal`. `expect`
    predicts the time of a step too. `twin` runs the first condition twice a round, see
    `Results.twin`. `progress`: a bar (default: on a terminal or in Jupyter). `sampler` and `limits`
    are for tests: who watches the memory, and the machine's ceilings.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1")
    most = repeats if width is None else max(repeats, max_repeats)
    if width is not None and most < LEAST_FOR_WIDTH:
        raise ValueError(
            f"width was given, but at most {most} repeats: an interval can end a measurement from "
            f"{LEAST_FOR_WIDTH} on, so set max_repeats to that or more"
        )
    if not conditions:
        raise ValueError(f"{experiment}: there is no condition to measure")
    session = _Session(experiment, conditions, store, seed, twin)
    session.predict = lambda c: prediction.predict_run(c, expect, limits)
    stopped = f"{most} repeats"
    bar = _bar(len(session.slots) * most, experiment, progress)
    with (
        sampler or Sampler(device=conditions[0].model.device) as watching,
        strategies.session(),
        bar,
    ):
        for done in range(1, most + 1):
            session.round(done - 1, watching, bar)
            alive = session.alive_records() if width is not None and done >= repeats else []
            wide = results.wide(alive, width)
            if alive and not wide:
                stopped = f"every interval is within {width:.0%} after {done} repeats"
                break
            if wide and done == most:
                stopped += f"; not within {width:.0%}: {', '.join(wide)}"
    return Results(tuple(results.with_warnings(session.records())), stopped)


@cache
def environment() -> dict:
    """This machine, asked once a process."""
    return machine.describe()


class _Session:
    """One call of `measure`: its order, its reference tokens, and what failed in it."""

    def __init__(self, experiment, conditions, store, seed, twin):
        self.experiment, self.store, self.conditions = experiment, store, list(conditions)
        self.order = random.Random(seed)
        self.slots = [(i, "measure") for i in range(len(self.conditions))]
        self.slots += [(0, "twin")] if twin else []
        self.references: dict[str, Trace] = {}
        self.predictions: dict[int, dict] = {}
        refused = ((i, prediction.refusal(c)) for i, c in enumerate(conditions))
        self.refused = {i: why for i, why in refused if why}
        self.failed = self._failed_before()
        self.gone: set[int] = set()  # failed here for a reason outside: tried again on resume
        prediction.cap_allocator(self.conditions[0].model)
        self.busy: str | None = None  # what other programs did as the round began

    def _failed_before(self) -> dict[int, str]:
        """Conditions that failed before this call for a reason of their own: not tried again."""
        bad = [r for r in self.records() if r.kind == "measure" and r.status in ("oom", "error")]
        failed = {condition_key(r): f"{r.status}: {r.reason}" for r in bad}
        return {i: failed[c.key] for i, c in enumerate(self.conditions) if c.key in failed}

    def round(self, repeat: int, sampler: Sampler, bar) -> None:
        """Every condition once, in a new order; what the store holds is not run again."""
        missing = []
        for i, kind in self.order.sample(self.slots, len(self.slots)):
            bare = self.bare(self.conditions[i], repeat, kind)
            if bare.key not in self.store:
                missing.append((i, bare))
        bar.update(len(self.slots) - len(missing))
        self.busy = machine.busy() if any(i not in self.failed for i, _ in missing) else None
        for i, bare in missing:
            if record := self.run(i, bare, sampler):
                self.store.append(record)
            bar.update()

    def run(self, i: int, bare: Record, sampler: Sampler) -> Record | None:
        """The record of one run, whatever came of it; a condition that failed is not run again.

        A failure that says nothing about the condition gets the kind `failed`, so that its place
        stays open for a resume; None where it happened earlier in this call.
        """
        if why := self.refused.get(i) or (i in self.failed and f"failed before: {self.failed[i]}"):
            return None if i in self.gone else replace(bare, status="skipped", reason=why)
        condition, lasting = self.conditions[i], False
        try:
            self.prepare(i)
            with sampler.window(without=condition.ready()) as window:
                trace = condition.run()
            record = self.complete(bare, i, trace, window)
        except Exception as error:  # a record with a status, and the sweep goes on
            _raise_interrupt(error)
            status, reason = _classify(error)
            lasting = status == "oom" or isinstance(error, LASTING)
            record = replace(bare, status=status, reason=reason)
        if record.status == "ok":
            return record
        self.failed[i] = f"{record.status}: {record.reason}"
        _release()  # here, where no exception holds the failed run's tensors any more
        if lasting:
            return record
        self.gone.add(i)
        return replace(record, kind="failed")

    def bare(self, condition: Condition, repeat: int, kind: str = "measure") -> Record:
        """A record with nothing measured in it yet."""
        return Record(
            experiment=self.experiment,
            condition=condition.describe(),
            repeat=repeat,
            kind=kind,
            run_id=self.store.path.parent.name,
            recorded_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            environment=environment(),
        )

    def prepare(self, i: int) -> None:
        """Once a condition and process: reference, prediction, short runs until times settle."""
        if i in self.predictions:
            return
        condition = self.conditions[i]
        self.reference(condition)
        short, times = condition.shortened(WARMUP_TOKENS), []
        for _ in range(WARMUP_RUNS):
            trace = condition.run(short)
            times.append(trace.duration_s)
            if len(times) > 1 and abs(times[-1] - times[-2]) <= SETTLED * times[-2]:
                break
        took = {"warmup_s": times, "compile_s": prediction.prepared(condition).seconds}
        self.keep(condition, trace, "warmup", took)
        self.predictions[i] = self.predict(condition)

    def reference(self, condition: Condition) -> Trace:
        """The first requests of a condition one after another. Conditions that differ in strategy,
        level or arrivals alone share one."""
        key = condition.reference(1).key
        if key not in self.references:
            alike = [c.level for c in self.conditions if c.reference(1).key == key]
            alone = condition.reference(min(max(alike), REFERENCE_REQUESTS))
            known = (r for r in self.store.read() if r.kind == "reference")
            kept = next((r for r in known if condition_key(r) == alone.key), None)
            self.references[key] = kept.to_trace() if kept else alone.run()
            self.keep(alone, self.references[key], "reference")
        return self.references[key]

    def keep(self, condition: Condition, trace: Trace, kind: str, metrics: dict | None = None):
        """Store a run that is never counted."""
        record = replace(
            self.bare(condition, 0, kind),
            trace=trace.to_dict(),
            token_digest=trace.digest(),
            metrics=metrics or {},
        )
        self.store.append(record)

    def complete(self, bare: Record, i: int, trace: Trace, window) -> Record:
        """The record of a run that went through."""
        condition = self.conditions[i]
        failed = [r.reason for r in trace.requests if r.status == "error"]
        loop, why = trace.notes.get("loop"), trace.notes.get("fallback")
        warnings = [f"{condition.loop} ran as {loop}: {why}"] if why else []
        warnings += [f"unstable: {self.busy}"] if self.busy else []
        return replace(
            bare,
            status="error" if failed else "ok",
            reason=failed[0] if failed else None,
            trace=trace.to_dict(),
            token_digest=trace.digest(),
            metrics=condition.summarize(trace),
            memory=window,
            prediction=prediction.audit(condition, self.predictions[i], trace),
            agreement=asdict(agreement(trace, self.reference(condition))),
            warnings=warnings,
        )

    def alive_records(self) -> list[Record]:
        """The records of the conditions that neither failed nor were refused."""
        dead = self.failed | self.refused
        alive = {c.key for i, c in enumerate(self.conditions) if i not in dead}
        return [r for r in self.records() if condition_key(r) in alive]

    def records(self) -> list[Record]:
        """The records of these conditions, of every kind, from the store."""
        keys = {c.key for c in self.conditions}
        every = (r for r in self.store.read() if r.experiment == self.experiment)
        return [r for r in every if condition_key(r) in keys]


def _raise_interrupt(error: BaseException | None) -> None:
    """Raise the Ctrl-C or SIGTERM during whose clean-up this error came, if there was one."""
    while error is not None:
        if not isinstance(error, Exception):
            raise error
        error = error.__cause__ or error.__context__


def _classify(error: Exception) -> tuple[str, str]:
    """A status and one sentence without this machine's paths."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError, *((torch.OutOfMemoryError,) if torch else ()))
    text = f"{type(error).__name__}: {error}".split("\n")[0].replace(str(Path.home()), "~")
    full = isinstance(error, kinds) or "out of memory" in text.lower()
    return ("oom" if full else "error"), text


def _release() -> None:
    """After a failure: give what the failed run held back to the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _bar(total: int, name: str, shown: bool | None):
    """A progress bar in Jupyter and on a terminal; a log gets no escape codes."""
    from tqdm.auto import tqdm

    wanted = shown is not False and ("ipykernel" in sys.modules or sys.stderr.isatty())
    return tqdm(total=total, desc=name, unit="run", leave=False, disable=not wanted)
