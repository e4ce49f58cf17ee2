"""Continuous batching: greedy tokens as sequential, memory within limits, no failure unnoticed."""

from collections import Counter

import pytest
import torch

from llmperf.decoding import requests as workload
from llmperf.decoding.requests import Stop
from llmperf.decoding.sampling import GREEDY, PUBLISHED, Sampling
from llmperf.decoding.trace import agreement
from llmperf.measure import load
from llmperf.strategies import STRATEGIES, sequential


def work(tiny, n=6, sampling=GREEDY, stop=None):
    return workload.build(tiny.tokenizer, n, (9, 30, 64), (14, 6), sampling=sampling, stop=stop)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 2},
        {"max_batch_tokens": 16},  # prompts are split
        {"num_blocks": 5, "page_size": 16},  # room for the longest request alone: others wait
    ],
    ids=["default", "two at a time", "split prompts", "tight memory"],
)
def test_greedy_tokens_are_those_of_sequential(tiny, options):
    trace = STRATEGIES["continuous"](tiny, work(tiny), options)
    found = agreement(trace, sequential.run(tiny, work(tiny), {}))
    assert (found.agree, found.total) == (6, 6), found.first_divergence
    assert trace.notes["failed"] == 0 and trace.notes["tokens_comparable"]
    for r in trace.requests:
        assert r.submitted_s <= r.started_s <= r.token_s[0]
        assert list(r.token_s) == sorted(r.token_s)
    assert trace.notes["num_blocks"] == options.get("num_blocks", trace.notes["num_blocks"])


def test_an_end_token_ends_the_request_as_in_sequential(tiny):
    plain = sequential.run(tiny, work(tiny), {})
    common = Counter(t for r in plain.requests for t in r.tokens[1:]).most_common(1)[0][0]
    stopped = work(tiny, stop=Stop(end_ids=frozenset({common})))
    alone = sequential.run(tiny, stopped, {})
    assert alone.output_tokens < plain.output_tokens
    assert agreement(STRATEGIES["continuous"](tiny, stopped, {}), alone).agree == 6


def test_sampled_tokens_are_its_own_and_the_notes_say_so(tiny):
    trace = STRATEGIES["continuous"](tiny, work(tiny, sampling=PUBLISHED), {})
    assert not trace.notes["tokens_comparable"]
    assert [len(r.tokens) for r in trace.requests] == [14, 6, 14, 6, 14, 6]


def test_the_model_is_left_as_it_was(tiny):
    before = tiny.module.config._attn_implementation
    STRATEGIES["continuous"](tiny, work(tiny, 2), {})
    assert tiny.module.config._attn_implementation == before
    assert sequential.run(tiny, work(tiny, 2), {}).output_tokens == 20


def test_requests_join_while_others_run(tiny):
    arriving = load.arriving(work(tiny), kind="even", rate_per_s=30)
    trace = STRATEGIES["continuous"](tiny, arriving, {})
    for i, r in enumerate(trace.requests):
        assert r.started_s >= r.submitted_s >= i / 30 - 0.002
    assert agreement(trace, sequential.run(tiny, work(tiny), {})).agree == 6


def test_an_engine_that_fails_midway_fails_its_requests_and_hides_nothing(tiny, monkeypatch):
    forward, calls = tiny.module.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny.module, "forward", failing)
    trace = STRATEGIES["continuous"](tiny, work(tiny), {})
    assert {r.status for r in trace.requests} == {"error"}
    assert all("out of memory" in r.reason for r in trace.requests)
    assert trace.notes["failed"] == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_blocks": 2}, "num_blocks is 2: give at least 3"),
        ({"max_batch": 0}, "max_batch"),
        ({"page_size": 2}, "at least 4"),
        ({"blocks": 2}, "no option 'blocks'"),
        ({"loop": "recompute"}, "its own decoding loop"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tiny, options, says):
    with pytest.raises(ValueError, match=says):
        STRATEGIES["continuous"](tiny, work(tiny), options)


def test_the_sentence_rule_is_refused(tiny):
    with pytest.raises(ValueError, match="sentence mark"):
        STRATEGIES["continuous"](tiny, work(tiny, stop=Stop(min_tokens=4)), {})


def test_suppressed_tokens_never_come(tiny):
    first = sequential.run(tiny, work(tiny, 2), {}).requests[0].tokens[0]
    banned = Sampling(greedy=True, suppress=(first,))
    trace = STRATEGIES["continuous"](tiny, work(tiny, 2, sampling=banned), {})
    assert trace.notes["failed"] == 0
    assert all(first not in r.tokens for r in trace.requests)
