"""transformers' continuous batching, as an engine of `peer`: its own cache, scheduler and draws."""

import dataclasses
import math
import time
from collections import deque

from transformers import ContinuousBatchingConfig, GenerationConfig

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import ERROR, Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import run_control

MAX_BATCH = 32  # requests that run at a time
BLOCK_TOKENS = 32
PASS_TOKENS = 512  # in one forward pass: longer prompts are split


def run(model: Model, workload: Workload, config: GenerationConfig) -> Trace:
    """Add each request when it arrives; the times of its tokens are those of the engine.

    The engine swallows its errors; here each is the request's status. The number of cache blocks is
    what `MAX_BATCH` of the requests need; by default it takes 90 % of the free memory.
    """
    waiting = deque(run_control.in_order(workload.requests))
    needs = sorted(math.ceil(r.length / BLOCK_TOKENS) for r in waiting)
    limits = {
        "num_blocks": sum(needs[-MAX_BATCH:]) + 1,
        "page_size": BLOCK_TOKENS,
        "block_size": BLOCK_TOKENS,  # so called in transformers 5.17
        "max_requests_per_batch": min(MAX_BATCH, len(needs)),
        "max_batch_tokens": PASS_TOKENS,
        "auto_switch_to_flash": False,
        "drop_unsupported_processors": False,  # an error instead of other text
    }
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    with model.module.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(
            **{name: value for name, value in limits.items() if name in known}
        ),
        timeout=10,
        warmup=model.device != "cpu",  # captures CUDA graphs
    ) as engine:
        while engine.batch_processor is None and engine.is_running():
            time.sleep(0.002)
        recorder, rows = Recorder(workload.requests), {}
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
                rows[int(output.request_id)] = _row(output)
            elif not engine.is_running():
                fatal = engine.background_thread_status.fatal_error
                for id in {r.id for r in workload.requests} - rows.keys():
                    recorder.failed(id, ERROR, f"the engine's thread ended: {fatal}")
                break
        recorder.merge(rows.values())
        return recorder.trace()


def _row(output) -> dict:
    started = output.lifespan[0]  # -1 before
    row = {"id": int(output.request_id), "started_s": started if started > 0 else None}
    if output.error is not None:
        why = f"the engine failed: {output.error}"
        return row | {"token_s": [], "status": ERROR, "reason": why}
    tokens = [int(t) for t in output.generated_tokens]
    return row | {"tokens": tokens, "token_s": list(output.timestamps)}
