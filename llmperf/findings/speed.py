"""Findings on time: ratios of seconds or rates between strategies, held to a limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llmperf.findings.evidence import Evidence, Figure, Setting, ratio
from llmperf.findings.parts import ALIKE, Part, at_the_top, both, check, only, part, top_level

# Batch


@check("batch-time", "run notebook 03 with batch_sizes that hold 1 and 10")
def batch_time(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.with_all(("batch", 1), ("batch", 10)):
        figure = ratio(s.seconds("batch", 10), s.seconds("batch", 1))
        yield from part(s, figure, "batch 10 takes {} times as long as batch 1", most=1.5)


@check("batch-throughput", "run notebook 03 with batch_sizes that hold 1 and 10")
def batch_throughput(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.with_all(("batch", 1), ("batch", 10)):
        sides = (s.metric("output_tokens_per_s", "batch", n) for n in (10, 1))
        text = "batch 10 gives {} times the tokens/s of batch 1"
        yield from part(s, ratio(*sides), text, least=5)


# Coroutines and threads


@check("coroutine-serial", "run notebook 04 with one task and several")
def coroutine_serial(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.settings:
        runs = _blocking(s)
        n = top_level({r["condition"]["level"] for r in runs})
        if n is None:
            continue
        many = [r["metrics"]["duration_s"] for r in runs if r["condition"]["level"] == n]
        one = [r["metrics"]["duration_s"] for r in runs if r["condition"]["level"] == 1]
        one = one or s.seconds("sequential", 1)
        row, how = ([x * n for x in one], f"{n} times one request") if one else s.in_a_row(n)
        figure = ratio(many, row)
        text = f"{n} tasks take {{}} times as long as {how}"
        time = only(part(s, figure, text, 1 - ALIKE, 1 + ALIKE))
        yield from both(time, _blocked(s, runs, n), s) if time else ()


def _blocking(s: Setting) -> list[Mapping]:
    """Coroutine runs as published: the loop called in the task, not handed to a thread."""
    runs = s.runs("coroutine")
    return [r for r in runs if _option(r, "variant", "blocking") == "blocking"]


def _option(row: Mapping, name: str, default):
    return (row["condition"].get("options") or {}).get(name, default)


def _blocked(s: Setting, runs: Sequence[Mapping], n: int) -> Part | None:
    """The event loop's longest block against the time of one request."""
    found = [
        (block, r["metrics"]["duration_s"] / n)
        for r in runs
        if r["condition"]["level"] == n and (block := _note(r, "event_loop", "longest_block_s"))
    ]
    shares = [block / one for block, one in found]
    figure = ratio(shares, [1.0] * len(shares))
    text = "the event loop stood still for {} times the time of one request"
    return only(part(s, figure, text, least=0.5))


def _note(row: Mapping, group: str, name: str) -> float | None:
    """What the strategy noted, or None where it could not."""
    notes = (row.get("trace") or {}).get("notes") or {}
    return (notes.get(group) or {}).get(name)


@check("threads-windows", "run notebook 05: one request, and ten threads")
def threads_in_a_row(evidence: Evidence) -> Iterator[Part]:
    """The claim is of Windows: where records of it are present, only they count."""
    settings = [s for s in evidence.settings if top_level(s.levels("threads"))]
    windows = [s for s in settings if s.os == "Windows"]
    for s, n in at_the_top(windows or settings, lambda s: s.levels("threads")):
        row, how = s.in_a_row(n)
        where = "" if windows else f" (on {s.os}; the claim is of Windows)"
        figure = ratio(s.seconds("threads", n), row)
        yield from part(s, figure, f"{n} threads take {{}} times as long as {how}{where}", most=1.0)


@check("threads-streams", "run notebook 05 on an NVIDIA GPU: a CPU has no streams")
def threads_streams(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.settings:
        by: dict[tuple, list[float]] = {}
        for r in s.runs("threads"):
            kind = (_option(r, "stream", "default"), r["condition"]["level"])
            by.setdefault(kind, []).append(r["metrics"]["duration_s"])
        n = top_level({n for kind, n in by if kind == "own" and ("default", n) in by})
        if n is None:
            continue
        text = f"{n} threads take {{}} times as long with streams of their own as with one for all"
        figure = ratio(by["own", n], by["default", n])
        yield from part(s, figure, text, 1 - ALIKE, 1 + ALIKE)


@check("threads-gil", "run notebook 05 with both loops, and with what measures the GIL installed")
def threads_gil(evidence: Evidence) -> Iterator[Part]:
    compiled = {_without_loop(s): s for s in evidence.settings if s.loop == "compiled"}
    for s in evidence.settings:
        if s.loop == "compiled" or (n := top_level(s.levels("threads"))) is None:
            continue
        yield from both(_contention(s, n), _scaling(s, compiled.get(_without_loop(s)), n), s)


def _without_loop(s: Setting) -> str:
    return s.key.replace(f'"{s.loop}"', "")


def _contention(s: Setting, n: int) -> Part | None:
    few = min(s.levels("threads"))
    sides = [
        [x for r in s.alike("threads", level) if (x := _note(r, "gil", "contention")) is not None]
        for level in (n, few)
    ]
    if few == n or not all(sides):
        return None
    floor = 1e-4  # one thread waits for nobody: a ratio to 0 says nothing
    figure = ratio(*([max(x, floor) for x in side] for side in sides))
    text = f"the GIL contention of {n} threads is {{}} times that of {few}"
    return only(part(s, figure, text, least=1.1))


def _scaling(s: Setting, other: Setting | None, n: int) -> Part | None:
    if other is None or n not in other.levels("threads"):
        return None
    variant = other.alike("threads", n)[0]["condition"].get("options") or {}
    rates = [
        [x.metric("output_tokens_per_s", "threads", level, **variant) for level in (n, 1)]
        for x in (s, other)
    ]
    eager, fast = (ratio(*sides) for sides in rates)
    if eager is None or fast is None:
        return None
    value = fast.value / eager.value
    known = None not in (eager.low, fast.low)
    low, high = (fast.low / eager.high, fast.high / eager.low) if known else (None, None)
    figure = Figure(value, low, high, min(eager.n, fast.n), fast.basis)
    text = f"{n} threads speed the compiled loop up {{}} times as much as the eager one"
    return only(part(s, figure, text, least=1.0))


@check("threads-utilisation", "run notebooks 03 and 05 on an NVIDIA GPU, with batch 10")
def threads_utilisation(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.with_all(("batch", None), ("threads", None)):
        n = top_level(s.levels("batch") & s.levels("threads"))
        if n is None:
            continue
        sides = (s.peaks("utilization", name, n, "mean") for name in ("batch", "threads"))
        text = f"batch {n} has {{}} times the GPU utilisation of {n} threads"
        yield from part(s, ratio(*sides), text, least=2)


# Processes


def _workers(s: Setting, other: str) -> int | None:
    return top_level(s.levels("processes") & s.levels(other))


@check("processes-beat-threads", "run notebook 06: the same number of processes and of threads")
def processes_threads(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.with_all(("processes", None), ("threads", None)):
        if n := _workers(s, "threads"):
            figure = ratio(s.seconds("processes", n), s.seconds("threads", n))
            text = f"{n} processes take {{}} times as long as {n} threads"
            yield from part(s, figure, text, most=1.0)


@check("processes-below-batch", "run notebook 06: processes, and a batch of as many requests")
def processes_batch(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.with_all(("processes", None), ("batch", None)):
        if n := _workers(s, "batch"):
            figure = ratio(s.seconds("batch", n), s.seconds("processes", n))
            text = f"batch {n} takes {{}} times as long as {n} processes"
            yield from part(s, figure, text, most=0.7)


# Two platforms on one card


# Memory and serving


RIVALS = ("sequential", "threads", "processes")


@check("batching-preferred", "run notebook 09: the same arriving load for every strategy")
def batching_preferred(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.arriving:
        for n in sorted(s.levels("dynamic"))[-1:]:
            dynamic = _goodput(s, "dynamic", n)
            rivals = {r: g for r in RIVALS if (g := _goodput(s, r, n))}
            if not dynamic or not rivals:
                continue
            best = max(rivals, key=lambda r: sorted(rivals[r])[len(rivals[r]) // 2])
            lacking = [r for r in RIVALS if r not in rivals]
            note = f" (not measured: {', '.join(lacking)})" if lacking else ""
            text = f"dynamic batching has {{}} times the goodput of {best}, the next best{note}"
            yield from part(s, _goodput_ratio(dynamic, rivals[best]), text, least=1.0)


def _goodput(s: Setting, strategy: str, n: int) -> list[float]:
    return [g for g in s.metric("goodput_per_s", strategy, n) if g is not None]


def _goodput_ratio(a: Sequence[float], b: Sequence[float]) -> Figure | None:
    """A rival may answer no request in time: then the floor is a thousandth of the other's best."""
    if not max(*a, *b):
        return None
    floor = max(*a, *b) / 1e3
    return ratio([max(x, floor) for x in a], [max(x, floor) for x in b])
