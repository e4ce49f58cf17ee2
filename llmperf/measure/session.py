"""measure(): conditions × repeats in a seeded, interleaved order; each run becomes a Record."""

from __future__ import annotations

import datetime
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from llmperf import machine, strategies
from llmperf.decoding.trace import Trace, agreement
from llmperf.measure import beside, fits, records, results
from llmperf.measure.beside import environment
from llmperf.measure.condition import Condition
from llmperf.measure.records import Record, Store
from llmperf.measure.results import Results
from llmperf.memory import Sampler

__all__ = ["Condition", "Results", "environment", "measure"]

WARMUP_TOKENS = 2  # a warm-up run generates this many tokens: a prefill and a decode step
WARMUP_RUNS = 3  # at most; fewer when two in a row take the same time
SETTLED = 0.10  # two warm-up runs within 10 % of each other count as settled
REFERENCE_REQUESTS = 4  # requests of a condition that are compared with `sequential`
LEAST_FOR_WIDTH = 8  # repeats before an interval may end a measurement (`stats.narrow_enough`)


def measure(
    experiment: str,
    conditions: Sequence[Condition],
    store: Store,
    *,
    repeats: int = 3,
    seed: int = 0,
    width: float | None = None,
    quantity: str = "output_tokens_per_s",
    max_repeats: int | None = None,
    budget_s: float | None = None,
    memory_budget: int | None = None,
    expect: bool = False,
    progress: bool = True,
) -> Results:
    """Run every condition `repeats` times, interleaved, and store a record of each run.

    Runs that the store already holds are not repeated, so a killed study goes on where it was. With
    `width`, rounds are added up to `max_repeats` until every condition's interval of `quantity` (a
    number in the metrics) is narrower than that share of its median. `budget_s` ends the sweep
    after the round at work. A condition that fails is a record with a status, and the rest go on;
    one that surely does not fit is not tried, see `fits.refusal`, which takes `memory_budget`. With
    `expect` each record says how long a decode step should take, see `expected.beside`.
    """
    rounds = _rounds(repeats, width, max_repeats)
    if not conditions:
        raise ValueError(f"{experiment}: there is no condition to measure")
    if budget_s is not None and not budget_s > 0:
        raise ValueError(f"budget_s is {budget_s}: it must be above 0 seconds")
    session = _Session(experiment, conditions, store, seed, memory_budget)
    session.expect = expect
    stopped, wide = f"{rounds} repeats", []
    began = time.perf_counter()
    bar = _bar(len(conditions) * rounds, experiment, progress)
    device = conditions[0].model.device
    with Sampler(device=device) as sampler, strategies.session(), bar:
        for done in range(1, rounds + 1):
            session.round(done - 1, sampler, bar)
            wide = session.wide(width, quantity) if width and done >= repeats else []
            if width and done >= repeats and not wide and session.alive:
                stopped = f"every interval is within {width:.0%} after {done} repeats"
                break
            if budget_s and time.perf_counter() - began > budget_s and done < rounds:
                stopped = f"the budget of {budget_s:g} s was spent after {done} repeats"
                break
    if wide:
        stopped += f"; not within {width:.0%}: {', '.join(wide)}"
    return Results(tuple(results.with_warnings(session.mine())), stopped)


def _rounds(repeats: int, width: float | None, max_repeats: int | None) -> int:
    """The most repeats that may be run; ValueError for numbers that contradict one another."""
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1")
    if width is None:
        return repeats
    most = max(repeats, max_repeats or 0)
    if most < LEAST_FOR_WIDTH:
        raise ValueError(
            f"width was given, but at most {most} repeats: an interval can end a measurement from "
            f"{LEAST_FOR_WIDTH} on, so set max_repeats to that or more"
        )
    return most


class _Session:
    """One call of `measure`: its order, its reference tokens, and the records it made or found."""

    def __init__(self, experiment, conditions, store, seed, memory_budget=None):
        self.experiment, self.store = experiment, store
        self.conditions = list(conditions)
        self.described = [c.describe() for c in self.conditions]
        self.keys = [records.key("", "", d, 0) for d in self.described]
        self.order = random.Random(seed)
        self.reference: dict[str, Trace] = {}
        self.warm: set[int] = set()
        self.failed = self._failed_before()
        asked = {i: fits.refusal(c, memory_budget) for i, c in enumerate(self.conditions)}
        self.refused = {i: why for i, why in asked.items() if why}
        fits.cap(self.conditions[0], memory_budget)
        self.expect = False
        self.noticed: str | None = None  # what else this machine was doing as the round began
        self.run_id = store.path.parent.name

    @property
    def alive(self) -> bool:
        """Whether a condition is left that neither failed nor was refused."""
        return len(self.failed | self.refused) < len(self.conditions)

    def _failed_before(self) -> dict[int, str]:
        """Conditions that failed in an earlier part of this run: they are not tried again."""
        failed = {
            _bare_key(r): f"{r.status}: {r.reason}"
            for r in self.store.read()
            if r.experiment == self.experiment and r.status in ("oom", "error")
        }
        return {i: failed[key] for i, key in enumerate(self.keys) if key in failed}

    def round(self, repeat: int, sampler: Sampler, bar) -> None:
        """Every condition once, in an order of this round's own."""
        order = self.order.sample(range(len(self.conditions)), len(self.conditions))
        missing = [i for i in order if self.key(i, repeat) not in self.store]
        bar.update(len(order) - len(missing))
        self.noticed = machine.busy() if any(i not in self.failed for i in missing) else None
        for i in missing:
            self.store.append(self.one(i, repeat, sampler))
            bar.update()

    def key(self, i: int, repeat: int) -> str:
        return records.key(self.experiment, "measure", self.described[i], repeat)

    def one(self, i: int, repeat: int, sampler: Sampler) -> Record:
        """The record of one run, whatever came of it; a condition that failed is not run again."""
        bare = self.record(self.described[i], repeat)
        if i in self.refused:
            return replace(bare, status="skipped", reason=self.refused[i])
        if i in self.failed:
            return replace(bare, status="skipped", reason=f"failed before: {self.failed[i]}")
        record = self.tried(bare, i, sampler)
        if record.status != "ok":
            self.failed[i] = f"{record.status}: {record.reason}"
            _release()  # here, where no exception holds the failed run's tensors any more
        return record

    def tried(self, bare: Record, i: int, sampler: Sampler) -> Record:
        """Warm up if this condition is new here, run it, and say what happened."""
        condition = self.conditions[i]
        try:
            self.prepare(i)
            with sampler.window(without=condition.ready()) as window:
                trace = condition.run(on_step=_on_step(condition, window))
            return self.filled(bare, i, trace, window)
        except Exception as error:  # a record with a status, and the sweep goes on
            status, reason = _classify(error)
            return replace(bare, status=status, reason=reason)

    def record(self, condition: dict, repeat: int, kind: str = "measure") -> Record:
        return Record(
            experiment=self.experiment,
            condition=condition,
            repeat=repeat,
            kind=kind,
            run_id=self.run_id,
            recorded_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            environment=environment(),
        )

    def prepare(self, i: int) -> None:
        """Once a condition and process: reference tokens, and short runs until times settle."""
        if i in self.warm:
            return
        condition = self.conditions[i]
        self.reference_for(i)
        short, times = condition.shortened(WARMUP_TOKENS), []
        while len(times) < WARMUP_RUNS and not _settled(times):
            trace = condition.run(short)
            times.append(trace.duration_s)
        apart = {"warmup_s": times, "compile_s": beside.compile_s(condition)}
        self.store.append(self.apart(self.described[i], trace, "warmup", apart))
        self.warm.add(i)

    def reference_for(self, i: int) -> None:
        """The first requests of the condition, one after another: what `agreement` compares."""
        condition, signature = self.conditions[i], self.signature(i)
        if signature in self.reference:
            return
        alike = [c.level for j, c in enumerate(self.conditions) if self.signature(j) == signature]
        level = min(max(alike), REFERENCE_REQUESTS)
        alone = condition.alone(level)
        found = [r for r in self.store.read() if r.kind == "reference"]
        kept = [r for r in found if r.condition == _plain(alone.describe())]
        trace = kept[0].to_trace() if kept else alone.run()
        self.reference[signature] = trace
        self.store.append(self.apart(alone.describe(), trace, "reference"))

    def signature(self, i: int) -> str:
        """Conditions that differ in strategy, level or arrivals alone share one reference."""
        return records.key("", "", self.conditions[i].alone(1).describe(), 0)

    def apart(self, condition: dict, trace: Trace, kind: str, metrics: dict | None = None):
        """A record of a run that is kept but never counted."""
        return replace(
            self.record(condition, 0, kind),
            trace=trace.to_dict(),
            token_digest=trace.digest(),
            metrics=metrics or {},
        )

    def filled(self, bare: Record, i: int, trace: Trace, window) -> Record:
        """The record of a run that went through, with everything that stands beside its times."""
        failed = [r.reason for r in trace.requests if r.status == "error"]
        return replace(
            bare,
            status="error" if failed else "ok",
            reason=failed[0] if failed else None,
            trace=trace.to_dict(),
            token_digest=trace.digest(),
            metrics=self.conditions[i].summarize(trace),
            memory=window.summary(),
            prediction=beside.predict_beside(self.conditions[i], trace, self.expect),
            agreement=asdict(agreement(trace, self.reference[self.signature(i)])),
            warnings=beside.fallbacks(trace)
            + ([f"unstable: {self.noticed}"] if self.noticed else []),
        )

    def wide(self, width: float, quantity: str) -> list[str]:
        """The conditions, failed ones aside, whose interval of `quantity` is not narrow enough."""
        alive = {key for i, key in enumerate(self.keys) if i not in self.failed | self.refused}
        return results.wide([r for r in self.mine() if _bare_key(r) in alive], width, quantity)

    def mine(self) -> list[Record]:
        """The records of these conditions, of every kind, from the store."""
        every = (r for r in self.store.read() if r.experiment == self.experiment)
        return [r for r in every if _bare_key(r) in self.keys]


def _bare_key(record: Record) -> str:
    """What the records of one condition share, whatever their kind and repeat."""
    return records.key("", "", record.condition, 0)


def _on_step(condition: Condition, window):
    """Only a GPU has an allocator to read between two steps."""
    return None if condition.model.device == "cpu" else window.step


def _settled(times: Sequence[float]) -> bool:
    """Whether the last two warm-up runs took about the same time."""
    return len(times) > 1 and abs(times[-1] - times[-2]) <= SETTLED * times[-2]


def _plain(value):
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))


def _classify(error: Exception) -> tuple[str, str]:
    """A status and one sentence without this machine's paths."""
    import torch

    text = f"{type(error).__name__}: {error}".split("\n")[0].replace(str(Path.home()), "~")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text.lower():
        return "oom", text
    return "error", text


def _release() -> None:
    """After a failure: give what the failed run held back to the device."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _bar(total: int, name: str, shown: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, unit="run", leave=False, disable=not shown)
