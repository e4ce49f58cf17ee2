"""The recommendation against brute force over the records, and what it says of its grounds."""

import itertools
import random

import pytest

from llmperf.findings import verdict
from llmperf.findings.verdict import Option, choose


def rec(strategy, level, seconds, ttft, tpot, repeat=0, **more):
    return {
        "condition": {"strategy": strategy, "level": level, "options": {}, "model": "m",
                      "dtype": more.pop("dtype", "fp32"), "device": "cpu", "prompt_tokens": 4,
                      "new_tokens": 8},
        "repeat": repeat,
        "environment": {"os": "Linux", "cpu_model": "c", "gpus": []},
        "metrics": {
            "duration_s": seconds, "output_tokens": 8 * level, "requests_ok": level,
            "requests_per_s": level / seconds, "output_tokens_per_s": 8 * level / seconds,
            "ttft_ms": {"median": ttft}, "tpot_ms": {"median": tpot}, "e2el_ms": {"median": 1.0},
        },
        "memory": {"rss": {"max": more.pop("memory", 1.0)}},
        **more,
    }  # fmt: skip


def drawn(seed):
    draw = random.Random(seed)
    kinds = itertools.product(("batch", "threads", "processes", "sequential"), (1, 2, 4, 8))
    return [
        rec(strategy, level, draw.uniform(0.5, 4), draw.uniform(100, 4000), draw.uniform(10, 300),
            repeat, dtype=dtype, memory=draw.uniform(1, 9))
        for (strategy, level), dtype, repeat in itertools.product(kinds, ("fp32", "bf16"), range(3))
    ]  # fmt: skip


def brute_force(records, load, slo, room):
    """Every condition, one after another, with nothing shared with the code under test."""
    best = None
    for strategy in ("batch", "threads", "processes", "sequential"):
        for level in (1, 2, 4, 8):
            for dtype in ("fp32", "bf16"):
                own = [r for r in records if (r["condition"]["strategy"], r["condition"]["level"],
                       r["condition"]["dtype"]) == (strategy, level, dtype)]  # fmt: skip
                middle = {}
                for key in ("requests_per_s", "ttft_ms", "tpot_ms"):
                    got = [r["metrics"][key] for r in own]
                    middle[key] = sorted(g["median"] if isinstance(g, dict) else g for g in got)[1]
                fine = all(middle[k] <= v for k, v in slo.items())
                fine = fine and max(r["memory"]["rss"]["max"] for r in own) <= room
                rate = middle["requests_per_s"]
                mark = (2 if fine and rate >= load else 1 if fine else 0, rate)
                if best is None or mark > best[0]:
                    best = (mark, (strategy, level, dtype))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_recommendation_is_that_of_brute_force(seed):
    records = drawn(seed)
    load, room = (0.5, 2, 5, 30)[seed % 4], (9, 4, 2.5)[seed % 3]
    slo = [{"ttft_ms": 2000, "tpot_ms": 100}, {"ttft_ms": 500, "tpot_ms": 30}][seed % 2]
    found = verdict.recommend(records, load, slo, memory_bytes=room)
    (mark, rate), wanted = brute_force(records, load, slo, room)
    assert (found.option.strategy, found.option.level, found.option.dtype) == wanted
    assert found.keeps == (mark == 2) and found.option.requests_per_s == pytest.approx(rate)
    assert found.machines == -(-load // rate)


def test_what_is_extrapolated_is_said():
    found = verdict.recommend([rec("batch", 4, 1, 100, 10)], 2, new_tokens=80)
    said = " ".join(found.extrapolated)
    assert "from answers of 8 to 80" in said and "all at once" in said and "no interval" in said
    assert not found.keeps and found.machines == 5  # 32 tokens/s are 0.4 answers of 80
    many = [rec("dynamic", 4, 1, 100, 10, i) for i in range(5)]
    for row in many:
        row["condition"]["arrivals"] = {"kind": "poisson", "rate_per_s": 4.0}
    found = verdict.recommend(many, 2)
    assert found.keeps and "5 runs" in found.rests_on and "4 arriving/s" in found.rests_on
    assert len(found.extrapolated) == 1 and "may carry more" in found.extrapolated[0]


def test_what_is_not_measured_is_not_within_the_limits():
    lacking = rec("batch", 4, 1, None, 10)
    assert not verdict.recommend([lacking], 1).keeps
    assert "TTFT not measured" in verdict.recommend([lacking], 1).why


def test_impossible_runs_are_not_recommended_and_unstable_ones_say_so():
    false = rec("batch", 8, 0.001, 1, 1, prediction={"plausible": False})
    busy = rec("threads", 2, 1, 100, 10, warnings=["unstable: busy"])
    found = verdict.recommend([false, busy], 1)
    assert found.option.strategy == "threads" and "Not quiet: unstable: busy" in found.rests_on


def test_another_engine_is_never_recommended():
    ours = [rec("batch", 4, 2.0, 200, 50, repeat=i) for i in range(5)]
    faster = [rec("peer", 4, 0.1, 2, 1, repeat=i) for i in range(5)]
    assert {o.strategy for o in verdict.options(ours + faster)} == {"batch"}


def test_bad_input():
    with pytest.raises(ValueError, match="no record of yi"):
        verdict.recommend([rec("batch", 1, 1, 1, 1)], 1, model="yi")
    with pytest.raises(ValueError, match="must be above 0"):
        verdict.recommend([rec("batch", 1, 1, 1, 1)], 0)


def test_another_card_is_all_extrapolation():
    found = verdict.predicted("yi-6b-chat", "RTX 4090", new_tokens=256)
    assert [o.level for o in found] == sorted(o.level for o in found) and len(found) > 3
    # A step reads 2 bytes of each weight but the embedding at 1,008 GB/s, and a small cache.
    step_ms = 2 * (6.061e9 - 64_000 * 4096) / 1008e9 * 1e3
    assert found[0].tpot_ms == pytest.approx(step_ms, rel=0.02)
    assert all(o.memory_bytes <= 24.1 * 2**30 for o in found)
    chosen = choose(found, 1.0)
    assert (
        chosen.keeps and "data sheet" in chosen.rests_on and "all of it" in chosen.extrapolated[0]
    )
    with pytest.raises(ValueError, match="does not fit"):
        verdict.predicted("yi-34b-chat", "RTX A2000 Laptop 4GB")


def test_names():
    def named(strategy, level):
        values = (1, 1, 1, 1, 1, 1, None, "fp32", 8, 1)
        return Option(strategy, level, "s", *values).name

    assert named("batch", 8) == "batches of 8, fp32"
    assert named("threads stream=own", 2) == "2 threads (stream=own), fp32"
