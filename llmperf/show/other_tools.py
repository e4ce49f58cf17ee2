"""One trace scored by the rules of five other tools: the same names, other numbers.

Every tool reports the mean of its values; what differs is which values they are, how they are
weighted and what the denominator counts. All of them leave failed requests out, and time from
the send. A metric that a tool does not have is `None`, with a reason.
"""

from collections.abc import Sequence

import numpy as np

from llmperf.decoding.trace import OK, RequestTrace, Trace
from llmperf.measure import metrics

NAMES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "output_tokens_per_s")


def score(requests: Sequence[RequestTrace], duration_s: float, rules: str) -> dict:
    """`{ttft_ms, tpot_ms, itl_ms, e2el_ms, output_tokens_per_s, rules, reasons}` by one tool.

    `requests` ended ok, with checked times and a token at least. Raises ValueError for a tool
    that is not one of TOOLS.
    """
    if rules not in TOOLS:
        raise ValueError(f"no rules named {rules!r}; use one of {', '.join(TOOLS)}")
    found = TOOLS[rules](list(requests), duration_s) if requests else {}
    missing = f"{rules} reports no metric of this name" if requests else "no request has a token"
    reasons = {name: missing for name in NAMES if found.get(name) is None}
    reasons |= found.pop("reasons", {})
    return {name: found.get(name) for name in NAMES} | {"rules": rules, "reasons": reasons}


def vllm(requests: list[RequestTrace], duration_s: float) -> dict:
    """TPOT = (E2EL - TTFT) / (n - 1), each request counts once; ITL pools all gaps.

    Source: vllm-project/vllm, vllm/benchmarks/serve.py, `calculate_metrics`.
    """
    several = [r for r in requests if len(r.token_s) > 1]
    return _common(requests) | {
        "tpot_ms": _mean([_decode_ms(r) for r in several]),
        "itl_ms": _mean(np.concatenate([np.diff(r.token_s) * 1e3 for r in several] or [[]])),
        "output_tokens_per_s": _tokens(requests) / duration_s if duration_s else None,
    }


def aiperf(requests: list[RequestTrace], duration_s: float) -> dict:
    """What it calls inter-token latency is vLLM's TPOT; the run ends with the last response.

    Source: ai-dynamo/aiperf, src/aiperf/metrics/types/inter_token_latency_metric.py (ITL),
    max_response_metric.py and min_request_metric.py, whose difference is the duration.
    """
    start, end = min(r.submitted_s for r in requests), max(r.token_s[-1] for r in requests)
    return _common(requests) | {
        "itl_ms": _mean([_decode_ms(r) for r in requests if len(r.token_s) > 1]),
        "output_tokens_per_s": _tokens(requests) / (end - start) if end > start else None,
    }


def guidellm(requests: list[RequestTrace], duration_s: float) -> dict:
    """TPOT = E2EL / n, so the first token is in it; ITL is per request. Both weighted by tokens.

    A request weighs n in TPOT and n - 1 in ITL, which makes the mean ITL that of all gaps; one
    of a single token enters ITL as 0 with no weight.
    Source: vllm-project/guidellm, src/guidellm/schemas/base/request_stats.py (the values) and
    src/guidellm/benchmark/schemas/metrics.py (the weights).
    """
    several = [r for r in requests if len(r.token_s) > 1]
    whole = [_e2el_ms(r) / len(r.token_s) for r in requests]
    return _common(requests) | {
        "tpot_ms": _mean(whole, [len(r.token_s) for r in requests]),
        "itl_ms": _mean([_decode_ms(r) for r in several], [len(r.token_s) - 1 for r in several]),
        "reasons": {"output_tokens_per_s": "guidellm reports a rate over time, not restated here"},
    }


def ray_llmperf(requests: list[RequestTrace], duration_s: float) -> dict:
    """Inter-token latency = E2EL / n: the time to the first token is in it. There is no TPOT.

    It counts tokens anew with a Llama tokenizer; here each tool counts the tokens that came.
    Source: ray-project/llmperf, src/llmperf/ray_clients/openai_chat_completions_client.py (sums
    the gaps, TTFT first) and token_benchmark_ray.py (divides by the number of tokens).
    """
    return _common(requests) | {
        "itl_ms": _mean([_e2el_ms(r) / len(r.token_s) for r in requests]),
        "output_tokens_per_s": _tokens(requests) / duration_s if duration_s else None,
    }


def transformers_benchmark(requests: list[RequestTrace], duration_s: float) -> dict:
    """The run is one batch: the least TTFT of its rows, one E2EL, tokens as rows × length.

    Rows of unequal length have no ITL by its rules, since it takes the times as one rectangle.
    Source: huggingface/transformers, benchmark_v2/framework/data_classes.py,
    `BenchmarkResult._accumulate_ttft_and_itl` and `get_throughput`.
    """
    start, end = min(r.submitted_s for r in requests), max(r.token_s[-1] for r in requests)
    lengths = {len(r.token_s) for r in requests}
    steps = max(lengths)
    out = {
        "ttft_ms": (min(r.token_s[0] for r in requests) - start) * 1e3,
        "e2el_ms": (end - start) * 1e3,
        "output_tokens_per_s": steps * len(requests) / (end - start) if end > start else None,
    }
    if len(lengths) > 1 or steps == 1:
        why = "its rows need one length of two tokens or more"
        return out | {"reasons": {"itl_ms": why}}
    return out | {"itl_ms": _mean([_decode_ms(r) for r in requests])}


TOOLS = {
    "vllm": vllm,
    "aiperf": aiperf,
    "guidellm": guidellm,
    "ray-llmperf": ray_llmperf,
    "transformers-benchmark": transformers_benchmark,
}


def _common(requests: list[RequestTrace]) -> dict:
    return {
        "ttft_ms": _mean([(r.token_s[0] - r.submitted_s) * 1e3 for r in requests]),
        "e2el_ms": _mean([_e2el_ms(r) for r in requests]),
    }


def _e2el_ms(r: RequestTrace) -> float:
    return (r.token_s[-1] - r.submitted_s) * 1e3


def _decode_ms(r: RequestTrace) -> float:
    return (r.token_s[-1] - r.token_s[0]) * 1e3 / (len(r.token_s) - 1)


def _tokens(requests: list[RequestTrace]) -> int:
    return sum(len(r.token_s) for r in requests)


def _mean(values: Sequence[float], weights: Sequence[int] | None = None) -> float | None:
    return float(np.average(values, weights=weights)) if len(values) else None


def score_as(trace: Trace, rules: str) -> dict:
    """The same trace by the rules of another tool: means of what it calls TTFT, TPOT, ITL, E2EL.

    `rules` is "vllm", "aiperf", "guidellm", "ray-llmperf" or "transformers-benchmark". A metric
    that a tool lacks is `None`, its reason in `reasons`. Raises ValueError for other rules, and for
    times that cannot be true.
    """
    metrics.per_request(trace)
    metrics.check_end(trace)
    answered = [r for r in trace.requests if r.status == OK and r.token_s]
    return score(answered, trace.duration_s, rules)
