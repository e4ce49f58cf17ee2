"""The loops: equal to model.generate, equal to each other, equal in any batch."""

import pytest
import torch

from llmperf import decoding
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import PUBLISHED, Request, Stop
from llmperf.decoding.sampling import GREEDY, Sampling
from llmperf.decoding.trace import Recorder

SAMPLED = Sampling(temperature=0.9, top_k=50, top_p=0.9)


def rows(model, requests, **how):
    """The tokens of each request, from one batch."""
    steps = list(decoding.decode(model, requests, **how))
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


def generated(model, request):
    ids = torch.tensor([request.prompt_ids])
    out = model.module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("loop", ["recompute", "cached", "compiled"])
def test_greedy_equals_generate_on_the_embedded_model(embedded, loop):
    work = workload.build(embedded.tokenizer, 3, [7, 30, 64], 16, sampling=GREEDY)
    for request in work.requests:
        assert rows(embedded, [request], loop=loop, sampling=GREEDY) == [
            generated(embedded, request)
        ]


@pytest.mark.parametrize("loop", ["recompute", "cached", "compiled"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_gives_each_request_its_own_tokens(embedded, loop, sampling):
    work = workload.build(embedded.tokenizer, 4, [5, 40, 12, 23], [8, 12, 10, 6])
    alone = [rows(embedded, [r], loop=loop, sampling=sampling)[0] for r in work.requests]
    assert rows(embedded, work.requests, loop=loop, sampling=sampling) == alone
    assert [len(row) for row in alone] == [8, 12, 10, 6]


def test_loops_agree_within_the_window_and_part_only_past_it(tiny):
    short = workload.build(tiny.tokenizer, 3, [20, 90, 150], 40).requests
    assert rows(tiny, short, loop="recompute") == rows(tiny, short, loop="cached")
    long = [Request(0, tuple(range(1, 230)), 30)]
    assert rows(tiny, long, loop="recompute") != rows(tiny, long, loop="cached")


def test_recompute_sees_the_last_200_tokens_of_each_row(tiny):
    """A row of 260 tokens and its own last 200 must answer alike, also beside another row."""
    whole = Request(0, tuple(i % 250 for i in range(260)), 6)
    tail = Request(0, whole.prompt_ids[-200:], 6)
    other = Request(1, (9, 8, 7), 6)
    expected = rows(tiny, [tail], loop="recompute")[0]
    assert rows(tiny, [whole], loop="recompute")[0] == expected
    assert rows(tiny, [whole, other], loop="recompute")[0] == expected


def test_different_seeds_part_and_equal_seeds_agree(tiny):
    first = Request(0, (1, 2, 3), 20, seed=1)
    other = Request(0, (1, 2, 3), 20, seed=2)
    assert rows(tiny, [first], sampling=SAMPLED) == rows(tiny, [first], sampling=SAMPLED)
    assert rows(tiny, [first], sampling=SAMPLED) != rows(tiny, [other], sampling=SAMPLED)


def test_gpt2_with_padding_answers_as_alone(tmp_path):
    """GPT-2 learns absolute positions: a padded row must still start at position 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from llmperf import models

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    config.initializer_range = 0.5
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    models.byte_tokenizer().save_pretrained(tmp_path)
    gpt2 = models.load(str(tmp_path), dtype="fp32", device="cpu")
    work = workload.build(gpt2.tokenizer, 3, [4, 30, 11], 12).requests
    for loop in ("recompute", "cached"):
        alone = [rows(gpt2, [r], loop=loop, sampling=GREEDY)[0] for r in work]
        assert rows(gpt2, work, loop=loop, sampling=GREEDY) == alone


def test_forced_length_ignores_end_tokens_and_a_stop_rule_heeds_them(tiny):
    request = Request(0, (5, 6, 7), 30)
    free = rows(tiny, [request], sampling=GREEDY)[0]
    assert len(free) == 30
    end = free[4]
    cut = rows(tiny, [request], sampling=GREEDY, stop=Stop(end_ids=frozenset({end})))[0]
    assert cut == free[: free.index(end) + 1]


def test_the_published_rule_ends_at_the_next_sentence_mark():
    rule = Stop(end_ids=frozenset({0}), sentence_ids=frozenset({8}), min_tokens=5)
    assert not rule.ends(8, 4)  # a mark, but too early
    assert rule.ends(8, 5)
    assert not rule.ends(7, 9)
    assert rule.ends(0, 1)  # end of text at any time


def test_the_published_rule_knows_the_marks_of_the_tokenizer(embedded):
    rule = workload.published_stop(embedded.tokenizer, 4)
    assert embedded.tokenizer(".")["input_ids"][0] in rule.sentence_ids
    assert rule.end_ids == {embedded.tokenizer.eos_token_id}
    assert not rule.ends(3, 1, prompt_ids=(1, 8))  # 3 tokens of the 4 that it asks for
    assert rule.ends(3, 2, prompt_ids=(1, 8))  # token 3, and the prompt ends with token 8
    assert not rule.ends(3, 2, prompt_ids=(8, 1))


def test_the_published_rule_ends_loops_alike(tiny):
    """The prompt counts: 9 of 12 tokens are there before the first new one."""
    request = Request(0, tuple(range(40, 49)), 30, seed=1)
    free = rows(tiny, [request], loop="cached")[0]
    stop = Stop(sentence_ids=frozenset({free[1], free[5]}), min_tokens=12)
    for loop in ("recompute", "cached", "compiled"):
        assert rows(tiny, [request], loop=loop, stop=stop)[0] == free[:6]


def test_every_token_has_its_time(tiny):
    work = workload.build(tiny.tokenizer, 3, 8, [3, 5, 4])
    recorder = Recorder(work.requests)
    decoding.run(tiny, work.requests, recorder)
    trace = recorder.trace()
    assert [len(r.token_s) for r in trace.requests] == [3, 5, 4]
    for r in trace.requests:
        times = [r.submitted_s, r.started_s, *r.token_s, trace.duration_s]
        assert times == sorted(times)


def test_a_suspended_loop_leaves_inference_mode_off(tiny):
    steps = decoding.decode(tiny, [Request(0, (1, 2), 3)])
    next(steps)
    assert not torch.is_inference_mode_enabled()


def test_unknown_loop_and_too_long_text_are_refused(tiny):
    with pytest.raises(ValueError, match="unknown loop 'fast': choose recompute, cached, compiled"):
        next(decoding.decode(tiny, [Request(0, (1,), 1)], loop="fast"))
    (request,) = workload.build(tiny.tokenizer, 1, 500, 13).requests
    with pytest.raises(ValueError, match="= 513, but the model has 512 positions"):
        workload.check_length(request, tiny.shape.max_positions, "the model has {} positions")


def test_workloads_of_any_level_start_alike(tiny):
    small = workload.build(tiny.tokenizer, 2, [4, 9], 5)
    large = workload.build(tiny.tokenizer, 6, [4, 9], 5)
    assert large.requests[:2] == small.requests
    assert [len(r.prompt_ids) for r in large.requests] == [4, 9, 4, 9, 4, 9]
    assert small.sampling == Sampling() != PUBLISHED


@pytest.mark.parametrize(
    ("wrong", "word"),
    [((0, 4, 4), "n is 0"), ((1, 0, 4), "prompt_tokens is 0"), ((1, 4, -2), "new_tokens is -2")],
)
def test_bad_lengths_are_named(tiny, wrong, word):
    with pytest.raises(ValueError, match=f"{word}: it must be at least 1"):
        workload.build(tiny.tokenizer, *wrong)
    with pytest.raises(ValueError, match="empty prompt"):
        Request(0, (), 4)
