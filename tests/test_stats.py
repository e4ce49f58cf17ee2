"""The statistics against SciPy, and against what simulation says they must do."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from llmperf import stats
from llmperf.stats.intervals import bootstrap_medians

BASE = {"model": "gpt2", "dtype": "fp32", "prompt_tokens": 32, "new_tokens": 16, "level": 1}


def records(values, warnings=(), tokens=64, **condition):
    return [
        {
            "kind": "measure",
            "status": "ok",
            "repeat": i,
            "condition": BASE | condition,
            "warnings": list(warnings),
            "metrics": {
                "output_tokens_per_s": float(v),
                "ttft_ms": {"median": 1e3 / float(v)},
                "output_tokens": tokens,
                "requests_ok": 4,
            },
        }
        for i, v in enumerate(values)
    ]


def test_mad_agrees_with_scipy():
    x = np.random.default_rng(0).lognormal(size=101)
    assert stats.mad(x) == scipy_stats.median_abs_deviation(x)
    assert stats.mad([1, 2, 4, 9]) == 1.5 and stats.mad([3.0]) is None


@pytest.mark.parametrize("n", [7, 8, 41, 200])
def test_bootstrap_agrees_with_scipy(n):
    x = np.random.default_rng(n).lognormal(size=n)
    ours = stats.median_interval(x, method="bootstrap")
    theirs = scipy_stats.bootstrap((x,), np.median, method="percentile", rng=1).confidence_interval
    between = np.sort(x)  # the two may fall on neighbouring order statistics
    gap = np.diff(between).max() if n < 100 else 0.05
    assert ours.low == pytest.approx(theirs.low, abs=gap)
    assert ours.high == pytest.approx(theirs.high, abs=gap)


@pytest.mark.parametrize("n", [5, 6, 31, 32])
def test_shortcut_bootstrap_has_the_law_of_resampling(n):
    rng = np.random.default_rng(n)
    x = np.sort(rng.lognormal(size=n))
    drawn = np.median(rng.choice(x, (20_000, n)), axis=1)
    quick = bootstrap_medians(x, np.random.default_rng(1), 20_000)
    at = np.unique(np.concatenate([drawn, quick]))
    cdf = [np.searchsorted(np.sort(m), at, side="right") / len(m) for m in (drawn, quick)]
    assert np.abs(cdf[0] - cdf[1]).max() < 0.02


def test_bootstrap_repeats_with_its_seed():
    x = np.random.default_rng(0).lognormal(size=30)
    one, two = (stats.median_interval(x, method="bootstrap", seed=4) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("n", [5, 7, 12, 30])
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_median_interval_covers(n, sigma):
    samples = np.random.default_rng(n).lognormal(sigma=sigma, size=(1500, n))
    found = [stats.median_interval(row) for row in samples]
    assert 0.90 <= np.mean([f.low <= 1 <= f.high for f in found]) <= 0.99


@pytest.mark.parametrize("method", ["order", "bootstrap"])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (7, 7), (5, 20), (30, 30)])
def test_ratio_interval_covers(n, m, method):
    rng = np.random.default_rng(n + m)
    trials = 500 if method == "bootstrap" else 2500  # 97.5 % within 0.3: clear of both limits
    a, b = rng.lognormal(math.log(2), 0.8, (trials, n)), rng.lognormal(0, 0.8, (trials, m))
    found = [stats.ratio_interval(x, y, method=method) for x, y in zip(a, b, strict=True)]
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
    found = stats.spread([2.0] * n)
    assert found["low"] is None and found["high"] is None and found["reason"]
    assert found["median"] == (2.0 if n else None)
    assert stats.ratio_interval([1.0] * n, [1.0] * 9).reason


def test_spread_of_five():
    found = stats.spread([1.0, 2.0, 3.0, 4.0, 10.0])
    assert found == {"n": 5, "median": 3, "mad": 1, "low": 1, "high": 10, "reason": None}


@pytest.mark.parametrize("call", [stats.spread, stats.mad, stats.describe, stats.drift])
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_is_not_a_number_is_refused(call, bad):
    with pytest.raises(ValueError, match="sample 1 "):
        call([1.0, bad, 2.0])


def test_bad_options_are_refused():
    x = [1.0] * 6
    for wrong in (
        lambda: stats.median_interval(x, confidence=95),
        lambda: stats.median_interval(x, method="magic"),
        lambda: stats.ratio_interval(x, [0.0] * 6),
        lambda: stats.ratio_interval(x, x[:5], paired=True),
        lambda: stats.narrow_enough(x, 0),
        lambda: stats.drift(x, [1.0]),
    ):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("noise", ["normal", "lognormal"])
@pytest.mark.parametrize("n", [8, 20, 100])
def test_drift_seldom_cries_wolf(n, noise):
    rng = np.random.default_rng(n)
    series = 1 + 0.05 * rng.normal(size=(1000, n))
    if noise == "lognormal":
        series = rng.lognormal(sigma=0.5, size=(1000, n))
    assert sum(stats.drift(row) is not None for row in series) < 50


def test_drift_sees_a_slowed_second_half_in_any_order():
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(100):
        x = 1 + 0.03 * rng.normal(size=20)
        x[10:] *= 1.1
        shuffled = rng.permutation(20)
        seen += stats.drift(x[shuffled], shuffled.astype(float)) is not None
    assert seen >= 98


def test_drift_ignores_what_does_not_matter_and_says_what_does():
    rng = np.random.default_rng(0)
    x = 1 + 0.001 * rng.normal(size=2000)
    x[1000:] *= 1.002  # certain, and of no account
    assert stats.drift(x) is None
    x[1000:] *= 1.1
    assert "+10.2%" in stats.drift(x)
    assert stats.drift([1.0, 2.0] * 3) is None  # too few to show any


@pytest.mark.parametrize(("sigma", "width"), [(0.05, 0.05), (0.1, 0.1), (0.3, 0.2)])
def test_sequential_stop_does_not_bias_the_median(sigma, width):
    rng = np.random.default_rng(3)
    medians, stopped = [], 0
    for _ in range(1000):
        x = np.exp(sigma * rng.normal(size=50))
        n = next((n for n in range(5, 50) if stats.narrow_enough(x[:n], width)), 50)
        stopped += n < 50
        medians.append(np.median(x[:n]))
    assert stopped > 500
    assert abs(np.mean(medians) - 1) < 0.01 and abs(np.median(medians) - 1) < 0.01


def test_narrow_enough_waits_for_a_few():
    assert not stats.narrow_enough([1.0] * 7, 0.05)
    assert stats.narrow_enough([1.0] * 8, 0.05)
    assert not stats.narrow_enough([], 0.05)
    assert not stats.narrow_enough([1.0, 2.0] * 4, 0.05)


@pytest.mark.parametrize("seed", range(5))
def test_twelve_identical_runs_in_two_groups_are_not_told_apart(seed):
    rng = np.random.default_rng(seed)
    runs = 30 * np.exp(0.03 * rng.standard_t(4, size=12))
    verdicts = []
    for _ in range(20):
        a, b = np.split(rng.permutation(runs), 2)
        verdicts.append(stats.compare(records(a), records(b)).verdict)
    assert verdicts.count("cannot tell") >= 18


def test_a_real_slowdown_of_a_tenth_is_slower():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(50):
        a, b = 30 * np.exp(0.02 * rng.normal(size=(2, 6)))
        verdicts.append(stats.compare(records(a * 0.9), records(b)).verdict)
        assert stats.compare(records(b), records(a * 0.9)).verdict != "slower"
    assert verdicts.count("slower") >= 48


def test_a_higher_latency_is_slower():
    fast, slow = records(np.linspace(39, 41, 6)), records(np.linspace(29, 31, 6))
    found = stats.compare(slow, fast, "ttft_ms.median")
    assert found.verdict == "slower" and found.ratio == pytest.approx(4 / 3, rel=0.01)
    assert stats.compare(slow, fast).ratio == pytest.approx(3 / 4, rel=0.01)
    assert str(found).startswith("slower: ttft_ms.median 1.33")


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
def test_what_differs_is_refused_by_name_unless_allowed(change, key):
    a, b = records([30] * 6), records([30] * 6, **change)
    with pytest.raises(stats.Incomparable, match=key) as refused:
        stats.compare(a, b)
    assert isinstance(refused.value, ValueError) and list(refused.value.differs) == [key]
    assert stats.compare(a, b, allow=(key,)).verdict == "cannot tell"


def test_strategy_and_level_are_what_is_compared():
    found = stats.compare(records([30] * 6), records([60] * 6, level=8, strategy="batch"))
    assert found.verdict == "slower"


def test_records_that_warn_are_mentioned():
    a = records([30] * 6)
    a[0]["warnings"] = ["unstable: machine busy"]
    a[1]["prediction"] = {"plausible": False, "why": "MBU 1.4"}
    notes = stats.compare(a, records([30] * 6)).notes
    assert any("1 of 6" in n and "machine busy" in n for n in notes)
    assert any("implausible: MBU 1.4" in n for n in notes)


def test_only_measured_ok_records_count():
    a = records([30] * 8)
    a[0] |= {"kind": "warmup"}
    a[1] |= {"status": "oom", "metrics": {}}
    assert stats.compare(a, records([30] * 6)).n == (6, 6)
    found = stats.compare([], records([30] * 6))
    assert found.verdict == "cannot tell" and found.ratio is None and found.notes


def test_few_repeats_cannot_tell_and_say_so():
    found = stats.compare(records([10] * 3), records([30] * 3))
    assert found.verdict == "cannot tell" and "needs 5" in found.notes[0]


def test_pairs_go_by_repeat():
    shared = np.random.default_rng(0).lognormal(3, 0.5, 8)
    a, b = records(shared * 0.9 * np.linspace(0.99, 1.01, 8)), records(shared)
    assert stats.compare(a[::-1], b, paired=True).verdict == "slower"
    assert stats.compare(a, b).verdict == "cannot tell"


def test_bad_questions_are_refused():
    a = records([30] * 6)
    with pytest.raises(ValueError, match="higher_is_better"):
        stats.compare(a, a, "output_tokens")
    with pytest.raises(ValueError, match="ttft_ms.median"):
        stats.compare(a, a, "ttft_ms")
    with pytest.raises(ValueError, match="allow"):
        stats.compare(a, a, allow=("level",))
