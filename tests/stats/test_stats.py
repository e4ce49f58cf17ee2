"""The statistics against SciPy, and against what simulation says they must do."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from llmperf import stats
from llmperf.measure import Record

BASE = {"model": "gpt2", "dtype": "fp32", "prompt_tokens": 32, "new_tokens": 16, "level": 1}


def records(values, tokens=64, **condition):
    return [
        Record(
            experiment="x",
            condition=BASE | condition,
            repeat=i,
            metrics={
                "output_tokens_per_s": float(v),
                "ttft_ms": {"median": 1e3 / float(v)},
                "output_tokens": tokens,
                "requests_ok": 4,
            },
        )
        for i, v in enumerate(values)
    ]


def test_mad_agrees_with_scipy():
    x = np.random.default_rng(0).lognormal(size=101)
    mads = [stats.describe(sample)[0]["mad"] for sample in (x, [1, 2, 4, 9], [3.0])]
    assert mads == [scipy_stats.median_abs_deviation(x), 1.5, None]


@pytest.mark.parametrize(("name", "share"), [("p90", 0.9), ("p95", 0.95), ("p99", 0.99)])
def test_a_percentile_needs_two_samples_above_it(name, share):
    """At the floor two samples lie above it with 99 %, one sample earlier they do not."""
    floor = stats.PERCENTILES[name]
    assert scipy_stats.binom.sf(1, floor, 1 - share) >= 0.99
    assert scipy_stats.binom.sf(1, floor - 1, 1 - share) < 0.99
    assert stats.describe([1.0] * floor)[0][name] == 1.0
    found, reason = stats.describe([1.0] * (floor - 1))
    assert found[name] is None and f"{name} needs {floor}" in reason


@pytest.mark.parametrize("n", [5, 7, 12, 30])
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_median_interval_covers(n, sigma):
    samples = np.random.default_rng(n).lognormal(sigma=sigma, size=(1500, n))
    found = [stats.median_interval(row) for row in samples]
    assert 0.90 <= np.mean([f.low <= 1 <= f.high for f in found]) <= 0.99


@pytest.mark.parametrize(("n", "m"), [(5, 5), (7, 7), (5, 20), (30, 30)])
def test_ratio_interval_covers(n, m):
    rng = np.random.default_rng(n + m)
    trials = 2500  # 97.5 % within 0.3: clear of both limits
    a, b = rng.lognormal(math.log(2), 0.8, (trials, n)), rng.lognormal(0, 0.8, (trials, m))
    found = [stats.ratio_interval(x, y) for x, y in zip(a, b, strict=True)]
    assert 0.90 <= np.mean([f.low <= 2 <= f.high for f in found]) <= 0.99


@pytest.mark.parametrize("n", [5, 8, 20])
def test_paired_ratio_covers_and_cancels_what_is_shared(n):
    rng = np.random.default_rng(n)
    shared = rng.lognormal(0, 0.5, (800, n))
    a, b = 1.1 * shared * rng.lognormal(0, 0.02, (800, n)), shared
    found = [stats.ratio_interval(x, y, paired=True) for x, y in zip(a, b, strict=True)]
    assert 0.90 <= np.mean([f.low <= 1.1 <= f.high for f in found]) <= 0.99
    assert found[0].high - found[0].low < 0.15
    loose = stats.ratio_interval(a[0], b[0])
    assert loose.high - loose.low > 5 * (found[0].high - found[0].low)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_samples_have_no_interval(n):
    found = stats.median_interval([2.0] * n)
    assert found.low is None and found.high is None and found.reason
    assert found.value == (2.0 if n else None)
    assert stats.ratio_interval([1.0] * n, [1.0] * 9).reason


@pytest.mark.parametrize(
    "call", [stats.median_interval, stats.describe, lambda x: stats.drift([x])]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_is_not_a_number_is_refused(call, bad):
    with pytest.raises(ValueError, match="sample 1 "):
        call([1.0, bad, 2.0])


def test_bad_options_are_refused():
    x = [1.0] * 6
    for wrong in (
        lambda: stats.ratio_interval(x, [0.0] * 6),
        lambda: stats.ratio_interval(x, x[:5], paired=True),
        lambda: stats.drift([[1.0, -1.0, 2.0]]),
    ):
        with pytest.raises(ValueError):
            wrong()


SIZES = [(1, 6), (1, 12), (2, 3), (2, 7), (3, 8), (4, 12), (7, 3), (12, 5)]  # conditions, rounds


@pytest.mark.parametrize("noise", ["normal", "lognormal", "bursts"])
@pytest.mark.parametrize(("conditions", "rounds"), [(1, 3), *SIZES])
def test_drift_has_one_rate_of_false_alarms(conditions, rounds, noise):
    rng = np.random.default_rng(conditions * rounds)
    size = (1000, conditions, rounds)
    series = {
        "normal": 1 + 0.03 * rng.normal(size=size),
        "lognormal": rng.lognormal(sigma=0.3, size=size),
        "bursts": np.exp(-0.02 * np.abs(rng.standard_t(3, size=size))),
    }[noise]
    assert sum(stats.drift(rows.tolist()) is not None for rows in series) < 60  # 4 % ± 3 sigma


@pytest.mark.parametrize(("conditions", "rounds"), SIZES)
def test_a_drift_of_a_fifth_is_seen(conditions, rounds):
    rng = np.random.default_rng(0)
    noise = np.exp(0.01 * rng.normal(size=(200, conditions, rounds)))
    found = [stats.drift(rows * np.linspace(30, 24, rounds)) for rows in noise]
    assert sum(text is not None for text in found) >= 190


def test_a_drift_is_said_in_percent_and_a_trifle_is_not():
    rng = np.random.default_rng(0)
    x = np.exp(0.001 * rng.normal(size=2000))
    assert stats.drift([x * np.linspace(1, 1.005, 2000)]) is None  # certain, and no matter
    assert stats.drift([x * np.geomspace(1, 1.1, 2000)]).startswith("a trend of +10.0%")
    assert stats.drift([[1.0, 2.0]] * 9) is None and stats.drift([]) is None


@pytest.mark.parametrize("seed", range(5))
def test_twelve_identical_runs_in_two_groups_are_not_told_apart(seed):
    rng = np.random.default_rng(seed)
    runs = 30 * np.exp(0.03 * rng.standard_t(4, size=12))
    verdicts = []
    for _ in range(20):
        a, b = np.split(rng.permutation(runs), 2)
        verdicts.append(stats.compare_speeds(records(a), records(b)).verdict)
    assert verdicts.count("cannot tell") >= 18


def test_a_real_slowdown_of_a_tenth_is_slower():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(50):
        a, b = 30 * np.exp(0.02 * rng.normal(size=(2, 6)))
        verdicts.append(stats.compare_speeds(records(a * 0.9), records(b)).verdict)
        assert stats.compare_speeds(records(b), records(a * 0.9)).verdict != "slower"
    assert verdicts.count("slower") >= 48


def test_a_higher_latency_is_slower():
    fast, slow = records(np.linspace(39, 41, 6)), records(np.linspace(29, 31, 6))
    found = stats.compare_speeds(slow, fast, "ttft_ms.median")
    assert found.verdict == "slower" and found.ratio == pytest.approx(4 / 3, rel=0.01)
    assert stats.compare_speeds(slow, fast).ratio == pytest.approx(3 / 4, rel=0.01)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model": "yi"}, "model"),
        ({"dtype": "bf16"}, "dtype"),
        ({"quantization": "nf4"}, "quantization"),
        ({"weights": "random"}, "weights"),
        ({"prompt_tokens": [32, 64]}, "prompt_tokens"),
        ({"new_tokens": 17}, "new_tokens"),
        ({"tokens": 60}, "output_tokens"),
    ],
)
def test_what_differs_is_refused_by_name(change, key):
    with pytest.raises(ValueError, match=key):
        stats.compare_speeds(records([30] * 6), records([30] * 6, **change))


def test_strategy_and_level_are_what_is_compared():
    found = stats.compare_speeds(records([30] * 6), records([60] * 6, level=8, strategy="batch"))
    assert found.verdict == "slower"


def test_only_records_that_count_are_compared():
    a = records([10] * 3 + [30] * 6)
    a[0] = replace(a[0], kind="warmup")
    a[1] = replace(a[1], status="oom", metrics={})
    a[2] = replace(a[2], prediction={"plausible": False})
    assert stats.compare_speeds(a, records([30] * 6)).ratio == pytest.approx(1)
    found = stats.compare_speeds([], records([30] * 6))
    assert found.verdict == "cannot tell" and found.ratio is None and found.reason


def test_few_repeats_cannot_tell_and_say_so():
    found = stats.compare_speeds(records([10] * 3), records([30] * 3))
    assert found.verdict == "cannot tell" and "needs 5" in found.reason


def of_one_run(rows):
    return [replace(row, run_id="one") for row in rows]


def test_rounds_of_one_run_are_paired():
    common = np.random.default_rng(0).lognormal(3, 0.5, 8)
    a, b = records(common * 0.9 * np.linspace(0.99, 1.01, 8)), records(common)
    said = stats.compare_speeds(a, b).verdict
    assert said == "cannot tell", "no run says that the rounds are the same"
    a, b = of_one_run(a), of_one_run(b)
    assert stats.compare_speeds(a[::-1], b).verdict == "slower"
    assert stats.compare_speeds(a, b, paired=False).verdict == "cannot tell"
    assert stats.compare_speeds(a[:6], b[2:]).verdict == "cannot tell", "other rounds, so no pairs"


def test_pairs_find_a_twentieth_under_drift_more_often():
    rng = np.random.default_rng(1)
    found = {True: 0, False: 0}
    for _ in range(100):
        speeds = 30 * np.linspace(1, 0.9, 12) * np.exp(0.015 * rng.normal(size=(2, 12)))
        a, b = of_one_run(records(speeds[0] * 0.95)), of_one_run(records(speeds[1]))
        for paired in found:
            found[paired] += stats.compare_speeds(a, b, paired=paired).verdict == "slower"
    assert found[True] >= 95 and found[False] < 90


def test_bad_questions_are_refused():
    a = records([30] * 6)
    with pytest.raises(ValueError, match="no rate and no time"):
        stats.compare_speeds(a, a, "output_tokens")
    with pytest.raises(ValueError, match="ttft_ms.median"):
        stats.compare_speeds(a, a, "ttft_ms")
