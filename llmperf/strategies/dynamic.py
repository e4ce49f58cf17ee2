"""Two kinds of process: I/O and CPU work here, inference there; what waits becomes a batch.

The publication recommends it in its summary and did not measure it. The server is the library in
`llmperf.strategies.serving`; this strategy is one of its callers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import background
from llmperf.strategies.serving import RequestFailed, Server
from llmperf.strategies.strategy import Strategy, at_most, count, in_words, number


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Send each request to the server when it arrives, and read its tokens as they come.

    Options: `max_batch` (default 8), `window_s` (0.002), `max_queue` (default: all requests),
    `processes` (1), `concurrency` (at most so many in flight: a closed loop), `deadline_s`, `loop`.
    Inside a `strategies.session()` the server stays up for the next run of the same kind. Starting
    it is never timed. Times are those at which this process could read a token.
    """
    with session():
        return background.wait(_run(model, workload, options))


@contextmanager
def session() -> Iterator[None]:
    """Inside, the server stays up from run to run; on leaving the outermost it is ended."""
    global _sessions
    _sessions += 1
    try:
        yield
    finally:
        _sessions -= 1
        if not _sessions:
            _close()


def ready(model: Model, level: int, options: Mapping) -> list[int]:
    """Have the server of this condition loaded; none of its processes is idle in a run."""
    background.wait(_server(model, options))
    return []


def rest(model: Model) -> list[int]:
    """Before a run of another strategy: the processes that only wait meanwhile.

    On a GPU each holds a context that the device level counts, so there they are ended.
    """
    if _kept and model.device != "cpu":
        _close()
    return _kept[0][1].pids if _kept else []


def _close() -> None:
    if _kept:
        background.wait(_kept.pop()[1].close())


async def _run(model: Model, workload: Workload, options: Mapping) -> Trace:
    server = await _server(model, options)
    server.max_queue = options.get("max_queue", len(workload.requests))
    server.configure(options.get("max_batch", 8), options.get("window_s", 0.002))
    server.batch_sizes.clear()
    gate = asyncio.Semaphore(options.get("concurrency", len(workload.requests)))
    recorder = Recorder(workload.requests)
    sends = [_send(server, r, workload, options, recorder, gate) for r in workload.requests]
    recorder.merge(await asyncio.gather(*sends), origin=0.0)
    return recorder.trace(
        batch_sizes=list(server.batch_sizes),
        processes=options.get("processes", 1),
        load_s=server.load_s,
        outcomes=dict(Counter(row["status"] for row in recorder.rows())),
    )


async def _send(server, request: Request, workload, options, recorder, gate) -> dict:
    """One caller: wait for the arrival, send, read; returns the row, times as on perf_counter."""
    await asyncio.sleep(request.arrival_s - recorder.now())
    async with gate:
        recorder.submitted(request.id)
        stream = server.generate(
            request,
            sampling=workload.sampling,
            stop=workload.stop,
            deadline_s=options.get("deadline_s"),
        )
        tokens = []
        try:
            async for token in stream:
                tokens.append(token)
        except RequestFailed:
            pass  # its status and reason are in the stream
    return {
        "id": request.id,
        "started_s": stream.times["started_s"],
        "token_s": [t.at_s for t in tokens],
        "tokens": [t.id for t in tokens],
        "status": stream.status,
        "reason": stream.reason,
        "worker": stream.times["worker"],
    }


_sessions = 0
_kept: list[tuple[tuple, Server]] = []  # at most one, for the next run of the same kind


async def _server(model: Model, options: Mapping) -> Server:
    """The kept server if it is of this kind and alive, else a new one in its place."""
    kind = (model.source, options.get("processes", 1), options.get("loop", "cached"))
    if _kept and _kept[0][0] != kind:
        await _kept.pop()[1].close()
    if not _kept:
        _kept.append((kind, Server(model, processes=kind[1], loop=kind[2])))
    await _kept[0][1].start()  # starts what is missing: all processes, or those that have died
    return _kept[0][1]


STRATEGY = Strategy(
    "dynamic",
    run,
    in_words("dynamic batching", "max_batch", "window_s", "processes", "concurrency"),
    style=3,
    options={
        "max_batch": count,
        "window_s": number(0, 60),
        "max_queue": count,
        "processes": count,
        "concurrency": count,
        "deadline_s": number(0),
    },
    rows_per_step=at_most("max_batch", 8),
    processes=lambda level, options: options.get("processes", 1),
)
