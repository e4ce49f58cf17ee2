"""Generate tokens for a batch of requests with any loop, and record when each came."""

from collections.abc import Callable, Iterator, Sequence

import torch

from llmperf.decoding import batch as eager
from llmperf.decoding.loops import prepare
from llmperf.decoding.requests import DEFAULT_LOOP, Request, Stop
from llmperf.decoding.sampling import Sampling, next_tokens, uniforms
from llmperf.decoding.slots import Slots
from llmperf.decoding.trace import Recorder


def decode(
    model,
    requests: Sequence[Request],
    *,
    loop: str = DEFAULT_LOOP,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    room: tuple[int, int] | None = None,
) -> Iterator[list[int | None]]:
    """Generate for `requests` as one batch; yields one list a step, None for rows that ended.

    A step is yielded when its tokens have reached the processor, so its time is the time at which
    a caller could read them. `room`: rows and tokens of the buffers (default: what the requests
    need), so that a smaller batch uses those of the others.
    """
    sampling, stop = sampling or Sampling(), stop or Stop()
    chosen = prepare(model, loop)
    if chosen.step is None:
        yield from _eager(model, requests, chosen.loop, sampling, stop)
        return
    need = len(requests), max(r.length for r in requests)
    slots = Slots(model, *(room or need), sampling=sampling, stop=stop)
    for place, request in enumerate(requests):
        slots.admit(place, request)
    while slots.busy:
        row: list[int | None] = [None] * len(requests)
        for place, token, _ in slots.step():
            row[place] = token
        yield row


def _eager(model, requests, loop: str, sampling: Sampling, stop: Stop) -> Iterator[list]:
    """A row that has ended is computed on until the last one ends, as in `model.generate`."""
    device = model.torch_device
    batch = eager.pad(requests, device)
    streams = uniforms([r.seed for r in requests], batch.steps).to(device)  # (rows, steps)
    draw = lambda logits, step: next_tokens(logits, sampling, streams[:, step])  # noqa: E731
    left = [r.max_new_tokens for r in requests]
    generate = eager.recompute if loop == "recompute" else eager.cached
    tokens_of_steps = generate(model, batch, draw)
    for step in range(1, batch.steps + 1):
        with torch.inference_mode():  # per step: a suspended generator must not leave it on
            tokens = next(tokens_of_steps).tolist()  # waits for the device
        row = [t if n else None for t, n in zip(tokens, left, strict=True)]
        yield row
        for i, token in enumerate(row):
            if token is not None:
                ended = stop.ends(token, step, requests[i].prompt_ids)
                left[i] = 0 if ended else left[i] - 1
        if not any(left):
            return


def run(model, requests: Sequence[Request], recorder: Recorder, **how) -> None:
    """Decode `requests` as one batch and record when each token came; `how` as for `steps`."""
    for _ in steps(model, requests, recorder, **how):
        pass


def steps(
    model,
    requests: Sequence[Request],
    recorder: Recorder,
    *,
    loop: str = DEFAULT_LOOP,
    worker: str = "0",
    on_step: Callable[[], None] | None = None,
    **how,
) -> Iterator[None]:
    """Like `run`, as a generator: control returns to the caller after each step.

    `how` is what `decode` takes; `worker` is the name that the trace gives to who decodes;
    `on_step` is called after each step.
    """
    chosen = prepare(model, loop)
    recorder.started([r.id for r in requests], worker)
    recorder.ran(chosen.loop, chosen.reason)
    for row in decode(model, requests, loop=chosen.loop, **how):
        now = recorder.now()
        for request, token in zip(requests, row, strict=True):
            if token is not None:
                recorder.token(request.id, token, now)
        if on_step:
            on_step()
        yield
