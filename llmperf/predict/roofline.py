"""The latency bound, what limits it, MBU, MFU and the audit of a measured time."""

from dataclasses import dataclass

from llmperf.predict import costs
from llmperf.predict.costs import Cost
from llmperf.predict.spec import RunSpec

BANDWIDTH, ARITHMETIC, LAUNCHES, PYTHON = "bandwidth", "arithmetic", "launches", "Python"


@dataclass(frozen=True)
class Bound:
    """The least time that one step can take, which ceiling sets it, and what it must do."""

    seconds: float
    limit: str
    bytes: float
    flops: float


def bound(
    cost: Cost, bandwidth_bytes_s: float, flops_s: float | None, launch_s: float = 0.0
) -> Bound:
    """The roofline (Williams et al., 2009): whichever ceiling takes longest sets the time.

    `launch_s` is the time to launch all kernels of the step. Without `flops_s` arithmetic is
    left out. Raises ValueError for a ceiling that is not above zero.
    """
    for name, ceiling in (("bandwidth_bytes_s", bandwidth_bytes_s), ("flops_s", flops_s)):
        if ceiling is not None and not ceiling > 0:
            raise ValueError(f"{name} is {ceiling}: give a rate above zero")
    times = {
        BANDWIDTH: cost.bytes / bandwidth_bytes_s,
        ARITHMETIC: cost.flops / flops_s if flops_s else 0.0,
        LAUNCHES: launch_s,
    }
    limit = max(times, key=times.get)
    return Bound(times[limit], limit, cost.bytes, cost.flops)


def decode_bound(
    spec: RunSpec, context: int, bandwidth_bytes_s: float, flops_s: float | None = None
) -> Bound:
    """The least seconds of one decode step: one token for each row after `context` cached ones."""
    return bound(costs.forward(spec, 1, context), bandwidth_bytes_s, flops_s)


def mbu(bytes_moved: float, seconds: float, bandwidth_bytes_s: float) -> float:
    """Model bandwidth utilisation: bytes that must move per second over the bandwidth."""
    return bytes_moved / seconds / bandwidth_bytes_s


def mfu(flops: float, seconds: float, flops_s: float) -> float:
    """Model FLOPs utilisation: FLOPs that must run per second over the dense peak of the dtype."""
    return flops / seconds / flops_s


@dataclass(frozen=True)
class Audit:
    """Can this time be true? `sentence` has the arithmetic."""

    plausible: bool
    mbu: float
    mfu: float | None
    sentence: str


def audit(
    cost: Cost, seconds: float, bandwidth_bytes_s: float, flops_s: float | None = None
) -> Audit:
    """Hold a measured time against what must move and run at least: above 1 it cannot be true.

    `cost` is that of everything done in `seconds` (`run_cost`, times the batches or workers).
    """
    if not seconds > 0:
        raise ValueError(f"measured time is {seconds} s: give one above zero")
    moved = mbu(cost.bytes, seconds, bandwidth_bytes_s)
    ran = mfu(cost.flops, seconds, flops_s) if flops_s else None
    by_flops = (ran or 0) > moved
    worst = ran if by_flops else moved
    need, unit, rate, word = (
        (cost.flops / 1e9, "GFLOP", flops_s / 1e9, "MFU")
        if by_flops
        else (cost.bytes / 1e9, "GB", bandwidth_bytes_s / 1e9, "MBU")
    )
    sentence = (
        f"{cost.steps:,.0f} steps take at least {need:,.1f} {unit}, {need / rate:.3g} s at "
        f"{rate:,.0f} {unit}/s; measured {seconds:.3g} s: {word} {worst:.2f}, "
        f"{'implausible' if worst > 1 else 'plausible'}"
    )
    return Audit(worst <= 1, moved, ran, sentence)
