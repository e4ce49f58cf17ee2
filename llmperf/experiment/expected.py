"""What a decode step should take here, from this machine's own rates of the model's products.

The bound asks what the memory could do at best; this asks what it does for matrices of these
shapes, with the kernels that the loop uses. What is left over is neither reading nor computing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import cache

from llmperf import ceilings, compiled, predict, quantize
from llmperf.experiment import between
from llmperf.experiment.condition import Condition
from llmperf.trace import Trace

FOREIGN = ("endpoint", "continuous")  # their products are not those of our loops


def beside(condition: Condition, rows: int, trace: Trace, limits: Mapping) -> dict:
    """`expected_tpot_ms`, what of the measured TPOT it explains, and the limit in one word.

    The limit is Python when more than half of a step is neither memory nor arithmetic nor launches.
    `expected_tpot_ms` is None where the products of the engine cannot be timed.
    """
    m = condition.model
    prompt, new = mean(condition.prompt_tokens), mean(condition.new_tokens)
    loop, context = loop_of(condition), prompt + new // 2
    at = {"batch": rows, "prompt_tokens": prompt, "context": context, "loop": loop}
    times = rates(condition, rows)
    if times is None:
        return {"expected_tpot_ms": None}
    how = (m.shape, m.dtype, m.quantization)
    found = predict.latency(*how, **at, ceilings=limits, rates=times)
    measured = tpot_s(trace)
    if found.expected_decode_s is None or measured is None:
        return {"expected_tpot_ms": None}
    expected_s = found.expected_decode_s + _between_s(condition, rows, context)
    rest = measured - expected_s
    return {
        "expected_tpot_ms": expected_s * 1e3,
        "explained": expected_s / measured,
        "limit": predict.latency(*how, **at, ceilings=limits, rates=times, python_s=rest).limit,
    }


def _between_s(condition: Condition, rows: int, context: int) -> float:
    """On a processor: seconds of a step between its products, each operation timed alone."""
    m, loop = condition.model, loop_of(condition)
    if m.device != "cpu":  # there they run beside the launches, which the expectation has
        return 0.0
    new = min(predict.WINDOW, context + 1) if loop == "recompute" else 1
    seen = new if loop == "recompute" else context + 1
    return m.shape.layers * between.layer_s(m.shape, m.dtype, rows, new, seen, loop == "compiled")


def tpot_s(trace: Trace) -> float | None:
    """The median over requests of the time between two tokens."""
    found = [
        (r.token_s[-1] - r.token_s[0]) / (len(r.token_s) - 1)
        for r in trace.requests
        if len(r.token_s) > 1
    ]
    return statistics.median(found) if found else None


def mean(lengths) -> int:
    """Of one number for all, or of several that are cycled through."""
    return round(sum(lengths) / len(lengths)) if isinstance(lengths, list | tuple) else lengths


def loop_of(condition: Condition) -> str:
    """The loop that runs: `compiled` is `cached` where it fell back."""
    plans = compiled.plans(condition.model) if condition.loop == "compiled" else []
    fell_back = plans and all(plan.reason for plan in plans)
    return "cached" if fell_back else condition.loop


def rates(condition: Condition, rows: int) -> list[dict] | None:
    """`ceilings.matmul_rates` of the model's products at the rows of a step."""
    m, loop = condition.model, loop_of(condition)
    foreign = condition.strategy in FOREIGN or condition.options.get("engine") == "llamacpp"
    if (
        foreign
        or m.shape.quantization
        or m.quantization in quantize.CHECKPOINT
        or m.shape.moe
        or m.shape.mla
    ):
        return None
    if loop == "recompute":
        context = mean(condition.prompt_tokens) + mean(condition.new_tokens) // 2
        rows *= min(predict.WINDOW, context + 1)
    return _timed(m.shape, m.dtype, m.quantization, m.device, rows, loop == "compiled")


@cache
def _timed(shape, dtype, word, device, rows: int, fused: bool) -> list[dict]:
    """Timed once a process and not kept longer: a shared machine is another one an hour later."""
    products, head = predict.matmul_shapes(shape), (shape.vocab, shape.hidden)
    others = [p for p in products if p != head]
    kernel = between.kernel(device, rows, fused)
    small = _quantised(word) if word else kernel
    how = {"dtype": dtype, "device": device, "batches": [rows], "repeats": 3}
    passes = [
        ceilings.matmul_rates([head], **how, product=kernel)
        + ceilings.matmul_rates(others, **how, product=small)
        for _ in range(2)  # a neighbour's burst falls into one of them
    ]
    return [min(pair, key=lambda r: r["seconds"]["median"]) for pair in zip(*passes, strict=True)]


def _quantised(word: str) -> Callable:
    return lambda weight: quantize.layer(weight, word)
