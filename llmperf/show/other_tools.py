"""One trace by the definitions of five other tools, each the mean of other values."""

from collections.abc import Sequence

import numpy as np

from llmperf.decoding.trace import OK, RequestTrace, Trace

METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "output_tokens_per_s")


def score_as(trace: Trace, tool: str) -> dict[str, float | None]:
    """METRICS as one of TOOLS computes them; None for a metric that the tool does not have."""
    if tool not in TOOLS:
        raise ValueError(f"no tool named {tool!r}: use one of {', '.join(TOOLS)}")
    answered = [r for r in trace.requests if r.status == OK and r.token_s]
    found = TOOLS[tool](answered, trace.duration_s) if answered else {}
    return dict.fromkeys(METRICS) | found


def vllm(requests: list[RequestTrace], duration_s: float) -> dict:
    """TPOT = (E2EL - TTFT) / (n - 1), each request counts once; ITL pools all gaps.

    Source: vllm-project/vllm, vllm/benchmarks/serve.py, `calculate_metrics`.
    """
    gaps = np.concatenate([np.diff(r.token_s) * 1e3 for r in requests])
    found = {"tpot_ms": _mean(_decode_ms(requests)), "itl_ms": _mean(gaps)}
    return _common(requests, duration_s) | found


def aiperf(requests: list[RequestTrace], duration_s: float) -> dict:
    """Its inter-token latency is vLLM's TPOT; the run ends with the last response.

    Source: ai-dynamo/aiperf, src/aiperf/metrics/types: inter_token_latency_metric.py,
    max_response_metric.py and min_request_metric.py, whose difference is the duration.
    """
    seconds = max(r.token_s[-1] for r in requests) - min(r.submitted_s for r in requests)
    return _common(requests, seconds) | {"itl_ms": _mean(_decode_ms(requests))}


def guidellm(requests: list[RequestTrace], duration_s: float) -> dict:
    """TPOT = E2EL / n, so the first token is in it; ITL is per request. Both weighted by tokens.

    Its rate over time is not restated here. Source: vllm-project/guidellm,
    src/guidellm/schemas/base/request_stats.py and src/guidellm/benchmark/schemas/metrics.py.
    """
    gaps = [len(r.token_s) - 1 for r in requests if len(r.token_s) > 1]
    return _common(requests, duration_s) | {
        "tpot_ms": _mean(_e2el_per_token_ms(requests), [len(r.token_s) for r in requests]),
        "itl_ms": _mean(_decode_ms(requests), gaps),
        "output_tokens_per_s": None,
    }


def ray_llmperf(requests: list[RequestTrace], duration_s: float) -> dict:
    """Inter-token latency = E2EL / n: the time to the first token is in it. There is no TPOT.

    Source: ray-project/llmperf, src/llmperf/ray_clients/openai_chat_completions_client.py (sums
    the gaps, TTFT first) and token_benchmark_ray.py (divides by the number of tokens).
    """
    return _common(requests, duration_s) | {"itl_ms": _mean(_e2el_per_token_ms(requests))}


def transformers_benchmark(requests: list[RequestTrace], duration_s: float) -> dict:
    """The run is one batch: the least TTFT of its rows, one E2EL, tokens as rows × length.

    ITL needs rows of one length. Source: huggingface/transformers,
    benchmark_v2/framework/data_classes.py, `_accumulate_ttft_and_itl` and `get_throughput`.
    """
    start, end = min(r.submitted_s for r in requests), max(r.token_s[-1] for r in requests)
    lengths = {len(r.token_s) for r in requests}
    return {
        "ttft_ms": (min(r.token_s[0] for r in requests) - start) * 1e3,
        "itl_ms": _mean(_decode_ms(requests)) if len(lengths) == 1 else None,
        "e2el_ms": (end - start) * 1e3,
        "output_tokens_per_s": max(lengths) * len(requests) / (end - start),
    }


TOOLS = {
    "vllm": vllm,
    "aiperf": aiperf,
    "guidellm": guidellm,
    "ray-llmperf": ray_llmperf,
    "transformers-benchmark": transformers_benchmark,
}


def _common(requests: list[RequestTrace], seconds: float) -> dict:
    return {
        "ttft_ms": _mean([(r.token_s[0] - r.submitted_s) * 1e3 for r in requests]),
        "e2el_ms": _mean([(r.token_s[-1] - r.submitted_s) * 1e3 for r in requests]),
        "output_tokens_per_s": sum(len(r.token_s) for r in requests) / seconds,
    }


def _e2el_per_token_ms(requests: list[RequestTrace]) -> list[float]:
    return [(r.token_s[-1] - r.submitted_s) * 1e3 / len(r.token_s) for r in requests]


def _decode_ms(requests: list[RequestTrace]) -> list[float]:
    """vLLM's TPOT of the requests with two tokens or more."""
    several = [r for r in requests if len(r.token_s) > 1]
    return [(r.token_s[-1] - r.token_s[0]) * 1e3 / (len(r.token_s) - 1) for r in several]


def _mean(values: Sequence[float], weights: Sequence[int] | None = None) -> float | None:
    return float(np.average(values, weights=weights)) if len(values) else None
