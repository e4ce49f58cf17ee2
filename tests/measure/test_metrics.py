"""Metrics on made-up timestamps, worked out by hand."""

import json
import math

import pytest

from llmperf import stats
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import Condition, metrics
from llmperf.show import other_tools


def request(id=0, tokens=(0.5, 0.6, 0.8), sent=0.1, started=0.2, scheduled=0.0, status="ok"):
    numbers = tuple(range(len(tokens)))
    return RequestTrace(
        id,
        5,
        scheduled,
        sent,
        started,
        tuple(tokens),
        numbers,
        status,
        None if status == "ok" else "x",
    )


def trace(*requests, duration=1.0):
    return Trace(tuple(requests), duration)


TWO = trace(request(0), request(1, (0.3, 0.4), sent=0.2, scheduled=0.2), duration=2.0)


def test_one_request_by_hand():
    (row,) = metrics.per_request(trace(request()))
    assert row["ttft_ms"] == pytest.approx(400)
    assert row["tpot_ms"] == pytest.approx(150)  # (800 - 500) / 2
    assert row["e2el_ms"] == pytest.approx(700)
    assert row["queue_delay_ms"] == pytest.approx(100)
    assert row["output_tokens"] == 3 and row["reasons"] == {}


def test_scheduled_clock_shows_the_wait_before_the_send():
    (row,) = metrics.per_request(trace(request()), clock="scheduled")
    assert row["ttft_ms"] == pytest.approx(500)
    assert row["e2el_ms"] == pytest.approx(800)
    assert row["queue_delay_ms"] == pytest.approx(200)
    assert row["tpot_ms"] == pytest.approx(150)  # no start in it


def test_a_send_ahead_of_its_schedule_is_timed_from_the_send():
    early = request(scheduled=0.15)
    (row,) = metrics.per_request(trace(early), clock="scheduled")
    assert row["ttft_ms"] == pytest.approx(400)


def test_summary_by_hand():
    found = metrics.summarize(TWO)
    assert found["ttft_ms"]["median"] == pytest.approx((400 + 100) / 2)
    assert found["ttft_ms"]["mad"] == pytest.approx(150)
    assert found["tpot_ms"]["median"] == pytest.approx((150 + 100) / 2)
    assert found["itl_ms"]["n"] == 3  # 100, 200 and 100 ms, pooled; the first tokens are not in
    assert found["itl_ms"]["median"] == pytest.approx(100)
    assert found["output_tokens_per_s"] == pytest.approx(5 / 2)
    assert found["requests_per_s"] == pytest.approx(1.0)


def test_summary_is_json():
    assert json.loads(json.dumps(metrics.summarize(TWO))) == metrics.summarize(TWO)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ({"ttft_ms": 400.1}, 2),
        ({"ttft_ms": 399}, 1),
        ({"ttft_ms": 500, "tpot_ms": 120}, 1),
        ({"e2el_ms": 10}, 0),
    ],
)
def test_goodput_needs_every_limit(slo, good):
    assert metrics.summarize(TWO, slo)["goodput_per_s"] == pytest.approx(good / 2.0)


def test_goodput_leaves_failed_requests_out_and_one_token_in():
    run = trace(request(0, (0.5,)), request(1, status="error"), duration=1.0)
    assert metrics.summarize(run, {"tpot_ms": 1})["goodput_per_s"] == 1.0
    assert metrics.summarize(run)["goodput_per_s"] is None


@pytest.mark.parametrize("n", [1, 2, 63, 64, 661, 662])
def test_percentiles_only_where_the_sample_carries_them(n):
    found = metrics.summarize(trace(*(request(i) for i in range(n))))
    for key, least in stats.PERCENTILES.items():
        assert (found["ttft_ms"][key] is not None) == (n >= least)
    assert ("ttft_ms" in found["reasons"]) == (n < 662)


def test_empty_trace_gives_none_with_reasons():
    found = metrics.summarize(trace(duration=0.0))
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "queue_delay_ms"):
        assert found[name]["median"] is None and found["reasons"][name]
    for name in ("output_tokens_per_s", "requests_per_s"):
        assert found[name] is None and found["reasons"][name]


def test_every_none_has_its_reason():
    runs = [trace(duration=0.0), trace(request(0, (0.5,))), TWO, trace(request(status="error"))]
    for found in map(metrics.summarize, runs):
        for name, value in found.items():
            empty = value is None or (isinstance(value, dict) and None in value.values())
            if empty and name not in ("slo", "reasons"):
                assert found["reasons"][name], name


def test_one_token_has_no_tpot():
    found = metrics.summarize(trace(request(tokens=(0.5,))))
    assert found["tpot_ms"]["median"] is None and "second" in found["reasons"]["tpot_ms"]
    assert found["itl_ms"]["n"] == 0 and found["ttft_ms"]["median"] == pytest.approx(400)


def test_failed_request_among_good_ones_is_counted_not_timed():
    slow = request(1, (0.9, 0.95, 0.97, 0.99), status="error")
    found = metrics.summarize(trace(request(0), slow))
    assert (found["requests_ok"], found["requests_failed"]) == (1, 1)
    assert found["output_tokens"] == 3
    assert found["output_tokens_per_s"] == 3.0
    assert found["ttft_ms"]["n"] == 1 and found["ttft_ms"]["median"] == pytest.approx(400)


def test_all_failed_is_not_zero_throughput():
    found = metrics.summarize(trace(request(status="oom")))
    assert found["output_tokens_per_s"] is None and found["reasons"]["output_tokens_per_s"]


def test_unobserved_start_has_no_queue_delay():
    found = metrics.summarize(trace(request(started=None)))
    assert found["queue_delay_ms"]["median"] is None
    assert "not observed" in found["reasons"]["queue_delay_ms"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (request(tokens=(0.5, 0.4)), "token 1 at 0.4"),
        (request(tokens=(0.05, 0.4), started=None), "token 0"),
        (request(started=0.55), "token 0"),
        (request(started=0.05), "its start"),
        (request(tokens=(0.5, math.nan)), "finite"),
        (request(sent=math.nan), "finite"),
        (request(scheduled=math.inf), "finite"),
        (request(tokens=(0.5, 1.5)), "the run's end at 1.0"),
        (RequestTrace(0, 5, 0.0, 0.1, None, (0.5,), (1, 2)), "one time for each token"),
    ],
)
def test_impossible_times_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        metrics.summarize(trace(request(7), bad))


@pytest.mark.parametrize("duration", [math.nan, -1.0])
def test_impossible_duration_is_refused(duration):
    with pytest.raises(ValueError, match="lasted"):
        metrics.summarize(trace(duration=duration))


def test_rounded_traces_stay_valid():
    exact = trace(request(tokens=(0.50000049, 0.50000051)), duration=0.50000051)
    assert metrics.summarize(Trace.from_dict(exact.to_dict()))["output_tokens"] == 2


@pytest.mark.parametrize(
    "slo", [{"ttft": 1}, {"ttft_ms": 0}, {"ttft_ms": math.nan}, {"ttft_ms": "500"}]
)
def test_bad_slo_is_refused(slo, tiny):
    with pytest.raises(ValueError, match="SLO"):
        Condition(tiny, slo=slo)
    with pytest.raises(ValueError, match="SLO"):
        metrics.summarize(TWO, slo)


def test_unknown_clock_is_refused():
    with pytest.raises(ValueError, match="clock"):
        metrics.summarize(TWO, clock="wall")


# Request 0: TTFT 400, E2EL 700, 3 tokens, gaps 100 and 200. Request 1: TTFT 100, E2EL 200,
# 2 tokens, one gap of 100. The run lasts 2 s; first send 0.1 s, last token 0.8 s.
BY_TOOL = {
    "vllm": {"ttft_ms": 250, "tpot_ms": 125, "itl_ms": 400 / 3, "e2el_ms": 450, "rate": 2.5},
    "aiperf": {"ttft_ms": 250, "tpot_ms": None, "itl_ms": 125, "e2el_ms": 450, "rate": 5 / 0.7},
    "guidellm": {
        **{"ttft_ms": 250, "tpot_ms": (700 + 200) / 5, "itl_ms": 400 / 3, "e2el_ms": 450},
        "rate": None,
    },
    "ray-llmperf": {
        **{"ttft_ms": 250, "tpot_ms": None, "itl_ms": (700 / 3 + 100) / 2, "e2el_ms": 450},
        "rate": 2.5,
    },
    "transformers-benchmark": {
        **{"ttft_ms": 200, "tpot_ms": None, "itl_ms": None, "e2el_ms": 700},
        "rate": 6 / 0.7,
    },
}


@pytest.mark.parametrize("tool", BY_TOOL)
def test_score_as_by_hand(tool):
    found = other_tools.score_as(TWO, tool)
    wanted = dict(BY_TOOL[tool])
    wanted["output_tokens_per_s"] = wanted.pop("rate")
    for name, value in wanted.items():
        assert found[name] == (None if value is None else pytest.approx(value)), name


def test_transformers_rules_on_a_rectangle():
    run = trace(request(0, (0.5, 0.6, 0.7)), request(1, (0.4, 0.5, 0.9)), duration=1.0)
    found = other_tools.score_as(run, "transformers-benchmark")
    assert found["itl_ms"] == pytest.approx((100 + 250) / 2)
    assert found["ttft_ms"] == pytest.approx(300)


def test_score_as_leaves_failures_out():
    run = trace(request(0), request(1, (0.9, 0.95), status="error"))
    assert other_tools.score_as(run, "vllm") == other_tools.score_as(trace(request(0)), "vllm")
