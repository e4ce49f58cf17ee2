"""Requests join and leave the running batch at every step: transformers' continuous batching.

A foreign engine: it has its own paged cache, scheduler and random numbers. Greedily it gives the
tokens of `sequential`; when sampling, its tokens are its own, and the notes say so.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmperf.decoding.requests import Stop, Workload
from llmperf.decoding.sampling import Sampling
from llmperf.decoding.trace import ERROR, OK, Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import shared
from llmperf.strategies.strategy import Strategy, choice, count, in_words, number

MAX_BATCH = 32  # requests that may run at a time, unless told otherwise
PAGE_SIZE = 32  # tokens a block holds
MAX_BATCH_TOKENS = 512  # tokens in one forward pass: longer prompts are split
STALL_S = 120.0  # without any token for this long, the engine counts as stuck
START_S = 60.0


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Add each request to the running batch when it arrives; a token counts when it is read here.

    Options: `max_batch` (32 requests at a time), `page_size` (32 tokens a block), `num_blocks` (KV
    memory, never taken from what happens to be free; default: what `max_batch` of these requests
    need), `max_batch_tokens` (512 in one pass), `stall_s`, `flash` (True lets the engine look for a
    flash attention kernel). The engine swallows its errors; here each is the request's status.
    """
    limits, _ = memory_limits(workload, options), _end_ids(workload.stop)
    with _engine(model, workload, options, limits) as engine:
        recorder = Recorder(workload.requests)
        feeder = threading.Thread(
            target=_feed, args=(engine, workload, recorder, options), daemon=True
        )
        feeder.start()
        rows = _read(engine, workload, options.get("stall_s", STALL_S))
        recorder.merge(rows.values(), origin=0.0)
        trace = recorder.trace(
            **limits,
            failed=sum(row["status"] != OK for row in rows.values()),
            tokens_comparable=workload.sampling.greedy,  # else its random numbers are its own
        )
        feeder.join(START_S)
    return trace


def memory_limits(workload: Workload, options: Mapping) -> dict:
    """`num_blocks`, `page_size` and `max_batch`, all explicit. ValueError if a request cannot fit.

    Without a number, the engine would take nine tenths of the memory that happens to be free.
    """
    page, most = options.get("page_size", PAGE_SIZE), options.get("max_batch", MAX_BATCH)
    needs = [math.ceil((len(r.prompt_ids) + r.max_new_tokens) / page) for r in workload.requests]
    blocks = options.get("num_blocks", sum(sorted(needs)[-most:]) + 1)
    if max(needs) > blocks:
        raise ValueError(
            f"the longest request needs {max(needs)} blocks of {page} tokens, but num_blocks is"
            f" {blocks}: give at least {max(needs)}"
        )
    return {"num_blocks": blocks, "page_size": page, "max_batch": min(most, len(needs))}


@contextmanager
def _engine(model: Model, workload: Workload, options: Mapping, limits: dict) -> Iterator:
    """transformers' manager, started and ready; on leaving, its memory is given back."""
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(
        num_blocks=limits["num_blocks"],
        page_size=limits["page_size"],
        max_requests_per_batch=limits["max_batch"],
        max_batch_tokens=options.get("max_batch_tokens", MAX_BATCH_TOKENS),
        auto_switch_to_flash=options.get("flash", False),
        drop_unsupported_processors=False,  # an error instead of other text
    )
    manager = model.module.init_continuous_batching(
        generation_config=generation_config(workload.sampling),
        continuous_batching_config=config,
    )
    try:
        if model.device != "cpu":
            manager.warmup()  # captures CUDA graphs
        manager.start()
        deadline = time.monotonic() + START_S
        while manager.batch_processor is None and manager.is_running():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the engine was not ready after {START_S:g} s")
            time.sleep(0.002)
        yield manager
    finally:
        if manager.is_running():
            manager.stop(block=True, timeout=10, hard_stop=True)
        manager.destroy()


def generation_config(sampling: Sampling):
    """The same way of drawing in transformers' words."""
    from transformers import GenerationConfig

    drawn = {"do_sample": False}
    if not sampling.greedy:
        drawn = {"do_sample": True, "temperature": sampling.temperature}
        drawn |= {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    if sampling.suppress:
        drawn["suppress_tokens"] = list(sampling.suppress)
    return GenerationConfig(**drawn, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)


def _end_ids(stop: Stop) -> int | list[int]:
    if stop.min_tokens is not None:
        raise ValueError("continuous cannot end at a sentence mark: leave Stop.min_tokens None")
    return sorted(stop.end_ids) or -1


def _feed(engine, workload: Workload, recorder: Recorder, options: Mapping) -> None:
    for request in shared.in_order(workload.requests):
        shared.wait_for_arrival(request, recorder)
        recorder.submitted(request.id)
        engine.add_request(  # a refused one never answers: the reader notices
            list(request.prompt_ids),
            request_id=str(request.id),
            max_new_tokens=request.max_new_tokens,
            eos_token_id=_end_ids(workload.stop),
            streaming=True,
        )


def _read(engine, workload: Workload, stall_s: float) -> dict[int, dict]:
    """Rows of all requests, times as on perf_counter, read until each has its one outcome."""
    rows = {
        r.id: {"id": r.id, "started_s": None, "token_s": [], "tokens": [], "status": OK}
        for r in workload.requests
    }
    open_ids = set(rows)
    patience = stall_s + max(r.arrival_s for r in workload.requests)
    heard = time.perf_counter()
    while open_ids:
        output = engine.get_result(timeout=0.2)
        now = time.perf_counter()
        if output is None:
            if why := _dead(engine, now - heard, patience):
                for id in open_ids:
                    rows[id].update(status=ERROR, reason=why)
                break
            continue
        heard = now
        row = rows[int(output.request_id)]
        new = output.generated_tokens[len(row["tokens"]) :]
        row["tokens"] += map(int, new)
        row["token_s"] += [now] * len(new)
        if output.lifespan[0] > 0:
            row["started_s"] = output.lifespan[0]
        if output.is_finished():
            open_ids.discard(row["id"])
            if output.error is not None:
                row.update(status=ERROR, reason=f"the engine failed: {output.error}")
    return rows


def _dead(engine, silent_s: float, patience: float) -> str | None:
    fatal = engine.background_thread_status.fatal_error
    if fatal is not None:
        return f"the engine's thread ended: {type(fatal).__name__}: {fatal}"
    if not engine.is_running():
        return "the engine's thread ended without an answer"
    if silent_s > patience:
        return f"no token from the engine for {silent_s:.0f} s"
    return None


STRATEGY = Strategy(
    "continuous",
    run,
    in_words("continuous batching", "max_batch"),
    style=5,
    options={
        "max_batch": count,
        "num_blocks": count,
        "page_size": number(4, kind=int),
        "max_batch_tokens": count,
        "stall_s": number(0),
        "flash": choice(True, False),
    },
    rows_per_step=lambda level, options: level,
    foreign=True,
)
