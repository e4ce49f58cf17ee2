"""Findings on memory: what was held, against what the ledger explains. One run is enough, since
memory repeats to the byte where times do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from llmperf import machine, models, predict
from llmperf.findings.evidence import CANNOT_TELL, FAILS, HOLDS, Evidence, Figure, Setting
from llmperf.findings.parts import Part, check

GIB = 2**30


@check(
    "batch-reserved",
    "run notebook 03 on an NVIDIA GPU: the CPU has no caching allocator whose memory could double",
)
def batch_reserved(evidence: Evidence) -> Iterator[Part]:
    """Reserved memory is held to the ledger's low and high for the same growth."""
    for s in evidence.with_all(("batch", 1), ("batch", 10)):
        one, ten = (s.peaks("reserved", "batch", n) for n in (1, 10))
        if not one or not ten or (least_most := _predicted_growth(s)) is None:
            continue
        low, high = (x / GIB for x in least_most)
        grown = Figure((max(ten) - max(one)) / GIB, n=min(len(one), len(ten)), basis="bytes held")
        verdict = HOLDS if low <= grown.value <= high else FAILS
        text = (
            f"reserved grew {max(ten) / max(one):.2f} times, by {grown.value:.3f} GiB;"
            f" KV cache and activations of the ledger explain {low:.3f} to {high:.3f} GiB"
        )
        yield Part(s, verdict, verdict, text, grown)


def _shape(s: Setting):
    try:
        return models.shape_of(str(s.condition.get("model")))
    except ValueError:
        return None  # a model of the user's own: its arithmetic is not in the record


def _lengths(condition: Mapping) -> dict:
    """Prompt and answer lengths as the ledger takes them: the longest of each."""
    sizes = {}
    for key, usual in (("prompt_tokens", 32), ("new_tokens", 128)):
        value = condition.get(key) or usual
        sizes[key] = max(value) if isinstance(value, list | tuple) else value
    return sizes


def _predicted_growth(s: Setting) -> tuple[float, float] | None:
    shape, c = _shape(s), s.condition
    if shape is None:
        return None
    loop = c.get("loop", "cached")
    run = _lengths(c) | {"platform": _platform(s), "masks": loop == "recompute"}
    run["loop"] = "cached" if loop == "compiled" else loop
    how = (shape, c.get("dtype", "fp16"), c.get("quantization"))
    specs = (predict.RunSpec(*how, n, **run) for n in (1, 10))
    (low1, high1), (low10, high10) = (predict.memory(spec).at("reserved") for spec in specs)
    return low10 - low1, high10 - high1


def _platform(s: Setting) -> str:
    return machine.platform_word("cuda", s.os)


@check("processes-memory", "run notebook 06 with at least two numbers of processes")
def processes_memory(evidence: Evidence) -> Iterator[Part]:
    """Equal steps of at least the model's size; the first process dearer, by the libraries."""
    for s in evidence.settings:
        channel, used = _used_by_processes(s)
        levels = sorted(used)
        if len(levels) < 2:
            continue
        steps = [(used[b] - used[a]) / (b - a) for a, b in pairwise(levels)]
        weights = _weights_bytes(s)
        own = weights is None or min(steps) >= 0.95 * weights
        text = f"{channel}: each more process takes {_sizes(steps)} GiB"
        text += f", the weights are {weights / GIB:.2f}" if weights else ""
        idle = s.peaks("device_used", "processes", 1, "first") if channel == "device" else []
        first = used[1] - min(idle) if idle and 1 in used else None
        if first is None:
            verdict = CANNOT_TELL if own else FAILS
            text += "; what the first costs beyond that, by the libraries, needs a GPU's level"
        else:
            verdict = HOLDS if own and first > 1.05 * max(steps) else FAILS
            text += f"; the first takes {first / GIB:.2f}"
        points_to = FAILS if verdict == FAILS else HOLDS
        yield Part(s, verdict, points_to, text, Figure(steps[-1] / GIB))


def _used_by_processes(s: Setting) -> tuple[str, dict[int, float]]:
    """Level → bytes: the device's where it is known, else the unique sets of all processes."""
    for channel, label in (("device_used", "device"), ("uss", "unique set size")):
        used = {}
        for level in s.levels("processes", timed=False):
            if peaks := s.peaks(channel, "processes", level):
                used[level] = sorted(peaks)[len(peaks) // 2]
        if used:
            return label, used
    return "", {}


def _sizes(values: Sequence[float]) -> str:
    return ", ".join(f"{v / GIB:.2f}" for v in values)


def _weights_bytes(s: Setting) -> float | None:
    for row in s.rows:
        if found := (row.get("prediction") or {}).get("weights_bytes"):
            return found
    shape = _shape(s)
    c = s.condition
    return shape and predict.weights_bytes(shape, c.get("dtype", "fp16"), c.get("quantization"))


@check("kv-share", "run notebook 03 or 07 on an NVIDIA GPU: only its allocator tells the share")
def kv_share(evidence: Evidence) -> Iterator[Part]:
    for s in evidence.settings:
        weights = _weights_bytes(s)
        held = {n: max(p) for n in s.levels("batch") if (p := s.peaks("reserved", "batch", n))}
        if not weights or not held:
            continue
        shares = {n: bytes / weights - 1 for n, bytes in sorted(held.items())}
        inside = [n for n, x in shares.items() if 0.2 <= x <= 0.5]
        verdict = HOLDS if len(inside) == len(shares) else FAILS
        ends = ", ".join(f"batch {n}: {shares[n]:.0%}" for n in sorted({min(held), max(held)}))
        text = f"beyond the weights {ends}; {len(inside)} of {len(shares)} batches in 20 to 50 %"
        text += _predicted_share(s, max(held), weights)
        yield Part(s, verdict, verdict, text, Figure(shares[max(held)]))


def _predicted_share(s: Setting, n: int, weights: float) -> str:
    """Only where the run kept a cache: the published loop recomputes and has none."""
    shape = _shape(s)
    if shape is None or s.loop == "recompute":
        return "" if shape is None else "; the recomputing loop keeps no KV cache at all"
    tokens = sum(_lengths(s.condition).values())
    share = predict.kv_bytes(shape, n, tokens, s.condition.get("dtype", "fp16")) / weights
    return f"; the KV cache alone is predicted at {share:.0%}"


@check("available-vram", "run notebook 07 on an NVIDIA GPU, up to the batch that no longer fits")
def available_vram(evidence: Evidence) -> Iterator[Part]:
    ended = [r for r in evidence.failed if r["status"] == "oom"]
    for s in evidence.with_all(("batch", None)):
        beyond = [r["condition"]["level"] for r in ended if _same_model(r, s)]
        shape, budget = _shape(s), _budget(s)
        if not beyond or not s.has_gpu or shape is None or budget is None:
            continue
        ran = max((n for n in s.levels("batch") if n < min(beyond)), default=0)
        c = s.condition
        how = (shape, c.get("dtype", "fp16"), c.get("quantization"))
        spec = predict.RunSpec(*how, platform=_platform(s), **_lengths(c))
        fits = predict.largest_batch(spec, budget, idle_bytes=0)
        # The truth lies from the last that ran to the first that did not.
        verdict = HOLDS if 0.9 * ran <= fits.at_best and fits.surely <= 1.1 * min(beyond) else FAILS
        text = (
            f"batch {ran} ran and {min(beyond)} did not; predicted"
            f" {fits.surely} surely, {fits.at_best} at best, in {budget / GIB:.1f} GiB"
        )
        yield Part(s, verdict, verdict, text, Figure(float(ran)))


def _same_model(row: Mapping, s: Setting) -> bool:
    keys = ("model", "dtype", "quantization", "device", "prompt_tokens", "new_tokens", "weights")
    mine = row["condition"].get("strategy") == "batch"
    return mine and all(row["condition"].get(k) == s.condition.get(k) for k in keys)


def _budget(s: Setting) -> float | None:
    """Physical memory less what was in use as the run began (the context is in the ledger)."""
    card = (s.environment.get("gpus") or [{}])[0]
    total, used = card.get("memory_total_bytes"), card.get("memory_used_bytes")
    return None if total is None else total - (used or 0)
