"""What a decode step should take here, from this machine's own rates of the model's products.

The bound asks what the memory could do at best; this asks what it does for matrices of these
shapes, with the kernels that the loop uses. What is left over is neither reading nor computing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import cache

from llmperf import decoding, predict, strategies
from llmperf.decoding.trace import Trace
from llmperf.machine import ceilings
from llmperf.machine.timing import linear
from llmperf.measure import between
from llmperf.measure.condition import Condition
from llmperf.models import quantize


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
    at |= {"ceilings": limits, "rates": times, "between_s": _between_s(condition, rows, context)}
    how = (m.shape, m.dtype, m.quantization)
    expected_s, measured = predict.latency(*how, **at).expected_decode_s, tpot_s(trace)
    if expected_s is None or measured is None:
        return {"expected_tpot_ms": None}
    return {
        "expected_tpot_ms": expected_s * 1e3,
        "explained": expected_s / measured,
        "limit": predict.latency(*how, **at, python_s=measured - expected_s).limit,
    }


def _between_s(condition: Condition, rows: int, context: int) -> float | None:
    """Seconds of a step that are no products; None on a GPU: there they run beside the launches."""
    m, loop = condition.model, loop_of(condition)
    if m.device != "cpu":
        return None
    drawn_s = between.drawing_s(m.shape.vocab, m.dtype, rows, condition.sampling)
    if loop == "compiled":
        return drawn_s
    new = min(predict.WINDOW, context + 1) if loop == "recompute" else 1
    seen = new if loop == "recompute" else context + 1
    return drawn_s + between.eager_s(m.shape, m.dtype, rows, new, seen)


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
    return decoding.prepare(condition.model, condition.loop).loop


def rates(condition: Condition, rows: int) -> list[dict] | None:
    """`ceilings.matmul_rates` of the model's products at the rows of a step."""
    m, loop = condition.model, loop_of(condition)
    if (
        strategies.STRATEGIES[condition.strategy].foreign  # its products are not our loops'
        or m.shape.quantization
        or m.quantization in quantize.CHECKPOINT
        or m.shape.moe
        or m.shape.mla
    ):
        return None
    if loop == "recompute":
        context = mean(condition.prompt_tokens) + mean(condition.new_tokens) // 2
        rows *= min(predict.WINDOW, context + 1)
    timed = _timed_once if m.quantization else _timed
    return timed(m.shape, m.dtype, m.quantization, m.device, rows, loop == "compiled")


def _timed(shape, dtype, word, device, rows: int, fused: bool) -> list[dict]:
    """Half a second beside each run: a shared machine's memory is another one a minute later."""
    head, others, of_head, of_others = _products(shape, word, rows, fused and device == "cpu")
    how = {"dtype": dtype, "device": device, "batches": [rows], "repeats": 3}
    first = ceilings.matmul_rates([head], **how, product=of_head)
    return first + ceilings.matmul_rates(list(others), **how, product=of_others)


_timed_once = cache(_timed)  # packing so many weights takes seconds


def _products(shape, word, rows: int, fused: bool) -> tuple:
    """The head's shape, those of the layers with how many of each, and the product of either."""
    others, head = predict.matmul_shapes(shape, fused), (shape.vocab, shape.hidden)
    others[head] -= 1
    return head, +others, linear, _quantised(word) if word else linear


def _quantised(word: str) -> Callable:
    return lambda weight: quantize.layer(weight, word)
