"""N asyncio tasks around the blocking loop: the publication's "Coroutine Inference"."""

import asyncio
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from llmperf import decoding
from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import run_control
from llmperf.strategies.strategy import COUNT, Strategy, capped_by_level, choice, in_words

BEAT_S = 0.01  # the heartbeat task asks for its turn this often


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Each task takes the next request until none is left; all are tasks of one event loop.

    Options: `workers` (default: a task for each request), `loop`, `on_step`, and `variant`:
    `blocking` calls the decoding loop inside the task, as published; `yielding` gives the event
    loop a turn after each token; `to_thread` hands each request to a thread.

    The event loop runs in the caller's thread, as `sequential` does. In a second one the same work
    took 6 % longer on two cores: OpenMP counts the threads of both callers, finds more than cores,
    and puts its workers to sleep between operators (6,800 sleeps in 64 tokens instead of 67).
    """
    return run_control.run_async(_run(model, workload, options))


async def _run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Start all tasks and the heartbeat, wait for the tasks, close the trace."""
    variant = options["variant"]
    tasks = options.get("workers", len(workload.requests))
    cancel = threading.Event()
    how = run_control.decode_arguments(workload, options, cancel)
    queue = run_control.in_order(workload.requests)

    async def answer(request: Request, worker: str) -> None:
        given, named = (model, [request], recorder), how | {"worker": worker}
        if variant == "blocking":  # nobody else runs: there is no `await`
            decoding.run(*given, **named)
        elif variant == "yielding":
            for _ in decoding.steps(*given, **named):
                await asyncio.sleep(0)
        else:
            await asyncio.to_thread(decoding.run, *given, **named)

    async def task(worker: str) -> None:
        try:
            for request in queue:
                while (left := request.arrival_s - recorder.now()) > 0:
                    await asyncio.sleep(min(left, run_control.SLEEP_S))
                    if cancel.is_set():
                        raise run_control.Cancelled
                await answer(request, worker)
        except BaseException:
            cancel.set()  # the other tasks, and their threads, end at their next token
            raise

    if variant == "to_thread":  # the default has few threads on few cores
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(tasks))
    late: list[float] = []
    heart = asyncio.create_task(_beat(late))
    await asyncio.sleep(0)  # the heartbeat is running before the first task
    recorder = Recorder(workload.requests)
    await asyncio.gather(*(task(str(i)) for i in range(tasks)))
    trace = recorder.trace()
    heart.cancel()
    await asyncio.gather(heart, return_exceptions=True)
    trace.notes.update(
        variant=variant, event_loop={"beats": len(late), "longest_block_s": max(late)}
    )
    return trace


async def _beat(late: list[float]) -> None:
    """Want a turn every `BEAT_S`, and note in `late` by how much it came later."""
    while True:
        due = time.perf_counter() + BEAT_S
        try:
            await asyncio.sleep(BEAT_S)
        finally:  # when nobody else ever ran, the only beat is one that is overdue
            late.append(max(0.0, time.perf_counter() - due))


_tasks = capped_by_level("workers")
STRATEGY = Strategy(
    "coroutine",
    run,
    in_words("{n} coroutines", "variant", single="1 coroutine", count=_tasks),
    style=4,
    options={"variant": choice("blocking", "yielding", "to_thread"), "workers": COUNT},
    defaults={"variant": "blocking"},
    threads=lambda level, o: _tasks(level, o) if o.get("variant") == "to_thread" else 1,
    interleaved_batches=lambda level, o: _tasks(level, o) if o.get("variant") == "yielding" else 1,
)
