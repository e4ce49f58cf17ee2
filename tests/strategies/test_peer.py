"""Other engines: the same greedy tokens, times of every token, absence and crashes told."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from llmperf import models
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import GREEDY, PUBLISHED, Sampling
from llmperf.measure import Condition
from llmperf.strategies import STRATEGIES, llamacpp, peer

run = STRATEGIES["peer"]


def make(model, n=3, new=(6, 3, 5), sampling=GREEDY, **how):
    return workload.build(model.tokenizer, n, (7, 4, 9), new, sampling=sampling, **how)


@pytest.mark.parametrize("engine", ["generate", "generate-static"])
def test_generate_gives_the_tokens_of_sequential_and_a_time_for_each(tiny, engine):
    work = make(tiny)
    steps = []
    trace = run(tiny, work, {"engine": engine, "on_step": lambda: steps.append(1)})
    assert trace.digest() == STRATEGIES["sequential"](tiny, work, {}).digest()
    assert [len(r.tokens) for r in trace.requests] == [6, 3, 5]
    for r in trace.requests:
        assert len(r.token_s) == len(r.tokens)
        assert 0 <= r.started_s < r.token_s[0] and list(r.token_s) == sorted(set(r.token_s))
    assert trace.requests[0].token_s[-1] <= trace.duration_s
    assert trace.notes == {"engine": engine, "tokens_comparable": True}
    assert len(steps) == 6


def test_sampled_tokens_are_said_to_be_its_own(tiny):
    trace = run(tiny, make(tiny, sampling=PUBLISHED), {})
    assert trace.output_tokens == 14
    assert trace.notes["tokens_comparable"] is False


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"engine": "vllm"},
            "engine is 'vllm': it must be generate or generate-static or transformers",
        ),
        ({"threads": 2}, "peer has no option 'threads': its options are engine"),
        ({"loop": "recompute"}, "peer has its own decoding loop: leave loop at its default"),
    ],
)
def test_bad_options_are_refused_before_any_work(tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(tiny, make(tiny), options)


def test_without_llama_cpp_a_condition_says_how_to_get_it(embedded, monkeypatch):
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llama.cpp is not installed.*llmperf-study\[llamacpp\]"):
        Condition(embedded, "peer", options={"engine": "llamacpp"})
    assert peer.unavailable(embedded, "generate") is None


def test_llama_cpp_has_the_embedded_weights_alone(tiny, monkeypatch):
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda name: True)
    assert "trained weights of smollm2-135m alone" in peer.unavailable(tiny, "llamacpp")


class FakeLlama:
    """Answers with the prompt's first token."""

    def __init__(self, file, **how):
        self.how = how

    def generate(self, prompt, **sampling):
        while True:
            yield prompt[0]

    def reset(self):
        pass


def test_tokens_of_llama_cpp_become_a_trace(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=FakeLlama))
    monkeypatch.setattr(llamacpp, "gguf", lambda dtype: tmp_path / "none.gguf")
    work = make(tiny)
    trace = llamacpp.run(tiny, work)
    assert [r.tokens for r in trace.requests] == [
        (r.prompt_ids[0],) * r.max_new_tokens for r in work.requests
    ]
    assert all(0 < r.started_s <= trace.duration_s for r in trace.requests)
    assert trace.notes["not_followed"] == []
    asked = make(tiny, sampling=Sampling(suppress=(1,)))
    assert llamacpp.run(tiny, asked).notes["not_followed"] == ["suppress"]


CONTINUOUS = {"engine": "transformers-continuous"}


def test_continuous_batching_of_transformers_gives_the_greedy_tokens_of_sequential(tiny):
    work = make(tiny, 6)
    before = tiny.module.config._attn_implementation
    trace = run(tiny, work, CONTINUOUS)
    assert trace.digest() == STRATEGIES["sequential"](tiny, work, {}).digest()
    for r in trace.requests:
        assert r.submitted_s <= r.started_s <= r.token_s[0] <= r.token_s[-1]
    assert tiny.module.config._attn_implementation == before
    assert not run(tiny, make(tiny, sampling=PUBLISHED), CONTINUOUS).notes["tokens_comparable"]


def test_an_engine_that_fails_midway_fails_its_requests_and_hides_nothing(tiny, monkeypatch):
    forward, calls = tiny.module.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny.module, "forward", failing)
    trace = run(tiny, make(tiny, 6, 12), CONTINUOUS)
    assert {r.status for r in trace.requests} == {"error"}
    assert all("out of memory" in r.reason for r in trace.requests)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed (extra llamacpp)",
)
def test_llama_cpp_in_fp32_gives_the_greedy_tokens_of_cached(embedded):
    work = workload.build(embedded.tokenizer, 2, 12, 8, sampling=GREEDY)
    trace = run(embedded, work, {"engine": "llamacpp"})
    assert trace.digest() == STRATEGIES["sequential"](embedded, work, {}).digest()
    json.dumps(trace.to_dict())
    assert models.EMBEDDED in str(llamacpp.gguf("fp32"))
    assert torch.get_num_threads() >= 1
