"""The recommendation against brute force over simulated arrivals, and what it says of its basis."""

import itertools
import random

import numpy as np
import pytest

from llmperf import findings
from llmperf.findings.recommending import name_of
from llmperf.measure import Record
from llmperf.measure.load import arrival_times

SLO = {"ttft_ms": 2000, "tpot_ms": 100}


def rec(strategy, level, ttft, tpot, repeat=0, tokens=8, **more):
    condition = {"strategy": strategy, "level": level, "options": {}, "model": "m",
                 "loop": "cached", "dtype": more.pop("dtype", "fp32"), "device": "cpu",
                 "prompt_tokens": 4, "new_tokens": tokens} | more.pop("asked", {})  # fmt: skip
    seconds = ((ttft or 0) + tpot * (tokens - 1)) / 1e3
    metrics = {"duration_s": seconds, "output_tokens": tokens * level, "requests_ok": level,
               "output_tokens_per_s": tokens * level / seconds, "ttft_ms": {"median": ttft},
               "tpot_ms": {"median": tpot}, "e2el_ms": {"median": seconds * 1e3},
               "queue_delay_ms": {"median": 0.0}}  # fmt: skip
    memory = {"rss": {"unit": "bytes", "max": more.pop("memory", 1.0)}}
    env = {"os": "Linux", "cpu_model": "c", "gpus": []}
    return Record("x", condition, repeat, metrics=metrics, memory=memory, environment=env, **more)


def drawn(seed):
    draw = random.Random(seed)
    kinds = itertools.product(("batch", "threads", "processes", "sequential"), (1, 2, 4, 8))
    return [
        rec(strategy, level, draw.uniform(50, 900), draw.uniform(5, 130), dtype=dtype,
            memory=draw.uniform(1, 9))
        for (strategy, level), dtype in itertools.product(kinds, ("fp32", "bf16"))
        if strategy != "sequential" or level == 1
    ]  # fmt: skip


def share_by_hand(record, load, slo):
    """One queue in front of `servers` that each take `rows` requests; nothing of the kit's code."""
    c, m = record.condition, record.metrics
    rows = c["level"] if c["strategy"] == "batch" else 1
    servers = c["level"] if c["strategy"] in ("threads", "processes") else 1
    first, step = m["ttft_ms"]["median"] / 1e3, m["tpot_ms"]["median"] / 1e3
    whole = first + 7 * step
    n = -(-300 // rows) * rows
    at = arrival_times("poisson", n, rate_per_s=load)
    free, good = [0.0] * servers, 0
    for i in range(0, n, rows):
        group = at[i : i + rows]
        k = int(np.argmin(free))
        start = max(free[k], group[-1])  # a plain batch waits until it is full
        free[k] = start + whole
        good += sum((start + first - t) * 1e3 <= slo["ttft_ms"] for t in group)
    return good / n if step * 1e3 <= slo["tpot_ms"] else 0.0


def recommend(records, *how, **more):
    return findings.recommend(findings.options(records), *how, **more)


def headline(records):
    return findings.headline(findings.options(records))


def name(record):
    return name_of(next(findings.options([record]).itertuples()))


@pytest.mark.parametrize("seed", range(12))
def test_the_chosen_option_is_as_good_as_brute_force_finds(seed):
    records = drawn(seed)
    load = (0.1, 0.5, 2, 5)[seed % 4]
    slo = [SLO, {"ttft_ms": 500, "tpot_ms": 60}][seed % 2]
    found = recommend(records, load, slo)
    shares = {id(r): share_by_hand(r, load, slo) for r in records}
    best = next(r for r in records if found.name == name(r))
    assert found.share == pytest.approx(shares[id(best)], abs=0.02)
    assert (found.machines == 1) == (max(shares.values()) >= 0.9)
    if found.machines == 1:
        assert shares[id(best)] >= 0.88


def test_of_an_option_measured_twice_the_answers_of_nearest_length_count():
    short, long = rec("batch", 4, 20, 5.0, tokens=4), rec("batch", 4, 40, 50.0, tokens=64)
    assert "Extrapolated: the length" not in str(recommend([short, long], 1, SLO, 64))
    assert "from answers of 4 to 5 tokens" in str(recommend([short, long], 1, SLO, 5))


def test_a_rare_load_does_not_get_large_batches():
    found = recommend(RARE, 0.1, SLO)
    assert found.name == name(RARE[0]) and found.machines == 1 and found.share == 1
    alone = recommend(RARE[1:], 0.1, SLO)
    assert alone.machines != 1 and alone.share < 0.2, "nine of ten wait for the batch to fill"


RARE = [rec("sequential", 1, 100, 50), rec("batch", 10, 200, 60)]


def test_a_load_beyond_one_machine_says_how_many():
    found = recommend(RARE[:1], 6.0, SLO)
    assert found.machines > 1, "0.45 s a request: 2.2 a second at the most"
    fewest = next(n for n in range(1, 9) if share_by_hand(RARE[0], 6.0 / n, SLO) >= 0.9)
    assert found.machines == fewest and f"{fewest} would, each with one request" in str(found)
    never = recommend([rec("sequential", 1, 3000, 50)], 0.01, SLO)
    assert never.machines is None and "Nothing here keeps the limits" in str(never)


def test_what_is_extrapolated_is_said():
    found = recommend([rec("batch", 4, 100, 10)], 2, new_tokens=80)
    said = str(found)
    assert "from answers of 8 to 80" in said and "all requests at once" in said
    assert "Rests on 1 run of" in said and ": no interval." in said
    assert found.basis == "1 run: no interval"
    asked = {"arrivals": {"kind": "poisson", "rate_per_s": 4.0}}
    many = [rec("dynamic", 4, 100, 10, i, asked=asked) for i in range(5)]
    enough = recommend(many, 4)
    assert "Extrapolated" not in str(enough) and "no interval" not in str(enough)
    assert enough.basis == "5 runs"


def test_what_was_not_measured_is_not_within_the_limits():
    assert recommend([rec("batch", 1, None, 10)], 1).machines is None


def test_impossible_runs_are_not_recommended_and_unstable_ones_say_so():
    false = rec("batch", 1, 1, 1, prediction={"plausible": False})
    busy = rec("threads", 2, 100, 10, warnings=["unstable: busy"])
    found = recommend([false, busy], 1)
    assert found.name == name(busy) and "Not quiet: unstable: busy" in str(found)


def test_another_engine_is_never_recommended():
    ours = [rec("batch", 1, 200, 50, repeat=i) for i in range(5)]
    faster = [rec("peer", 1, 2, 1, repeat=i) for i in range(5)]
    assert set(findings.options(ours + faster).variant) == {"batch"}


def test_a_server_groups_what_waits_and_does_not_wait_until_it_is_full():
    options = {"options": {"max_batch": 8}}
    served = rec("dynamic", 8, 100, 10, asked=options)
    assert recommend([served], 1.0).share > 0.9
    assert recommend([rec("batch", 8, 100, 10)], 1.0).share < 0.9


def test_rounded_weights_are_said_where_exact_ones_were_measured():
    exact = rec("batch", 1, 100, 10)
    rounded = rec("batch", 1, 50, 5, asked={"quantization": "int4"})
    assert "rounded to int4, so its answers differ from those of fp32" in str(
        recommend([exact, rounded], 1)
    )
    assert "rounded" not in str(recommend([exact], 1)) + str(recommend([rounded], 1))


def test_bad_input():
    with pytest.raises(ValueError, match="no record has a speed"):
        recommend([], 1)
    with pytest.raises(ValueError, match="must be above 0"):
        recommend([rec("batch", 1, 1, 1)], 0)


def test_one_at_a_time_is_the_option_of_median_speed():
    rows = [rec("batch", 4, 100, 100), rec("sequential", 1, 100, 100), rec("batch", 1, 100, 50)]
    rows += [
        rec("threads", 1, 100, 25),
        rec("sequential", 1, 900, 900, tokens=4),
    ]  # of other lengths
    assert "8.0 times one request" not in headline(rows) and "2.2 times one request" in headline(
        rows
    )


def test_headline():
    assert "Nothing was measured" in headline([])
    rows = [rec("sequential", 1, 100, 100), rec("batch", 4, 100, 100)]
    assert headline(rows[:1]).endswith("tokens/s.")
    text = headline(rows)
    assert text.startswith("Batches of 4, fp32: the most") and "4.0 times one request" in text


def test_the_ceilings_of_an_option_are_those_of_its_median_round():
    bandwidths = (60e9, 34e9, 33e9)  # neighbours of a virtual machine come and go
    runs = [
        rec("sequential", 1, 90, 9, i, prediction={"read_bytes_per_s": b, "flops_per_s": None})
        for i, b in enumerate(bandwidths)
    ]
    (option,) = findings.options(runs).itertuples()
    assert option.read_bytes_per_s == 34e9 and np.isnan(option.flops_per_s)
