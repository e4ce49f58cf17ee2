"""Logits → next token: temperature, suppressed ids, top-k, then top-p, and one draw.

The draw inverts the cumulative distribution at one uniform number. Each request has its own
seeded row of uniform numbers, so its tokens do not depend on the batch, thread or process that it
runs in.
"""

from collections.abc import Sequence

import torch

from llmperf.decoding.requests import GREEDY, Sampling  # noqa: F401


def uniforms(seeds: Sequence[int], steps: int) -> torch.Tensor:
    """One uniform number for each row and step, shape (rows, steps), fp64 in [0, 1).

    Row r depends on `seeds[r]` alone: this is the row's random stream.
    """
    rows = torch.empty(len(seeds), steps, dtype=torch.float64)
    for row, seed in zip(rows, seeds, strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return rows


def survivors(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn, likeliest first.

    logits (rows, vocabulary) → scaled logits and ids, each (rows, kept); a token that top-p
    removes has -inf. With a top-k only k columns are sorted and summed, not the vocabulary.
    """
    scores = logits.float() / sampling.temperature
    if sampling.suppress:
        scores[:, list(sampling.suppress)] = -torch.inf
    kept = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    scores, ids = torch.topk(scores, kept)  # (rows, kept), sorted downwards
    if sampling.top_p is not None and sampling.top_p < 1:
        before = scores.softmax(-1).cumsum(-1).roll(1, -1)  # probability of all likelier tokens
        before[:, 0] = 0  # the likeliest token always stays
        scores = scores.masked_fill(before >= sampling.top_p, -torch.inf)
    return scores, ids


def filtered_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """As transformers' processors give them: (rows, vocabulary), removed tokens at -inf."""
    scores, ids = survivors(logits, sampling)
    return torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter(-1, ids, scores)


def next_tokens(
    logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None = None
) -> torch.Tensor:
    """One token for each row: logits (rows, vocabulary), uniform (rows,) → ids (rows,).

    Greedy needs no `uniform`. Suppressed ids apply to both.
    """
    if sampling.greedy:
        if sampling.suppress:
            logits = logits.index_fill(
                -1, torch.tensor(sampling.suppress, device=logits.device), -torch.inf
            )
        return logits.argmax(-1)
    scores, ids = survivors(logits, sampling)
    cumulative = scores.double().softmax(-1).cumsum(-1)  # fp64: a draw at 1 - 1e-9 must still land
    target = uniform[:, None] * cumulative[:, -1:]
    column = torch.searchsorted(cumulative, target, right=True)  # first column above the target
    return ids.gather(-1, column.clamp_(max=ids.shape[-1] - 1))[:, 0]
