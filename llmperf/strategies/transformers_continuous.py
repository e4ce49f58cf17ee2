"""transformers' continuous batching, as an engine of `peer`: its own cache, scheduler and draws."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import ContinuousBatchingConfig, GenerationConfig

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import ERROR, OK, Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import run_control

MAX_BATCH = 32  # requests that run at a time
BLOCK_TOKENS = 32
PASS_TOKENS = 512  # in one forward pass: longer prompts are split
STALL_S = 120.0  # without any token for so long, the engine counts as stuck
START_S = 60.0


def run(model: Model, workload: Workload, config: GenerationConfig) -> Trace:
    """Add each request when it arrives; a token counts when it is read here.

    The engine swallows its errors; here each is the request's status.
    """
    with _engine(model, workload, config) as engine:
        recorder = Recorder(workload.requests)

        def feed() -> None:
            for request in run_control.in_order(workload.requests):
                run_control.wait_for_arrival(request, recorder)
                recorder.submitted(request.id)
                engine.add_request(  # a refused one never answers: the reader notices
                    list(request.prompt_ids),
                    request_id=str(request.id),
                    max_new_tokens=request.max_new_tokens,
                    eos_token_id=-1,
                    streaming=True,
                )

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        rows = _read(engine, workload)
        recorder.merge(rows.values(), origin=0.0)
        trace = recorder.trace()
        feeder.join(START_S)
    return trace


@contextmanager
def _engine(model: Model, workload: Workload, config: GenerationConfig) -> Iterator:
    """transformers' manager, started and ready; on leaving, its memory is given back.

    The number of cache blocks is what `MAX_BATCH` of the requests need; without one the engine
    would take nine tenths of the memory that happens to be free.
    """
    tokens = (len(r.prompt_ids) + r.max_new_tokens for r in workload.requests)
    needs = sorted(math.ceil(n / BLOCK_TOKENS) for n in tokens)
    manager = model.module.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=sum(needs[-MAX_BATCH:]) + 1,
            page_size=BLOCK_TOKENS,
            max_requests_per_batch=min(MAX_BATCH, len(needs)),
            max_batch_tokens=PASS_TOKENS,
            auto_switch_to_flash=False,
            drop_unsupported_processors=False,  # an error instead of other text
        ),
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


def _read(engine, workload: Workload) -> dict[int, dict]:
    """Rows of all requests, times as on perf_counter, read until each has its one outcome."""
    rows = {
        r.id: {"id": r.id, "started_s": None, "token_s": [], "tokens": [], "status": OK}
        for r in workload.requests
    }
    open_ids = set(rows)
    patience = STALL_S + max(r.arrival_s for r in workload.requests)
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
        heard, row = now, rows[int(output.request_id)]
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


def _dead(engine, silent_s: float, patience_s: float) -> str | None:
    fatal = engine.background_thread_status.fatal_error
    if fatal is not None:
        return f"the engine's thread ended: {type(fatal).__name__}: {fatal}"
    if not engine.is_running():
        return "the engine's thread ended without an answer"
    return f"no token from the engine for {silent_s:.0f} s" if silent_s > patience_s else None
