"""One trace by the definitions of five other tools, each the mean of other values.

All leave failed requests out, and time from the send.
"""

import pandas as pd

from llmperf.decoding.trace import OK, Trace

METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "output_tokens_per_s")


def score_as(trace: Trace, tool: str) -> dict[str, float | None]:
    """METRICS as one of TOOLS computes them; None for a metric that the tool does not have."""
    rows = pd.DataFrame(
        [
            (r.submitted_s, r.token_s[0], r.token_s[-1], len(r.token_s))
            for r in trace.requests
            if r.status == OK and r.token_s
        ],
        columns=["sent_s", "first_s", "last_s", "tokens"],
    )
    rows["ttft_ms"] = (rows.first_s - rows.sent_s) * 1e3
    rows["e2el_ms"] = (rows.last_s - rows.sent_s) * 1e3
    rows["decode_ms"] = (rows.last_s - rows.first_s) * 1e3  # of tokens - 1 gaps
    common = {
        "ttft_ms": rows.ttft_ms.mean(),
        "e2el_ms": rows.e2el_ms.mean(),
        "output_tokens_per_s": rows.tokens.sum() / trace.duration_s,
    }
    return dict.fromkeys(METRICS) | common | TOOLS[tool](rows)


def vllm(rows: pd.DataFrame) -> dict:
    """TPOT = (E2EL - TTFT) / (n - 1), each request counts once; ITL pools all gaps.

    Source: vllm-project/vllm, vllm/benchmarks/serve.py, `calculate_metrics`.
    """
    gaps = rows.tokens - 1
    return {"tpot_ms": _gap_ms(rows).mean(), "itl_ms": rows.decode_ms.sum() / gaps.sum()}


def aiperf(rows: pd.DataFrame) -> dict:
    """Its inter-token latency is vLLM's TPOT; the run ends with the last response.

    Source: ai-dynamo/aiperf, src/aiperf/metrics/types: inter_token_latency_metric.py,
    max_response_metric.py and min_request_metric.py, whose difference is the duration.
    """
    seconds = rows.last_s.max() - rows.sent_s.min()
    return {"itl_ms": _gap_ms(rows).mean(), "output_tokens_per_s": rows.tokens.sum() / seconds}


def guidellm(rows: pd.DataFrame) -> dict:
    """TPOT = E2EL / n, so the first token is in it; ITL is per request. Both weighted by tokens.

    Its rate over time is not restated here. Source: vllm-project/guidellm,
    src/guidellm/schemas/base/request_stats.py and src/guidellm/benchmark/schemas/metrics.py.
    """
    tpot_ms, itl_ms = rows.e2el_ms.sum() / rows.tokens.sum(), vllm(rows)["itl_ms"]
    return {"tpot_ms": tpot_ms, "itl_ms": itl_ms, "output_tokens_per_s": None}


def ray_llmperf(rows: pd.DataFrame) -> dict:
    """Inter-token latency = E2EL / n: the time to the first token is in it. There is no TPOT.

    Source: ray-project/llmperf, src/llmperf/ray_clients/openai_chat_completions_client.py (sums
    the gaps, TTFT first) and token_benchmark_ray.py (divides by the number of tokens).
    """
    return {"itl_ms": (rows.e2el_ms / rows.tokens).mean()}


def transformers_benchmark(rows: pd.DataFrame) -> dict:
    """The run is one batch: the least TTFT of its rows, one E2EL, tokens as rows × length.

    ITL needs rows of one length. Source: huggingface/transformers,
    benchmark_v2/framework/data_classes.py, `_accumulate_ttft_and_itl` and `get_throughput`.
    """
    start, seconds = rows.sent_s.min(), rows.last_s.max() - rows.sent_s.min()
    return {
        "ttft_ms": (rows.first_s.min() - start) * 1e3,
        "itl_ms": _gap_ms(rows).mean() if rows.tokens.nunique() == 1 else None,
        "e2el_ms": seconds * 1e3,
        "output_tokens_per_s": rows.tokens.max() * len(rows) / seconds,
    }


def _gap_ms(rows: pd.DataFrame) -> pd.Series:
    """The mean gap of each request with two tokens or more."""
    several = rows[rows.tokens > 1]
    return several.decode_ms / (several.tokens - 1)


TOOLS = {
    "vllm": vllm,
    "aiperf": aiperf,
    "guidellm": guidellm,
    "ray-llmperf": ray_llmperf,
    "transformers-benchmark": transformers_benchmark,
}
