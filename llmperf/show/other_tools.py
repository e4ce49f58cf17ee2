"""One trace by the definitions of five other tools: the same names, other numbers.

Every tool reports the mean of its values; they differ in which values, in their weights, and in the
denominator. All leave failed requests out, and time from the send.
"""

from collections.abc import Sequence

import numpy as np

from llmperf.decoding.trace import OK, RequestTrace, Trace
from llmperf.measure import metrics

METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "output_tokens_per_s")


def score_as(trace: Trace, tool: str) -> dict:
    """METRICS as one of TOOLS computes them; a metric that a tool lacks is None, see `reasons`.

    Raises ValueError for another tool, and for times that cannot be true.
    """
    if tool not in TOOLS:
        raise ValueError(f"no tool named {tool!r}: use one of {', '.join(TOOLS)}")
    metrics.per_request(trace)
    metrics.check_end(trace)
    answered = [r for r in trace.requests if r.status == OK and r.token_s]
    found = TOOLS[tool](answered, trace.duration_s) if answered else {}
    lacks = f"{tool} reports no metric of this name" if answered else "no request has a token"
    reasons = {name: lacks for name in METRICS if found.get(name) is None}
    reasons |= found.pop("reasons", {})
    return {name: found.get(name) for name in METRICS} | {"tool": tool, "reasons": reasons}


def vllm(requests: list[RequestTrace], duration_s: float) -> dict:
    """TPOT = (E2EL - TTFT) / (n - 1), each request counts once; ITL pools all gaps.

    Source: vllm-project/vllm, vllm/benchmarks/serve.py, `calculate_metrics`.
    """
    gaps = np.concatenate([np.diff(r.token_s) * 1e3 for r in requests])
    found = {"tpot_ms": _mean(_decode_ms(requests)), "itl_ms": _mean(gaps)}
    return _common(requests, duration_s) | found


def aiperf(requests: list[RequestTrace], duration_s: float) -> dict:
    """Its inter-token latency is vLLM's TPOT; the run ends with the last response.

    Source: ai-dynamo/aiperf, src/aiperf/metrics/types/inter_token_latency_metric.py (ITL),
    max_response_metric.py and min_request_metric.py, whose difference is the duration.
    """
    seconds = max(r.token_s[-1] for r in requests) - min(r.submitted_s for r in requests)
    return _common(requests, seconds) | {"itl_ms": _mean(_decode_ms(requests))}


def guidellm(requests: list[RequestTrace], duration_s: float) -> dict:
    """TPOT = E2EL / n, so the first token is in it; ITL is per request. Both weighted by tokens.

    A request weighs n in TPOT and n - 1 in ITL, which makes the mean ITL that of all gaps; one
    of a single token enters ITL as 0 with no weight.
    Source: vllm-project/guidellm, src/guidellm/schemas/base/request_stats.py (the values) and
    src/guidellm/benchmark/schemas/metrics.py (the weights).
    """
    gaps = [len(r.token_s) - 1 for r in requests if len(r.token_s) > 1]
    return _common(requests, duration_s) | {
        "tpot_ms": _mean(_e2el_per_token_ms(requests), [len(r.token_s) for r in requests]),
        "itl_ms": _mean(_decode_ms(requests), gaps),
        "output_tokens_per_s": None,
        "reasons": {"output_tokens_per_s": "guidellm reports a rate over time, not restated here"},
    }


def ray_llmperf(requests: list[RequestTrace], duration_s: float) -> dict:
    """Inter-token latency = E2EL / n: the time to the first token is in it. There is no TPOT.

    It counts tokens anew with a Llama tokenizer; here each tool counts the tokens that came.
    Source: ray-project/llmperf, src/llmperf/ray_clients/openai_chat_completions_client.py (sums
    the gaps, TTFT first) and token_benchmark_ray.py (divides by the number of tokens).
    """
    return _common(requests, duration_s) | {"itl_ms": _mean(_e2el_per_token_ms(requests))}


def transformers_benchmark(requests: list[RequestTrace], duration_s: float) -> dict:
    """The run is one batch: the least TTFT of its rows, one E2EL, tokens as rows × length.

    Rows of unequal length have no ITL here, since it takes the times as one rectangle.
    Source: huggingface/transformers, benchmark_v2/framework/data_classes.py,
    `BenchmarkResult._accumulate_ttft_and_itl` and `get_throughput`.
    """
    start, end = min(r.submitted_s for r in requests), max(r.token_s[-1] for r in requests)
    lengths = {len(r.token_s) for r in requests}
    out = {
        "ttft_ms": (min(r.token_s[0] for r in requests) - start) * 1e3,
        "e2el_ms": (end - start) * 1e3,
        "output_tokens_per_s": max(lengths) * len(requests) / (end - start)
        if end > start
        else None,
    }
    if len(lengths) > 1 or lengths == {1}:
        return out | {"reasons": {"itl_ms": "its rows need one length of two tokens or more"}}
    return out | {"itl_ms": _mean(_decode_ms(requests))}


TOOLS = {
    "vllm": vllm,
    "aiperf": aiperf,
    "guidellm": guidellm,
    "ray-llmperf": ray_llmperf,
    "transformers-benchmark": transformers_benchmark,
}


def _common(requests: list[RequestTrace], seconds: float) -> dict:
    tokens = sum(len(r.token_s) for r in requests)
    return {
        "ttft_ms": _mean([(r.token_s[0] - r.submitted_s) * 1e3 for r in requests]),
        "e2el_ms": _mean([(r.token_s[-1] - r.submitted_s) * 1e3 for r in requests]),
        "output_tokens_per_s": tokens / seconds if seconds > 0 else None,
    }


def _e2el_per_token_ms(requests: list[RequestTrace]) -> list[float]:
    return [(r.token_s[-1] - r.submitted_s) * 1e3 / len(r.token_s) for r in requests]


def _decode_ms(requests: list[RequestTrace]) -> list[float]:
    """vLLM's TPOT of the requests with two tokens or more."""
    several = [r for r in requests if len(r.token_s) > 1]
    return [(r.token_s[-1] - r.token_s[0]) * 1e3 / (len(r.token_s) - 1) for r in several]


def _mean(values: Sequence[float], weights: Sequence[int] | None = None) -> float | None:
    return float(np.average(values, weights=weights)) if len(values) else None
