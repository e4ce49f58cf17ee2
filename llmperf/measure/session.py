"""measure(): conditions × repeats in a seeded, interleaved order; each run becomes a Record."""

import datetime
import gc
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tqdm.auto import tqdm

from llmperf import decoding, machine, predict, strategies
from llmperf.decoding.trace import Trace, agreement
from llmperf.machine import ceilings, gpu
from llmperf.machine.gpu import torch_in_use
from llmperf.measure import prediction, records, results
from llmperf.measure.condition import Condition
from llmperf.measure.prediction import DoesNotFit, predict_run
from llmperf.measure.records import NotWritten, Record, Store
from llmperf.measure.results import Results
from llmperf.memory import Sampler, summary
from llmperf.strategies import served

WARMUP_TOKENS = 2  # a warm-up run generates this many tokens: a prefill and a decode step
# At most so many; fewer when two in a row take the same time. On a processor one is enough, after
# the reference: in a whole study the second took as long (median ratio 0.99 over 75 conditions).
# One more where this process has run neither this work nor its reference; what runs in other
# processes and engines gets none.
WARMUP_RUNS = {"cpu": 1, "cuda": 3}
SETTLED = 0.10  # two warm-up runs within 10 % of each other count as settled
REFERENCE_REQUESTS = 4  # requests of a condition that are compared with `sequential`
_warm: set[str] = set()  # keys of references: this process has run them, or work like theirs


def measure(
    experiment: str,
    conditions: Sequence[Condition],
    store: Store,
    *,
    repeats: int = 3,
    seed: int = 0,
    expect: bool = False,
    twin: bool = False,
    watch: bool = False,
    sampler: Sampler | None = None,
    limits: Mapping | None = None,
) -> Results:
    """Run every condition `repeats` times, interleaved, and store a record of each run.

    Runs that the store already holds are not repeated, so a killed study goes on where it was. A
    condition that fails is a record with a status, and the others go on; one that surely does not
    fit is not tried, see `prediction.check_fits`. `expect` predicts the time of a step too. `twin`
    runs the first condition twice a round, see `Results.twin`. `watch` watches the interpreter
    lock, which makes runs slower: they are records of kind `watched` and count for nothing else.
    `sampler` and `limits` are for tests: who watches the memory, and the machine's ceilings.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1")
    if not conditions:
        raise ValueError(f"{experiment}: there is no condition to measure")
    order, device = random.Random(seed), conditions[0].model.device
    fresh = expect and not limits  # a step is expected at the bandwidth of its own round
    session = _Session(experiment, conditions, store, expect, limits)
    kind = "watched" if watch else "measure"
    slots = [(i, kind) for i in range(len(conditions))] + [(0, "twin")] * twin
    if device != "cpu":  # end kept processes: their copies of the model occupy the card
        served.ensure_started(conditions[0].model, 0)
    predict.cap_allocator(conditions[0].model)
    wanted = "ipykernel" in sys.modules or sys.stderr.isatty()
    bar = tqdm(total=len(slots) * repeats, desc=experiment, leave=False, disable=not wanted)
    with sampler or Sampler(device=device) as watching, strategies.session(), bar:
        for repeat in range(repeats):
            if fresh:
                session.limits = ceilings.this_minute(session.limits, device)
            session.round(order.sample(slots, len(slots)), repeat, watching, bar)
    return Results(tuple(results.with_warnings(session.records())))


def environment(device: str = "cpu") -> dict:
    """This machine, asked once a process; of several cards the one in use first."""
    found, index = _described(), gpu.index(device)
    cards = found["gpus"]
    return {**found, "gpus": [*cards[index : index + 1], *cards[:index], *cards[index + 1 :]]}


@cache
def _described() -> dict:
    """The machine; what this process holds of the memory of its cards is not in use."""
    found = machine.describe()
    if torch_in_use():
        for i, card in enumerate(found["gpus"]):
            if (used := card["memory_used_bytes"]) and (held := torch.cuda.memory_reserved(i)):
                held += predict.least_context(machine.platform_word("cuda", found["os"]))
                card["memory_used_bytes"] = max(0, used - held)
    return found


class _Session:
    """One call of `measure`: its reference tokens, its ceilings, and what failed in it."""

    def __init__(self, experiment, conditions, store, expect, limits):
        self.experiment, self.store, self.conditions = experiment, store, list(conditions)
        self.expect, self.given = expect, limits is not None
        self.limits = limits or ceilings.now(conditions[0].model.device)
        self.references: dict[str, Trace] = {}
        self.prepared: set[int] = set()
        self.failed: set[int] = set()  # not run again in this call
        self.busy: str | None = None  # what other programs did as the round began

    def round(self, slots, repeat: int, sampler: Sampler, bar) -> None:
        """Every condition once, in this order; what the store holds is not run again."""
        missing = []
        for i, kind in slots:
            key = records.digest(self.experiment, kind, self.conditions[i].describe(), repeat)
            if key not in self.store.keys and i not in self.failed:
                missing.append((i, kind))
        bar.update(len(slots) - len(missing))
        here = records.place(environment(self.conditions[0].model.device))
        others = self.store.machines - {here}
        if missing and here and others:
            raise ValueError(
                f"{self.store.path.name} holds runs of another machine ({min(others)}; this is"
                f" {here}): measure into another file, or start a new study"
            )
        self.busy = machine.busy(self.conditions[0].model.device) if missing else None
        for i, kind in missing:
            if i not in self.failed:
                self.store.append(self.run(i, repeat, kind, sampler))
            bar.update()

    def run(self, i: int, repeat: int, kind: str, sampler: Sampler) -> Record:
        """The record of one run, whatever came of it. One that failed, or was refused beforehand,
        gets the kind `failed`: its place stays open for a resume."""
        condition = self.conditions[i]
        try:
            self.prepare(i)
            _make_graphs(condition)
            predicted = predict_run(condition, self.expect, self.limits)
            with sampler.window(without=condition.ready()) as window:
                trace = condition.run(watch=kind == "watched")
            record = self.complete(i, repeat, kind, trace, window, predicted)
        except NotWritten:  # no fault of this condition
            raise
        except Exception as error:  # a record with a status, and the sweep goes on
            _raise_interrupt(error)
            status, reason = _classify(error)
            record = self.record(condition, repeat, status=status, reason=reason)
        if record.status == "ok":
            return record
        self.failed.add(i)
        gc.collect()  # here, where no exception holds the failed run's tensors any more
        torch.cuda.empty_cache()
        return replace(record, kind="failed")

    def record(self, condition: Condition, repeat: int, trace: Trace | None = None, **fields):
        """A record with what every one has."""
        if trace:
            fields |= {"trace": trace.to_dict(), "token_digest": trace.digest()}
        return Record(
            self.experiment,
            condition.describe(),
            repeat,
            run_id=self.store.path.parent.name,
            recorded_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            environment=environment(condition.model.device),
            **fields,
        )

    def prepare(self, i: int) -> None:
        """Once a condition and process: its reference, then a short run (on a card, until the times
        of two settle).

        Raises DoesNotFit for what surely does not fit.
        """
        if i in self.prepared:
            return
        condition = self.conditions[i]
        prediction.check_fits(condition)
        self.reference(condition)
        short, times = condition.shortened(WARMUP_TOKENS), []
        most = WARMUP_RUNS[condition.model.device.partition(":")[0]]
        here = not (condition.runner.served or condition.runner.foreign)
        for _ in range(most + (here and condition.reference(1).key not in _warm)):
            trace = condition.run(short)
            times.append(trace.duration_s)
            if len(times) > 1 and abs(times[-1] - times[-2]) <= SETTLED * times[-2]:
                break
        if here:
            _warm.add(condition.reference(1).key)
        took = {"warmup_s": times, "compile_s": prediction.prepared(condition).seconds}
        self.store.append(self.record(condition, 0, trace, kind="warmup", metrics=took))
        self.prepared.add(i)

    def reference(self, condition: Condition) -> Trace:
        """The first requests of a condition one after another. Conditions that differ in strategy,
        options, level or arrivals alone share it; the store hands it to further notebooks."""
        key = condition.reference(1).key
        if key not in self.references:
            alike = [c.level for c in self.conditions if c.reference(1).key == key]
            alone = condition.reference(min(max(alike), REFERENCE_REQUESTS))
            trace = self.store.reference(self.record(alone, 0), prediction.prepared(alone).loop)
            if not trace:
                trace = alone.run()
                _warm.add(key)
                self.store.append(self.record(alone, 0, trace, kind="reference"))
            self.references[key] = trace
        return self.references[key]

    def complete(self, i: int, repeat: int, kind: str, trace: Trace, window, predicted) -> Record:
        """The record of a run that went through."""
        condition = self.conditions[i]
        failed = [r.reason for r in trace.requests if r.status == "error"]
        loop, why = trace.notes.get("loop"), trace.notes.get("fallback")
        other = why and loop != condition.loop
        warnings = [f"{condition.loop} ran as {loop}: {why}"] if other else []
        warnings += [f"unstable: {self.busy}"] if self.busy else []
        comparable = trace.notes.get("tokens_comparable", True)
        audited = prediction.audit(condition, predicted, trace)
        if audited and not audited["plausible"] and not self.given:  # or the machine is faster now
            self.limits = ceilings.this_minute(self.limits, condition.model.device)
            highest = {"most_read_bytes_per_s": ceilings.highest_read(self.limits)}
            audited = prediction.audit(condition, predicted | highest, trace)
        return self.record(
            condition,
            repeat,
            trace,
            kind=kind,
            status="error" if failed else "ok",
            reason=failed[0] if failed else None,
            metrics=condition.summarize(trace),
            memory=window | _memory_of_workers(condition, trace),
            prediction=audited,
            agreement=agreement(trace, self.reference(condition)) if comparable else None,
            warnings=warnings,
        )

    def records(self) -> list[Record]:
        """The records of these conditions, of every kind, from the store."""
        keys = {c.key for c in self.conditions}
        every = (r for r in self.store.read() if r.experiment == self.experiment)
        return [r for r in every if records.digest(r.condition) in keys]


def _make_graphs(condition: Condition) -> None:
    """On a GPU, before each run: the graphs that it uses, and none of another condition."""
    runner = condition.runner
    if condition.loop != "compiled" or runner.served or runner.foreign:
        decoding.free_graphs()
        return
    lengths = {r.length for r in condition.workload.requests}
    copies = runner.interleaved_batches(condition.level, condition.options)
    decoding.warm_up(condition.model, condition.rows_per_step, lengths, copies)


def _memory_of_workers(condition: Condition, trace: Trace) -> dict:
    """On a GPU, what the allocators of inference processes held, since this process's holds no run,
    and what was in use before they were started."""
    if not condition.runner.served or condition.model.device == "cpu":
        return {}
    workers, names = trace.notes["workers"], ("allocated", "reserved")
    held = {name: [w.get(f"{name}_bytes") for w in workers] for name in names}
    why = "an inference process did not report it"
    found = {n: summary(n, [sum(v)] if None not in v else (), why) for n, v in held.items()}
    before = trace.notes.get("device_before", {})
    values = () if before.get("bytes") is None else (before["bytes"],)
    return found | {"device_before": summary("device_before", values, before.get("reason") or why)}


def _raise_interrupt(error: BaseException | None) -> None:
    """Raise the Ctrl-C or SIGTERM during whose clean-up this error came, if there was one."""
    while error is not None:
        if not isinstance(error, Exception):
            raise error
        error = error.__cause__ or error.__context__


def _classify(error: Exception) -> tuple[str, str]:
    """A status and one sentence without this machine's paths."""
    if isinstance(error, DoesNotFit):
        return "skipped", f"refused beforehand: {error}"
    text = f"{type(error).__name__}: {machine.first_line(error)}"
    with suppress(RuntimeError):  # a user without a home
        home = Path.home()
        text = text.replace(str(home), "~") if len(home.parts) > 1 else text
    kinds = MemoryError | torch.OutOfMemoryError
    full = isinstance(error, kinds) or "out of memory" in text.lower()
    return ("oom" if full else "error"), text
