"""transformers' continuous batching, as an engine of `peer`: its own cache, scheduler and draws."""

from __future__ import annotations

import math
import time
from collections import deque

from transformers import ContinuousBatchingConfig, GenerationConfig

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import ERROR, OK, Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import run_control

MAX_BATCH = 32  # requests that run at a time
BLOCK_TOKENS = 32
PASS_TOKENS = 512  # in one forward pass: longer prompts are split
STALL_S = 120.0  # without any answer for so long, the engine counts as stuck


def run(model: Model, workload: Workload, config: GenerationConfig) -> Trace:
    """Add each request when it arrives; the times of its tokens are those of the engine.

    The engine swallows its errors; here each is the request's status. The number of cache blocks is
    what `MAX_BATCH` of the requests need: without one it takes nine tenths of the free memory.
    """
    waiting = deque(run_control.in_order(workload.requests))
    needs = sorted(
        math.ceil((len(r.prompt_ids) + r.max_new_tokens) / BLOCK_TOKENS) for r in waiting
    )
    limits = ContinuousBatchingConfig(
        num_blocks=sum(needs[-MAX_BATCH:]) + 1,
        page_size=BLOCK_TOKENS,
        max_requests_per_batch=min(MAX_BATCH, len(needs)),
        max_batch_tokens=PASS_TOKENS,
        auto_switch_to_flash=False,
        drop_unsupported_processors=False,  # an error instead of other text
    )
    with model.module.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=limits,
        timeout=10,
        warmup=model.device != "cpu",  # captures CUDA graphs
    ) as engine:
        while engine.batch_processor is None and engine.is_running():
            time.sleep(0.002)
        recorder, rows = Recorder(workload.requests), {}
        heard = time.perf_counter()
        while len(rows) < len(workload.requests):
            while waiting and waiting[0].arrival_s <= recorder.now():
                request = waiting.popleft()
                recorder.submitted(request.id)
                engine.add_request(
                    list(request.prompt_ids),
                    request_id=str(request.id),
                    max_new_tokens=request.max_new_tokens,
                    eos_token_id=-1,
                    record_timestamps=True,
                )
            output = engine.get_result(timeout=0.005 if waiting else 0.2)
            if output is not None and output.is_finished():
                heard = time.perf_counter()
                rows[int(output.request_id)] = _row(output)
            elif waiting:
                heard = time.perf_counter()
            elif why := _dead(engine, time.perf_counter() - heard):
                for id in {r.id for r in workload.requests} - rows.keys():
                    recorder.failed(id, ERROR, why)
                break
        recorder.merge(rows.values(), origin=0.0)
        return recorder.trace()


def _row(output) -> dict:
    error = output.error is not None
    return {
        "id": int(output.request_id),
        "started_s": output.lifespan[0] if output.lifespan[0] > 0 else None,
        "tokens": [] if error else [int(t) for t in output.generated_tokens],
        "token_s": [] if error else list(output.timestamps),
        "status": ERROR if error else OK,
        "reason": f"the engine failed: {output.error}" if error else None,
    }


def _dead(engine, silent_s: float) -> str | None:
    fatal = engine.background_thread_status.fatal_error
    if fatal is not None:
        return f"the engine's thread ended: {type(fatal).__name__}: {fatal}"
    if not engine.is_running():
        return "the engine's thread ended without an answer"
    return f"no answer from the engine for {silent_s:.0f} s" if silent_s > STALL_S else None
