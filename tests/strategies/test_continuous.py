"""Continuous batching: the tokens of `sequential`, whatever joins or leaves."""

import random

import pytest

from llmperf import strategies
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import GREEDY, PUBLISHED
from llmperf.decoding.trace import agreement
from llmperf.measure import load
from llmperf.strategies import STRATEGIES


@pytest.fixture(scope="module", autouse=True)
def kept():
    """One inference process for all tests of this file."""
    with strategies.session():
        yield


def work(tiny, n=6, sampling=GREEDY, **how):
    return workload.build(tiny.tokenizer, n, (9, 30, 64), (14, 6), sampling=sampling, **how)


@pytest.mark.parametrize("sampling", [GREEDY, PUBLISHED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", [{}, {"max_batch": 2}, {"loop": "cached"}], ids=str)
def test_tokens_are_those_of_sequential(tiny, options, sampling):
    trace = STRATEGIES["continuous"](tiny, work(tiny, sampling=sampling), options)
    found = agreement(trace, STRATEGIES["sequential"](tiny, work(tiny, sampling=sampling), {}))
    assert (found["agree"], found["total"]) == (6, 6), found
    for r in trace.requests:
        assert r.submitted_s <= r.started_s <= r.token_s[0]
        assert list(r.token_s) == sorted(r.token_s)
    assert trace.notes["loop"] == options.get("loop", trace.notes["loop"])


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_lengths_and_deadlines_change_no_token(tiny, seed):
    dice = random.Random(seed)
    plain = workload.build(
        tiny.tokenizer,
        12,
        tuple(dice.choices(range(1, 90), k=5)),
        tuple(dice.choices(range(1, 20), k=4)),
        sampling=PUBLISHED,
        seed=seed,
    )
    arriving = load.arriving(plain, kind="poisson", rate_per_s=60, seed=seed)
    options = {"max_batch": dice.randint(1, 5)}
    trace = STRATEGIES["continuous"](tiny, arriving, options)
    alone = STRATEGIES["sequential"](tiny, plain, {})
    assert agreement(trace, alone)["agree"] == 12


def test_requests_join_while_others_run(tiny):
    arriving = load.arriving(work(tiny), kind="even", rate_per_s=30)
    trace = STRATEGIES["continuous"](tiny, arriving, {})
    for i, r in enumerate(trace.requests):
        assert r.started_s >= r.submitted_s >= i / 30 - 0.002
    assert agreement(trace, STRATEGIES["sequential"](tiny, work(tiny), {}))["agree"] == 6


def test_recompute_is_refused_by_the_process_in_its_words(tiny):
    with pytest.raises(RuntimeError, match="recompute keeps no keys and values"):
        STRATEGIES["continuous"](tiny, work(tiny), {"loop": "recompute"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"window_s": 0.1}, "no option 'window_s'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tiny, options, says):
    with pytest.raises(ValueError, match=says):
        strategies.check("continuous", tiny, 6, options)
