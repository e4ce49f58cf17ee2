"""The sampler against transformers' own processors, and its random streams."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmperf.decoding.sampling import (
    GREEDY,
    Sampling,
    filtered_logits,
    next_tokens,
    survivors,
    uniforms,
)

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_p=0.6),
    Sampling(temperature=1.3, top_k=20, top_p=0.8),
    Sampling(temperature=0.5, top_k=7, top_p=0.95, suppress=(3, 9)),
    Sampling(top_k=1000),
]


def processors(s: Sampling) -> LogitsProcessorList:
    """transformers' processors in the publication's order."""
    chain = [TemperatureLogitsWarper(s.temperature)]
    if s.suppress:
        chain.append(SuppressTokensLogitsProcessor(list(s.suppress), device="cpu"))
    if s.top_k:
        chain.append(TopKLogitsWarper(s.top_k))
    if s.top_p:
        chain.append(TopPLogitsWarper(s.top_p))
    return LogitsProcessorList(chain)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filtered_logits_equal_those_of_transformers(settings):
    logits = torch.randn(16, 60, generator=torch.Generator().manual_seed(1)) * 3
    expected = processors(settings)(torch.zeros(16, 1, dtype=torch.long), logits.clone())
    assert torch.equal(filtered_logits(logits, settings), expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_filtered_distribution(settings):
    """Total variation between 40,000 draws and the exact distribution, over 12 tokens."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2)) * 2
    n = 40_000
    draws = next_tokens(logits.expand(n, -1), settings, uniforms([7], n)[0])
    seen = torch.bincount(draws, minlength=12) / n
    exact = filtered_logits(logits, settings).softmax(-1)[0]
    assert (seen - exact).abs().sum() / 2 < 0.01
    assert not seen[exact == 0].any()  # what was removed is never drawn


def test_inputs_are_left_as_they_were():
    logits = torch.randn(2, 30)
    before = logits.clone()
    next_tokens(logits, Sampling(suppress=(1,), top_k=4), torch.tensor([0.1, 0.9]).double())
    next_tokens(logits, Sampling(greedy=True, suppress=(1,)))
    assert torch.equal(logits, before)


def test_a_row_draws_the_same_in_any_batch():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    settings = Sampling(top_k=20, top_p=0.9)
    together = next_tokens(logits, settings, uniforms([11, 12, 13, 14], 3)[:, 2])
    draws = [uniforms([11 + i], 3)[:, 2] for i in range(4)]
    alone = [next_tokens(logits[i : i + 1], settings, draws[i]) for i in range(4)]
    assert together.tolist() == [int(t) for t in alone]


def test_a_stream_is_the_start_of_its_longer_self():
    assert torch.equal(uniforms([5], 8), uniforms([5], 32)[:, :8])
    assert not torch.equal(uniforms([5], 8), uniforms([6], 8))


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_land_on_a_survivor(draw):
    logits = torch.tensor([[3.0, 2.0, 1.0, -20.0]])
    for settings in (Sampling(top_p=0.5), Sampling(top_k=2), Sampling()):
        token = next_tokens(logits, settings, torch.tensor([draw], dtype=torch.float64))
        assert filtered_logits(logits, settings)[0, token] > -torch.inf


def test_top_p_sorts_only_the_survivors_of_top_k():
    scores, ids = survivors(torch.randn(2, 1000), Sampling(top_k=50, top_p=0.9))
    assert scores.shape == ids.shape == (2, 50)


def test_greedy_takes_the_likeliest_that_is_allowed():
    logits = torch.tensor([[0.0, 5.0, 4.0]])
    assert next_tokens(logits, GREEDY).tolist() == [1]
    assert next_tokens(logits, Sampling(greedy=True, suppress=(1,))).tolist() == [2]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
    ],
)
def test_bad_values_are_named(wrong, word):
    with pytest.raises(ValueError, match=f"{word} is .*: it must"):
        Sampling(**wrong)
