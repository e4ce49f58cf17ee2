"""measure(): conditions × repeats in a seeded, interleaved order; each run becomes a Record."""

from __future__ import annotations

import datetime
import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

from llmperf import (
    ceilings,
    decoding,
    machine,
    metrics,
    predict,
    records,
    stats,
    strategies,
    workload,
)
from llmperf.memory import Sampler
from llmperf.models import Model
from llmperf.records import Record, Store
from llmperf.sampling import PUBLISHED, Sampling
from llmperf.trace import Trace, agreement
from llmperf.workload import Stop, Workload

WARMUP_TOKENS = 4  # a warm-up run generates this many tokens: enough to touch every kernel
WARMUP_RUNS = 3  # at most; fewer when two in a row take the same time
SETTLED = 0.10  # two warm-up runs within 10 % of each other count as settled
REFERENCE_REQUESTS = 4  # requests of a condition that are compared with `sequential`


@dataclass(frozen=True)
class Condition:
    """One point of an experiment: a model, a strategy, and `level` requests in flight."""

    model: Model
    strategy: str = "sequential"
    level: int = 1
    loop: str = "cached"
    prompt_tokens: int | tuple[int, ...] = 32  # several lengths are cycled through
    new_tokens: int | tuple[int, ...] = 32
    sampling: Sampling = PUBLISHED
    stop: Stop = field(default_factory=Stop)
    options: Mapping = field(default_factory=dict)  # what only this strategy knows
    seed: int = 0

    def __post_init__(self):
        strategies.check(self.strategy)
        decoding.check_loop(self.loop)
        if self.level < 1:
            raise ValueError(f"{self.strategy} with {self.level} requests: use at least 1")
        workload.check_fits(self.workload, self.model.shape.max_positions)

    @cached_property
    def workload(self) -> Workload:
        """The requests: the same for every strategy of equal level, lengths and seed."""
        return workload.build(
            self.model.tokenizer,
            self.level,
            self.prompt_tokens,
            self.new_tokens,
            seed=self.seed,
            sampling=self.sampling,
            stop=self.stop,
        )

    def describe(self) -> dict:
        """As JSON-ready values: what a record keeps, and what makes two records comparable."""
        m = self.model
        return {
            "strategy": self.strategy,
            "level": self.level,
            "loop": self.loop,
            "options": dict(self.options),
            "model": m.name,
            "dtype": m.dtype,
            "weights": m.weights,
            "quantization": m.quantization,
            "device": m.device.split(":")[0],
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "sampling": asdict(self.sampling),
            "stop": {"min_tokens": self.stop.min_tokens},
            "seed": self.seed,
        }

    def run(self, work: Workload | None = None, on_step=None) -> Trace:
        """Run once, all device work finished before the clock is read."""
        options = {**self.options, "loop": self.loop, "on_step": on_step}
        return strategies.STRATEGIES[self.strategy](self.model, work or self.workload, options)


@dataclass(frozen=True)
class Results:
    """What `measure` gathered: its records, and why it stopped."""

    records: tuple[Record, ...]
    stopped: str

    @property
    def frame(self):
        """One row a counted run, as a DataFrame (`records.frame`); failed runs are in it."""
        return records.frame(r for r in self.records if r.kind == "measure")

    def traces(self, **wanted) -> list[Trace]:
        """The traces of the counted runs whose condition has these values."""
        return [
            r.to_trace()
            for r in self.records
            if r.kind == "measure"
            and r.status == "ok"
            and all(r.condition.get(k) == v for k, v in wanted.items())
        ]


def measure(
    experiment: str,
    conditions: Sequence[Condition],
    store: Store,
    *,
    repeats: int = 3,
    seed: int = 0,
    width: float | None = None,
    max_repeats: int | None = None,
    budget_s: float | None = None,
    progress: bool = True,
) -> Results:
    """Run every condition `repeats` times, interleaved, and store a record of each run.

    Runs that the store already holds are not repeated, so a killed study goes on where it was. With
    `width`, rounds are added up to `max_repeats` until every condition's interval of throughput is
    narrower than that share of its median. `budget_s` ends the sweep after the round at work.
    A condition that fails is a record with a status, and the sweep goes on.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1")
    if not conditions:
        raise ValueError(f"{experiment}: there is no condition to measure")
    session = _Session(experiment, conditions, store, seed)
    rounds = max(repeats, max_repeats or repeats) if width else repeats
    stopped = f"{repeats} repeats"
    began = time.perf_counter()
    with Sampler() as sampler, _bar(len(conditions) * repeats, experiment, progress) as bar:
        for repeat in range(rounds):
            session.round(repeat, sampler, bar)
            if width and repeat + 1 >= repeats and session.narrow(width):
                stopped = f"every interval is within {width:.0%} after {repeat + 1} repeats"
                break
            if budget_s and time.perf_counter() - began > budget_s and repeat + 1 < rounds:
                stopped = f"the budget of {budget_s:g} s was spent after {repeat + 1} repeats"
                break
        else:
            if width:
                stopped = f"{rounds} repeats, without every interval within {width:.0%}"
    return Results(tuple(session.finish()), stopped)


class _Session:
    """One call of `measure`: its order, its reference tokens, and the records it made or found."""

    def __init__(self, experiment, conditions, store, seed):
        self.experiment, self.store = experiment, store
        self.conditions = list(conditions)
        self.described = [c.describe() for c in self.conditions]
        self.order = random.Random(seed)
        self.reference: dict[str, Trace] = {}
        self.warm: set[int] = set()
        self.failed = self._failed_before()
        self.noticed: str | None = None  # what else this machine was doing as the round began
        self.run_id = store.path.parent.name

    def _failed_before(self) -> dict[int, str]:
        """Conditions that failed in an earlier part of this run: they are not tried again."""
        failed = {
            records.key("", "", r.condition, 0): r.reason
            for r in self.store.read()
            if r.experiment == self.experiment and r.status in ("oom", "error")
        }
        keys = [records.key("", "", d, 0) for d in self.described]
        return {i: failed[key] for i, key in enumerate(keys) if key in failed}

    def key(self, i: int, repeat: int) -> str:
        return records.key(self.experiment, "measure", self.described[i], repeat)

    def round(self, repeat: int, sampler: Sampler, bar) -> None:
        """Every condition once, in an order of this round's own."""
        order = self.order.sample(range(len(self.conditions)), len(self.conditions))
        self.noticed = machine.busy()
        for i in order:
            if self.key(i, repeat) not in self.store:
                self.store.append(self.one(i, repeat, sampler))
            bar.update()

    def one(self, i: int, repeat: int, sampler: Sampler) -> Record:
        """Warm up if this condition is new here, run it, and say what happened."""
        condition = self.conditions[i]
        bare = self.record(self.described[i], repeat)
        if i in self.failed:
            return replace(bare, status="skipped", reason=f"failed before: {self.failed[i]}")
        try:
            self.prepare(i)
            with sampler.window() as window:
                trace = condition.run(on_step=_on_step(condition, window))
            return self.filled(bare, i, trace, window)
        except Exception as error:  # a record with a status, and the sweep goes on
            status, reason = _classify(error)
            self.failed[i] = f"{status}: {reason}"
            _release()
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
        times: list[float] = []
        while len(times) < WARMUP_RUNS and not _settled(times):
            trace = condition.run(_shortened(condition.workload))
            times.append(trace.duration_s)
        self.store.append(self.apart(self.described[i], trace, "warmup", {"warmup_s": times}))
        self.warm.add(i)

    def reference_for(self, i: int) -> None:
        """The first requests of the condition, one after another: what `agreement` compares."""
        condition, signature = self.conditions[i], self.signature(i)
        if signature in self.reference:
            return
        level = min(condition.level, REFERENCE_REQUESTS)
        alone = replace(condition, strategy="sequential", options={}, level=level)
        found = [r for r in self.store.read() if r.kind == "reference"]
        kept = [r for r in found if r.condition == _plain(alone.describe())]
        trace = kept[0].to_trace() if kept else alone.run()
        self.reference[signature] = trace
        self.store.append(self.apart(alone.describe(), trace, "reference"))

    def signature(self, i: int) -> str:
        """Conditions that differ in strategy alone have the same tokens, and one reference."""
        return records.key("", "", {**self.described[i], "strategy": "", "options": {}}, 0)

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
            metrics=metrics.summarize(trace),
            memory=window.summary(),
            prediction=predict_beside(self.conditions[i], trace),
            agreement=asdict(agreement(trace, self.reference[self.signature(i)])),
            warnings=[f"unstable: {self.noticed}"] if self.noticed else [],
        )

    def mine(self) -> list[Record]:
        """The records of these conditions, of every kind, from the store."""
        wanted = [records.key("", "", d, 0) for d in self.described]
        return [
            r
            for r in self.store.read()
            if r.experiment == self.experiment and records.key("", "", r.condition, 0) in wanted
        ]

    def narrow(self, width: float) -> bool:
        """Whether each condition's interval of throughput is narrow enough."""
        frame = Results(tuple(self.mine()), "").frame
        ok = frame[frame.status == "ok"]
        groups = ok.groupby(["strategy", "level", "loop", "options"])["output_tokens_per_s"]
        return all(stats.narrow_enough(list(values), width) for _, values in groups)

    def finish(self) -> list[Record]:
        return self.mine()


def predict_beside(condition: Condition, trace: Trace) -> dict:
    """What must move and run at least for this run, against this machine's measured ceilings.

    `bound_s` is the least time for all of it, `limit` what sets it; MBU or MFU above 1 makes the
    record implausible, and `why` has the arithmetic.
    """
    m, rows = condition.model, _rows_per_step(condition)
    limits = ceilings.cached(m.device)
    bandwidth = limits["read_bytes_per_s"]["median"]
    flops = (limits["flops_per_s"][m.dtype] or {}).get("median")
    prompt, new = _mean(condition.prompt_tokens), _mean(condition.new_tokens)
    once = predict.run_cost(
        m.shape, m.dtype, rows, prompt, new, condition.loop, quantization=m.quantization
    )
    cost = once * (condition.level / rows)
    least = predict.bound(cost, bandwidth, flops)
    verdict = predict.audit(cost, trace.duration_s, bandwidth, flops)
    step = predict.decode_bound(
        m.shape, m.dtype, rows, prompt + new // 2, bandwidth, flops, m.quantization
    )
    return {
        "bound_s": least.seconds,
        "limit": least.limit,
        "bound_tpot_ms": step.seconds * 1e3,
        "mbu": verdict.mbu,
        "mfu": verdict.mfu,
        "plausible": verdict.plausible,
        "why": verdict.sentence,
        "weights_bytes": predict.weights_bytes(m.shape, m.dtype, m.quantization),
        "kv_bytes": predict.kv_bytes(m.shape, condition.level, prompt + new, m.dtype),
    }


def _rows_per_step(condition: Condition) -> int:
    """Requests that share one pass over the weights."""
    if condition.strategy != "batch":
        return 1
    return min(condition.options.get("batch_size", condition.level), condition.level)


def _mean(lengths: int | Sequence[int]) -> int:
    return round(sum(lengths) / len(lengths)) if isinstance(lengths, Sequence) else lengths


def _on_step(condition: Condition, window):
    """Only a GPU has an allocator to read between two steps."""
    return None if condition.model.device == "cpu" else window.step


def _settled(times: Sequence[float]) -> bool:
    """Whether the last two warm-up runs took about the same time."""
    return len(times) > 1 and abs(times[-1] - times[-2]) <= SETTLED * times[-2]


def _plain(value):
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))


def _shortened(work: Workload) -> Workload:
    short = [replace(r, max_new_tokens=min(r.max_new_tokens, WARMUP_TOKENS)) for r in work.requests]
    return replace(work, requests=tuple(short))


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
    if not shown:
        return nullcontext(_Silent())
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, unit="run", leave=False)


class _Silent:
    def update(self) -> None:
        """No bar was asked for."""


@cache
def environment() -> dict:
    """This machine, asked once a process."""
    return machine.describe()
