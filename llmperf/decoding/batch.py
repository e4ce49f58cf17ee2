"""The eager loops over one left-padded batch: `recompute`, as published, and `cached`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from llmperf.decoding.requests import WINDOW, Request
from llmperf.models import with_cache


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, so that every row's next token stands in the last column."""

    ids: torch.Tensor  # (rows, columns)
    mask: torch.Tensor  # (rows, columns), 1 where there is a token
    steps: int  # new tokens of the longest row


def pad(requests: Sequence[Request], device) -> Batch:
    """The prompts of `requests`, flush right in one tensor on `device`."""
    texts = [torch.tensor(r.prompt_ids) for r in requests]
    ids = pad_sequence(texts, batch_first=True, padding_side="left")
    ones = [torch.ones_like(text) for text in texts]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return Batch(ids.to(device), mask.to(device), max(r.max_new_tokens for r in requests))


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token in its row, counted from 0; padding gets 0. mask (rows, columns)."""
    return (mask.cumsum(-1) - 1).clamp_(min=0)


def last_column(ids: torch.Tensor) -> int | torch.Tensor:
    """`logits_to_keep` for the last of several columns of ids (rows, columns): its index, not 1.

    For 1 transformers takes a view, and torch copies the output layer's weights to multiply a view
    of several columns: prefill in bf16 on a processor then takes three times as long.
    """
    columns = ids.shape[1]
    return 1 if columns == 1 else torch.tensor([columns - 1], device=ids.device)


@dataclass(frozen=True)
class Piece:
    """Tokens of one slot that go through the model together; `last`: their logits are asked for."""

    slot: int
    ids: Sequence[int]
    start: int  # position of the first of them
    last: bool

    @property
    def end(self) -> int:
        """Position after the last of them."""
        return self.start + len(self.ids)


def run_piece(module, piece: Piece, caches: dict[int, DynamicCache]) -> torch.Tensor:
    """Run a piece alone over its slot's cache, which the first piece makes: (1, vocabulary)."""
    if piece.start == 0:
        caches[piece.slot] = DynamicCache(config=module.config)
    ids = torch.tensor([list(piece.ids)], device=module.device)
    place = torch.arange(piece.start, piece.end, device=ids.device)
    out = module(
        input_ids=ids, position_ids=place[None], logits_to_keep=last_column(ids),
        **with_cache(module, caches[piece.slot]),
    )  # fmt: skip
    return out.logits[:, -1]


# Logits (rows, vocabulary) and the number of the step → ids (rows,).
Draw = Callable[[torch.Tensor, int], torch.Tensor]


def recompute(model, batch: Batch, draw: Draw) -> Iterator[torch.Tensor]:
    """The published loop: the whole forward pass over the last 200 tokens, for every token.

    It computes the logits of every position and uses the last, as published. Yields (rows,).
    """
    ids, mask, padded = batch.ids, batch.mask, not batch.mask.all()
    for step in range(batch.steps):
        ids, mask = ids[:, -WINDOW:], mask[:, -WINDOW:]
        logits = model.module(
            input_ids=ids,
            attention_mask=mask if padded else None,
            position_ids=positions(mask),
            use_cache=False,
        ).logits
        tokens = draw(logits[:, -1], step)
        del logits  # (rows, columns, vocabulary): not to be held through the next pass
        yield tokens
        ids = torch.cat((ids, tokens[:, None]), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)


def cached(model, batch: Batch, draw: Draw) -> Iterator[torch.Tensor]:
    """Prefill once, then one column a step: keys and values of earlier tokens are kept.

    Yields (rows,).
    """
    rows, columns = batch.ids.shape
    mask = torch.cat((batch.mask, batch.mask.new_ones(rows, batch.steps)), dim=1)
    padded = not batch.mask.all()  # else no mask is needed
    position = positions(batch.mask)
    kept = DynamicCache(config=model.module.config)
    given = with_cache(model.module, kept)
    # Without attention (Mamba) a step has no past to mask.
    attends = any(hasattr(layer, "keys") for layer in kept.layers)
    ids = batch.ids
    for step in range(batch.steps):
        out = model.module(
            input_ids=ids,
            attention_mask=mask[:, : columns + step] if padded and (attends or not step) else None,
            position_ids=position,
            logits_to_keep=last_column(ids),
            **given,
        )
        tokens = draw(out.logits[:, -1], step)
        yield tokens
        ids, position = tokens[:, None], position[:, -1:] + 1
