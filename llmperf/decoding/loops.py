"""The decoding loops: a batch of requests in, one token a row and step out.

`recompute` is the published loop, `cached` keeps keys and values, `compiled` runs a static cache
under torch.compile. All strategies end here, and all loops give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmperf.decoding import static_cache as compiled
from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import Sampling, next_tokens, uniforms

if TYPE_CHECKING:
    import torch

    from llmperf.decoding.trace import Recorder
    from llmperf.models import Model

WINDOW = 200  # the published loop looks at the last 200 tokens


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, so that every row's next token stands in the last column."""

    ids: torch.Tensor  # (rows, columns)
    mask: torch.Tensor  # (rows, columns), 1 where there is a token
    steps: int  # new tokens of the longest row

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the longest; without, no mask is needed."""
        return not bool(self.mask.all())


def pad(requests: Sequence[Request], device) -> Batch:
    """Stand the prompts of `requests` flush right in one tensor on `device`."""
    import torch

    columns = max(len(r.prompt_ids) for r in requests)
    ids = torch.zeros(len(requests), columns, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, columns - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, columns - len(request.prompt_ids) :] = 1
    return Batch(ids.to(device), mask.to(device), max(r.max_new_tokens for r in requests))


def last_column(ids: torch.Tensor) -> int | torch.Tensor:
    """`logits_to_keep` for the last of several columns of ids (rows, columns): its index, not 1.

    For 1 transformers takes a view, and torch copies the output layer's weights to multiply a view
    of several columns: prefill in bf16 on a processor then takes three times as long.
    """
    import torch

    columns = ids.shape[1]
    return 1 if columns == 1 else torch.tensor([columns - 1], device=ids.device)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token in its own row, counted from 0; padding gets 0."""
    return (mask.cumsum(-1) - 1).clamp_(min=0)


@dataclass(frozen=True)
class Draw:
    """Chooses the next tokens of a batch, each row from its own random stream."""

    sampling: Sampling
    uniforms: torch.Tensor  # (rows, steps)

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Logits (rows, vocabulary) of one step → ids (rows,)."""
        return next_tokens(logits, self.sampling, self.uniforms[:, step])


def recompute(model: Model, batch: Batch, draw: Draw) -> Iterator[torch.Tensor]:
    """The published loop: the whole forward pass over the last 200 tokens, for every token.

    It computes the logits of every position and uses the last, as published.
    """
    import torch

    ids, mask, padded = batch.ids, batch.mask, batch.padded
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


def cached(model: Model, batch: Batch, draw: Draw) -> Iterator[torch.Tensor]:
    """Prefill once, then one column a step: keys and values of earlier tokens are kept."""
    import torch
    from transformers import DynamicCache

    rows, columns = batch.ids.shape
    mask = torch.cat((batch.mask, batch.mask.new_ones(rows, batch.steps)), dim=1)
    padded = batch.padded
    position = positions(batch.mask)
    cache = DynamicCache(config=model.module.config)
    ids = batch.ids
    for step in range(batch.steps):
        out = model.module(
            input_ids=ids,
            attention_mask=mask[:, : columns + step] if padded else None,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last_column(ids),
        )
        tokens = draw(out.logits[:, -1], step)
        yield tokens
        ids, position = tokens[:, None], position[:, -1:] + 1


LOOPS = {"recompute": recompute, "cached": cached, "compiled": compiled.loop}


def check_loop(loop: str) -> None:
    """Raise ValueError for a loop that there is not."""
    if loop not in LOOPS:
        raise ValueError(f"unknown loop {loop!r}: choose {', '.join(LOOPS)}")


def decode(
    model: Model,
    requests: Sequence[Request],
    *,
    loop: str = "cached",
    sampling: Sampling | None = None,
    stop: Stop | None = None,
) -> Iterator[list[int | None]]:
    """Generate for `requests` as one batch; yields one list a step, None for rows that ended.

    A step is yielded when its tokens have reached the processor, so its time is the time at which
    a caller could read them. A row that has ended is computed on until the last one ends, as in
    `model.generate`.
    """
    import torch

    check_loop(loop)
    sampling, stop = sampling or Sampling(), stop or Stop()
    device = model.torch_device
    batch = pad(requests, device)
    draw = Draw(sampling, uniforms([r.seed for r in requests], batch.steps).to(device))
    # Compiled code guards on the mode it was made in, and was made without inference mode.
    without_gradients = torch.no_grad if loop == "compiled" else torch.inference_mode
    left = [r.max_new_tokens for r in requests]
    tokens_of_steps = LOOPS[loop](model, batch, draw)
    for step in range(1, batch.steps + 1):
        with without_gradients():  # per step: a suspended generator must not leave it on
            tokens = next(tokens_of_steps).tolist()  # waits for the device
        row = [t if n else None for t, n in zip(tokens, left, strict=True)]
        yield row
        for i, token in enumerate(row):
            if token is not None:
                left[i] = 0 if stop.ends(token, step) else left[i] - 1
        if not any(left):
            return


def run(
    model: Model,
    requests: Sequence[Request],
    recorder: Recorder,
    *,
    on_step: Callable[[], None] | None = None,
    **how,
) -> None:
    """Decode `requests` as one batch and record when each token came.

    `how` is what `steps` takes; `on_step` is called after each step.
    """
    for _ in steps(model, requests, recorder, **how):
        if on_step:
            on_step()


def steps(
    model: Model,
    requests: Sequence[Request],
    recorder: Recorder,
    *,
    loop: str = "cached",
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    worker: str = "0",
) -> Iterator[None]:
    """As `run`, for a caller that wants the processor back after each step."""
    recorder.started([r.id for r in requests], worker)
    for row in decode(model, requests, loop=loop, sampling=sampling, stop=stop):
        now = recorder.now()
        for request, token in zip(requests, row, strict=True):
            if token is not None:
                recorder.token(request.id, token, now)
        yield
