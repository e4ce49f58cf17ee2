"""Arrivals have the rate and the law they say; the sweep and the queue agree with arithmetic."""

import math

import numpy as np
import pytest

from llmperf import strategies
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.sampling import GREEDY
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import Condition, capacity, load, measure, metrics, records


def requests(n, new=1):
    return Workload(tuple(Request(i, (1,), new) for i in range(n)))


# Arrivals.


@pytest.mark.parametrize(("kind", "cv"), [("poisson", 1), ("even", 0)])
def test_arrivals_have_their_rate_and_variation(kind, cv):
    times = load.arrival_times(kind, 40_000, 5.0, seed=3)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all()
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, abs=0.06)


def test_arrivals_repeat_with_their_seed_and_stretch_with_the_rate():
    slow = load.arrival_times("poisson", 50, 1.0, seed=1)
    assert (slow == load.arrival_times("poisson", 50, 1.0, seed=1)).all()
    assert not np.allclose(slow, load.arrival_times("poisson", 50, 1.0, seed=2))
    assert load.arrival_times("poisson", 50, 4.0, seed=1) == pytest.approx(slow / 4)


def test_a_short_load_has_the_rate_that_it_is_named_by():
    for seed in range(5):
        assert load.arrival_times("poisson", 41, 8.0, seed=seed)[-1] == pytest.approx(5.0)
    assert load.arrival_times("poisson", 1, 8.0).tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "often"}, "choose poisson"),
        ({"kind": "poisson", "rate_per_s": 0}, "rate_per_s"),
        ({"kind": "poisson", "rate_per_s": math.nan}, "rate_per_s"),
    ],
)
def test_arrivals_that_cannot_be_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        load.arriving(requests(3), **options)


# Every strategy under arriving load.


@pytest.mark.parametrize(
    ("strategy", "options"), [("sequential", {}), ("threads", {"workers": 2}), ("dynamic", {})]
)
def test_no_request_starts_before_it_is_scheduled(tiny, strategy, options):
    work = workload.build(tiny.tokenizer, 5, 8, 4, sampling=GREEDY)
    work = load.arriving(work, kind="even", rate_per_s=20)
    trace = strategies.STRATEGIES[strategy](tiny, work, options)
    for i, r in enumerate(trace.requests):
        assert r.scheduled_s == pytest.approx(i / 20)
        assert r.scheduled_s - 0.002 <= r.started_s <= r.token_s[0]
        assert r.submitted_s >= r.scheduled_s - 0.002
    assert trace.duration_s > 0.2


def test_a_measured_load_is_scored_from_its_schedule_and_compared_with_sequential(tiny, tmp_path):
    slo = {"ttft_ms": 60_000}
    arrivals = {"kind": "poisson", "rate_per_s": 50, "seed": 1}
    conditions = [
        Condition(tiny, name, 5, prompt_tokens=8, new_tokens=5, arrivals=arrivals, slo=slo)
        for name in ("sequential", "threads")
    ]
    store = records.Store(tmp_path / "records.jsonl")
    found = measure("load", conditions, store, repeats=1).records
    counted = [r for r in found if r.kind == "measure"]
    assert [r.status for r in counted] == ["ok", "ok"]
    for record in counted:
        assert record.metrics["clock"] == "scheduled" and record.metrics["goodput_per_s"] > 0
        assert record.condition["arrivals"] == arrivals
        assert record.agreement["agree"] == record.agreement["total"] == 4
    assert len([r for r in store.read() if r.kind == "reference"]) == 1


# The highest rate.


def queue(rate, seed, n=400, service_s=0.1):
    """One server, exact: M/D/1, by Lindley's recursion."""
    arrivals = load.arrival_times("poisson", n, rate, seed=seed)
    free, rows = 0.0, []
    for i, at in enumerate(arrivals):
        start = max(at, free)
        free = start + service_s
        rows.append(RequestTrace(i, 1, at, at, start, (free,), (1,)))
    return Trace(tuple(rows), free)


def test_bisection_finds_the_rate_at_which_a_queue_misses_its_limit():
    slo = {"ttft_ms": 500}
    found = load.highest_rate(queue_long, slo, 1.0, 20.0, steps=7)
    exact = [r for r in np.arange(5, 10, 0.05) if attained(r, 0.5) >= 0.9][-1]
    assert found.holds_per_s == pytest.approx(exact, rel=0.1)
    assert 1 < found.misses_per_s / found.holds_per_s < 1.03
    assert len(found.probes) == 9


def queue_long(rate, seed):
    return queue(rate, seed, n=2_000)


def attained(rate, limit_s, service_s=0.1, n=50_000):
    """The share answered in time, by the same recursion in closed form (a running maximum)."""
    arrivals = load.arrival_times("poisson", n, rate, seed=99)
    ahead = service_s * np.arange(n)
    waits = np.maximum.accumulate(arrivals - ahead) + ahead - arrivals
    return np.mean(waits + service_s <= limit_s)


def test_one_disturbed_run_of_the_lowest_rate_does_not_end_the_search():
    seen = []

    def disturbed_once(rate, seed):
        seen.append((rate, seed))
        return queue(rate, seed, service_s=9.0 if len(seen) == 1 else 0.1)

    found = load.highest_rate(disturbed_once, {"ttft_ms": 60_000}, 1.0, 5.0)
    assert (found.holds_per_s, found.misses_per_s) == (5.0, None)
    assert [rate for rate, _ in seen] == [1.0, 1.0, 5.0] and seen[0][1] != seen[1][1]


def test_a_limit_that_never_or_always_holds_says_so():
    never = load.highest_rate(queue, {"ttft_ms": 50}, 1.0, 5.0)
    assert (never.holds_per_s, never.misses_per_s) == (None, 1.0)
    always = load.highest_rate(queue, {"ttft_ms": 60_000}, 1.0, 5.0)
    assert (always.holds_per_s, always.misses_per_s) == (5.0, None)
    with pytest.raises(ValueError, match="lower first"):
        load.highest_rate(queue, {"ttft_ms": 50}, 5.0, 1.0)


def test_a_request_without_an_answer_misses_its_limit():
    rows = (
        RequestTrace(0, 1, 0.0, 0.0, 0.0, (0.1,), (1,)),
        RequestTrace(1, 1, 0.0, 0.0, status="rejected"),
    )
    assert load.probe(1.0, Trace(rows, 1.0), {"ttft_ms": 500}).attained == 0.5


# Capacity.

FLAT = capacity.Curve((1, 4), (0.1, 0.1), (0.05, 0.05))


def test_one_card_without_batching_is_the_textbook_queue():
    work = load.arriving(requests(2_000), "poisson", rate_per_s=7.0, seed=5)
    trace = capacity.simulate(work, FLAT, max_batch=1, window_s=0)
    mine = [r.started_s for r in trace.requests]
    assert mine == pytest.approx([r.started_s for r in queue(7.0, 5, n=2_000).requests])
    waits = [r.started_s - r.scheduled_s for r in trace.requests]
    pollaczek_khinchine = 0.7 * 0.1 / (2 * (1 - 0.7))
    assert np.mean(waits) == pytest.approx(pollaczek_khinchine, rel=0.25)


def test_batches_fill_to_their_limit_and_the_longest_row_holds_the_card():
    work = Workload(tuple(Request(i, (1,), n) for i, n in enumerate([3, 1, 1, 1, 1])))
    trace = capacity.simulate(work, FLAT, max_batch=4, window_s=0.01)
    starts = [r.started_s for r in trace.requests]
    assert starts == pytest.approx([0, 0, 0, 0, 0.2])  # full at once; then 0.1 + 2 x 0.05
    assert trace.requests[0].token_s == pytest.approx((0.1, 0.15, 0.2))
    lone = capacity.simulate(requests(1), FLAT, max_batch=4, window_s=0.01)
    assert lone.requests[0].started_s == pytest.approx(0.01)  # it waited the window
    metrics.summarize(trace)  # a Trace as any other


def test_with_continuous_batching_a_request_joins_at_the_next_step():
    work = Workload((Request(0, (1,), 4), Request(1, (1,), 2, arrival_s=0.12)))
    trace = capacity.simulate(work, FLAT, max_batch=4, joins=True)
    first, second = trace.requests
    assert first.token_s == pytest.approx((0.1, 0.15, 0.3, 0.35))  # a step of 0.05 + 0.1 of prompt
    assert second.started_s == pytest.approx(0.15)
    assert second.token_s == pytest.approx((0.3, 0.35))
    full = capacity.simulate(work, FLAT, max_batch=1, joins=True)
    assert full.requests[1].started_s == pytest.approx(0.25)


def test_another_policy_replaces_that_of_the_server():
    work = Workload((Request(0, (1,), 1), Request(1, (1,), 1, arrival_s=0.05)))
    how = {"max_batch": 2, "window_s": 1.0}
    for decide, starts in (
        (capacity.start_or_wait, [0.05, 0.05]),  # full
        (lambda *_: "start", [0.0, 0.1]),
        (lambda arrived, now, *_: "start" if now - arrived[0] >= 1.0 else "wait", [1.0, 1.0]),
    ):
        trace = capacity.simulate(work, FLAT, decide=decide, **how)
        assert [r.started_s for r in trace.requests] == pytest.approx(starts)
    with pytest.raises(ValueError, match="the policy never starts 2 of 2 requests"):
        capacity.simulate(work, FLAT, decide=lambda *_: "wait", **how)


def test_more_cards_carry_more_and_the_fewest_that_hold_are_found():
    work = load.arriving(requests(1_000), "poisson", rate_per_s=30.0, seed=2)
    slo = {"ttft_ms": 400}
    needed = capacity.cards_needed(work, FLAT, slo, max_batch=1)
    assert needed == 4  # 30/s at 10/s a card need more than 3

    def share(cards):
        trace = capacity.simulate(work, FLAT, cards=cards, max_batch=1)
        return load.probe(30.0, trace, slo).attained

    assert share(needed - 1) < 0.9 <= share(needed)
    assert capacity.cards_needed(work, FLAT, {"ttft_ms": 1}, most=3) is None


def test_a_curve_comes_from_batches_and_is_drawn_on_beyond_them():
    def batch(n):
        times = tuple(1 + 0.1 * n + 0.02 * n * k for k in range(4))
        return Trace(tuple(RequestTrace(i, 1, 0, 0, 1.0, times, (1,) * 4) for i in range(n)), 3.0)

    curve = capacity.Curve.of([batch(1), batch(3), batch(3)])
    assert curve.rows == (1, 3)
    assert curve.batch_s(2) == pytest.approx((0.2, 0.04))
    assert curve.batch_s(6) == pytest.approx((0.6, 0.12))
