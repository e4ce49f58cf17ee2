"""The least time of a step, the ceiling that sets it, and the audit of a measured time."""

from dataclasses import dataclass

from llmperf.machine import significant
from llmperf.predict import costs
from llmperf.predict.costs import Cost
from llmperf.predict.spec import RunSpec


@dataclass(frozen=True)
class Bound:
    """The least time, and which ceiling sets it: bandwidth or arithmetic."""

    seconds: float
    limit: str
    bytes: float
    flops: float


def bound(cost: Cost, bandwidth_bytes_s: float, flops_s: float | None) -> Bound:
    """The roofline (Williams et al., 2009); without `flops_s` arithmetic is left out."""
    for name, ceiling in (("bandwidth_bytes_s", bandwidth_bytes_s), ("flops_s", flops_s)):
        if ceiling is not None and not ceiling > 0:
            raise ValueError(f"{name} is {ceiling}: give a rate above zero")
    times = {
        "bandwidth": cost.bytes / bandwidth_bytes_s,
        "arithmetic": cost.flops / flops_s if flops_s else 0.0,
    }
    limit = max(times, key=times.get)
    return Bound(times[limit], limit, cost.bytes, cost.flops)


def decode_bound(
    spec: RunSpec, context: int, bandwidth_bytes_s: float, flops_s: float | None = None
) -> Bound:
    """The least seconds of one decode step: one token for each row after `context` tokens."""
    return bound(costs.step(spec, context), bandwidth_bytes_s, flops_s)


@dataclass(frozen=True)
class Audit:
    """Can this time be true? `mbu` and `mfu` are the shares of bandwidth and of FLOP/s used."""

    plausible: bool
    mbu: float
    mfu: float | None
    sentence: str


def audit(
    cost: Cost, seconds: float, bandwidth_bytes_s: float, flops_s: float | None = None
) -> Audit:
    """Compare a measured time with the least possible one: an MBU or MFU above 1 is impossible.

    `cost` is that of everything done in `seconds` (`run_cost`, times the batches or workers).
    """
    if not seconds > 0:
        raise ValueError(f"measured time is {seconds} s: give one above zero")
    mbu = cost.bytes / seconds / bandwidth_bytes_s
    mfu = cost.flops / seconds / flops_s if flops_s else None
    need, unit, rate, word, worst = cost.bytes / 1e9, "GB", bandwidth_bytes_s / 1e9, "MBU", mbu
    if (mfu or 0) > mbu:
        need, unit, rate, word, worst = cost.flops / 1e9, "GFLOP", flops_s / 1e9, "MFU", mfu
    sentence = (
        f"{cost.steps:,.0f} steps take at least {need:,.1f} {unit}, {significant(need / rate)} s"
        f" at {rate:,.0f} {unit}/s; measured {significant(seconds)} s: {word} {worst:.2f}, "
        f"{'implausible' if worst > 1 else 'plausible'}"
    )
    return Audit(worst <= 1, mbu, mfu, sentence)
