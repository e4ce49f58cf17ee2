"""The strategies that are the server with other settings: `processes`, `dynamic`, `continuous`.

Starting it is never part of a run's time. Times are those at which this process could read a token.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from functools import cache

from llmperf import decoding, machine, predict
from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies.answers import RequestFailed
from llmperf.strategies.server import Server, ServerFailed

_sessions = 0
_kept: list[Server] = []  # at most one, alive from run to run inside a `session`


@contextmanager
def session() -> Iterator[None]:
    """Keep the server's processes between runs; on leaving the outermost session they end."""
    global _sessions
    _sessions += 1
    try:
        yield
    finally:
        _sessions -= 1
        if not _sessions:
            _close()


def ready(model: Model, processes: int, weights: str = "own") -> list[int]:
    """Have so many processes loaded; the process ids of those that this run will not use.

    Idle processes on the CPU only wait, and the memory sampler leaves them out. On a GPU each holds
    a context that the device level counts, so there they are ended.
    """
    kept = _kept[0] if _kept else None
    other = processes and kept and (kept.model.source, kept.weights) != (model.source, weights)
    too_many = kept and model.device != "cpu" and len(kept.pids()) > processes
    if other or too_many:
        _close()
    if not processes:
        return _kept[0].pids() if _kept else []
    if not _kept:
        _kept.append(Server(model, weights=weights))
    try:
        in_background(_kept[0].start(processes))
    except BaseException:
        _close()
        raise
    return _kept[0].pids(processes)


def run(
    model: Model,
    workload: Workload,
    options: Mapping,
    *,
    processes: int,
    rows: int,
    batching: str = "groups",
    weights: str = "own",
) -> Trace:
    """Send each request when it arrives and read its tokens as they come.

    A process that dies ends all of them, and the requests that were not answered have its reason.
    """
    requests = workload.requests
    how = {"rows": rows, "batching": batching, "loop": options.get("loop", decoding.DEFAULT_LOOP)}
    how["window_s"] = options.get("window_s", 0.002 if rows > 1 else 0.0)
    how["prompt_tokens"] = max(len(r.prompt_ids) for r in requests)
    how["new_tokens"] = max(r.max_new_tokens for r in requests)

    async def work(server: Server) -> Trace:
        prepared = await server.prepare(processes, **how)
        server.max_queue = options.get("max_queue", len(requests))
        gate = asyncio.Semaphore(options.get("concurrency", len(requests)))
        recorder = Recorder(requests)
        sends = [_send(server, r, workload, options, recorder, gate) for r in requests]
        rows_ = await asyncio.gather(*sends)
        recorder.merge(rows_, origin=0.0)
        trace = recorder.trace()
        try:
            reports = await server.report()
        except ServerFailed:
            reports = [{}] * processes
        served = Counter(row["worker"] for row in rows_)
        trace.notes.update(
            workers=[
                {"worker": str(i), "requests": served[str(i)], "load_s": load_s, **report}
                for i, (load_s, report) in enumerate(zip(server.load_s, reports, strict=False))
            ],
            loop=" and ".join(sorted({p["loop"] for p in prepared})),
            loop_reason=prepared[0]["reason"],
            intra_op_threads=prepared[0]["threads"],
            processes=processes,
            batch_sizes=list(server.batch_sizes),
            outcomes=dict(Counter(row["status"] for row in rows_)),
        )
        return trace

    with session():
        try:
            ready(model, processes, weights)
            return in_background(work(_kept[0]))
        except BaseException:
            _close()
            raise


async def _send(server, request: Request, workload, options, recorder, gate) -> dict:
    """One caller: wait for the arrival, send, read; returns the row, times as on perf_counter."""
    await asyncio.sleep(request.arrival_s - recorder.now())
    async with gate:
        recorder.submitted(request.id)
        how = {"sampling": workload.sampling, "stop": workload.stop}
        stream = server.generate(request, deadline_s=options.get("deadline_s"), **how)
        tokens = []
        try:
            async for token in stream:
                tokens.append(token)
        except RequestFailed:
            pass  # its status and reason are in the stream
    return {
        "id": request.id,
        "started_s": stream.started_s,
        "token_s": [t.at_s for t in tokens],
        "tokens": [t.id for t in tokens],
        "status": stream.status,
        "reason": stream.reason,
        "worker": stream.worker,
    }


def _close() -> None:
    if _kept:
        in_background(_kept.pop().close(drain=False))


def check_memory(
    model: Model, processes: int, weights: str = "own", free_bytes: int | None = None
) -> None:
    """Raise ValueError, with the arithmetic, when that many processes cannot fit what is free.

    The low bounds count, so that what is refused surely does not fit. `free_bytes` is asked of the
    machine when it is not given; memory that the kept processes hold counts as free.
    """
    spec = predict.RunSpec(
        model.shape, model.dtype, model.quantization, platform=machine.platform_word(model.device)
    )
    single = predict.memory(spec, idle_bytes=0)
    weights_bytes = single.line("weights").low
    each = single.low - weights_bytes
    copies = 1 if weights == "shared" else processes
    need = copies * weights_bytes + processes * each
    free = _free_bytes(model.device) if free_bytes is None else free_bytes
    free += single.low * len(_kept[0].pids()) if _kept and free_bytes is None else 0
    if need > free:
        most = (free - weights_bytes) // each if weights == "shared" else free // single.low
        gib = predict.GIB
        raise ValueError(
            f"{processes} processes need at least {copies} x {weights_bytes / gib:.2f} GiB of"
            f" weights + {processes} x {each / gib:.2f} GiB for each process = {need / gib:.2f}"
            f" GiB, and {free / gib:.2f} GiB are free: use at most {max(0, most)}"
        )


def _free_bytes(device: str) -> int:
    if device == "cpu":
        import psutil

        return psutil.virtual_memory().available
    import torch

    return torch.cuda.mem_get_info(device)[0]


def mps_daemon() -> object:
    """Whether NVIDIA's Multi-Process Service runs, or why that is not known."""
    running, why = machine.ask(machine.PROBES["mps_daemon"])
    return running if why is None else {"unavailable": why}


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="llmperf").start()
    return loop


def in_background(work: Coroutine):
    """Run `work` in an event loop in another thread until it is done; Ctrl-C here cancels it.

    A notebook's own loop is busy running the cell, and no second one can start in its thread.
    """
    future = asyncio.run_coroutine_threadsafe(work, _event_loop())
    try:
        while not wait([future], timeout=0.2).done:
            pass  # in slices, since Windows cannot interrupt a wait without a time limit
        return future.result()
    except BaseException:
        future.cancel()
        raise
