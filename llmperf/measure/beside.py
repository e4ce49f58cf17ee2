"""What stands beside a measurement: the machine, the prediction, and what ran in turn with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache

from llmperf import decoding, machine, predict, strategies
from llmperf.decoding.trace import Trace
from llmperf.machine import ceilings
from llmperf.measure import expected, fits
from llmperf.measure.condition import Condition


@cache
def environment() -> dict:
    """This machine, asked once a process."""
    return machine.describe()


def compile_s(condition: Condition) -> float | None:
    """Seconds that compiling took for this condition's model so far; None when nothing was."""
    if condition.loop != "compiled" or condition.model.module is None:
        return None
    return decoding.prepare(condition.model).seconds


def fallbacks(trace: Trace) -> list[str]:
    """Why the compiled loop ran as `cached`: a figure must not claim what did not happen."""
    reason = trace.notes.get("fallback")
    return [f"compiled ran as cached: {reason}"] if reason else []


def predict_beside(condition: Condition, trace: Trace, expect: bool = False) -> dict:
    """What must move and run at least for this run, against this machine's measured ceilings.

    `bound_s` is the least time for all of it, `limit` what sets it; MBU or MFU above 1 makes the
    record implausible, and `why` has the arithmetic. With `expect` the measured rates of the
    model's own matrix products say what a decode step should take, and `limit` may be Python.
    """
    m, known = condition.model, strategies.STRATEGIES[condition.strategy]
    rows = known.rows_per_step(condition.level, condition.options)
    limits = ceilings.cached(m.device)
    bandwidth = limits["read_bytes_per_s"]["median"]
    flops = (limits["flops_per_s"][m.dtype] or {}).get("median")
    prompt, new = expected.mean(condition.prompt_tokens), expected.mean(condition.new_tokens)
    once = predict.run_cost(
        m.shape, m.dtype, rows, prompt, new, condition.loop, quantization=m.quantization
    )
    cost = once * (condition.level / rows)
    least = predict.bound(cost, bandwidth, flops)
    verdict = predict.audit(cost, trace.duration_s, bandwidth, flops)
    how = (m.shape, m.dtype, m.quantization, rows, prompt, prompt + new // 2)
    no_launches = {**limits, "launch_s": None}
    step = predict.latency(*how, no_launches, condition.loop).decode
    further = expected.beside(condition, rows, trace, limits) if expect else {}
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
        **_memory_beside(condition),
        **further,
    }


def _memory_beside(condition: Condition) -> dict:
    """The ledger's bounds at the level that is measured: the process on the CPU, else reserved."""
    book = fits.ledger(condition)
    if book is None:
        return {}
    level = "process" if condition.model.device == "cpu" else "reserved"
    low, high = book.at(level)
    return {"memory_level": level, "memory_low_bytes": low, "memory_high_bytes": high}


def paired(
    arms: Mapping[str, Callable[[], Trace]], rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Output tokens/s of every arm in every round; a round has each once, in shuffled order.

    Entry i of one arm ran beside entry i of another, so `stats.ratio_interval(..., paired=True)`
    may compare them. A first round is not counted.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    order, speeds = random.Random(seed), {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name in order.sample(list(arms), len(arms)):
            trace = arms[name]()
            speeds[name].append(trace.output_tokens / trace.duration_s)
    return {name: values[1:] for name, values in speeds.items()}
