"""N asyncio tasks around the blocking loop: the publication's "Coroutine Inference"."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median

from llmperf import decoding
from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import shared
from llmperf.strategies.strategy import Strategy, choice, in_words, workers

VARIANTS = ("blocking", "yielding", "to_thread", "executor")
BEAT_S = 0.01  # the heartbeat task asks for its turn this often


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Each task takes the next request until none is left; all share one event loop.

    Options: `workers` (default: a task for each request), `loop`, `on_step`, and `variant`:
    `blocking` calls the decoding loop inside the task, as published; `yielding` gives the event
    loop a turn after each token; `to_thread` hands each request to a thread of asyncio's own pool,
    `executor` to a pool of `workers` threads.

    The event loop runs in the caller's thread, as `sequential` does. In a second one the same work
    took 6 % longer on two cores: OpenMP counts the threads of both callers, finds more than cores,
    and puts its workers to sleep between operators (6,800 sleeps in 64 tokens instead of 67).
    """
    run_ = _Run(model, workload, options)
    with _no_event_loop_here(), asyncio.Runner() as runner:
        # not `runner.run`: it would hold Ctrl-C back until the next await, so for a whole answer
        runner.get_loop().run_until_complete(run_.main())
    return run_.trace


@contextmanager
def _no_event_loop_here() -> Iterator[None]:
    """In a notebook's thread a loop is at work; it waits for the cell, so here another may run.

    asyncio keeps the running loop and its task a thread; both are put aside and back.
    """
    outer = asyncio._get_running_loop()
    task = asyncio.current_task(outer) if outer else None
    if task:
        asyncio.tasks._leave_task(outer, task)
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)
        if task:
            asyncio.tasks._enter_task(outer, task)


class _Run:
    """One run: what its tasks share."""

    def __init__(self, model, workload, options):
        self.model, self.workload = model, workload
        self.loop = options.get("loop", "cached")
        self.variant = options.get("variant", "blocking")
        self.workers = options.get("workers", len(workload.requests))
        self.cancel = threading.Event()
        self.step = shared.stepper(self.cancel, options.get("on_step"))
        self.recorder: Recorder | None = None
        self.trace: Trace | None = None

    async def main(self) -> None:
        """Start all tasks and the heartbeat, wait for the tasks, close the trace."""
        late: list[float] = []
        queue = shared.in_order(self.workload.requests)
        with self.answerer() as answer, _heartbeat(late) as heart:
            await asyncio.sleep(0)  # the heartbeat is running before the first task
            self.recorder = Recorder(self.workload.requests)
            await asyncio.gather(*(self.task(queue, answer, str(i)) for i in range(self.workers)))
            self.trace = self.recorder.trace()
            heart.cancel()
            await asyncio.gather(heart, return_exceptions=True)
        self.trace.notes.update(
            variant=self.variant,
            tasks=self.workers,
            event_loop={
                "beat_s": BEAT_S,
                "beats": len(late),
                "longest_block_s": max(late),
                "median_lag_s": median(late),
            },
        )

    async def task(self, queue: Iterator[Request], answer: Callable, label: str) -> None:
        """One task: its share of the queue, one request after another."""
        try:
            for request in queue:
                while (left := request.arrival_s - self.recorder.now()) > 0:
                    await asyncio.sleep(min(left, shared.SLEEP_S))
                    if self.cancel.is_set():
                        raise shared.Cancelled
                await answer(request, label)
        except BaseException:
            self.cancel.set()  # the other tasks, and their threads, end at their next token
            raise

    @contextmanager
    def answerer(self) -> Iterator[Callable[[Request, str], Awaitable[None]]]:
        """How this variant answers a request: `await answer(request, label)`."""
        if self.variant == "executor":
            with ThreadPoolExecutor(self.workers) as pool:
                loop = asyncio.get_running_loop()
                yield lambda *request: loop.run_in_executor(pool, self.block, *request)
            return
        yield {
            "blocking": self.blocking,
            "yielding": self.yielding,
            "to_thread": lambda *request: asyncio.to_thread(self.block, *request),
        }[self.variant]

    def how(self, label: str) -> dict:
        return {
            "loop": self.loop,
            "sampling": self.workload.sampling,
            "stop": self.workload.stop,
            "worker": label,
        }

    def block(self, request: Request, label: str) -> None:
        """The decoding loop to its end: whoever calls this does nothing else meanwhile."""
        how = self.how(label)
        decoding.run(self.model, [request], self.recorder, on_step=self.step, **how)

    async def blocking(self, request: Request, label: str) -> None:
        """`async`, and yet nobody else runs: there is no `await` inside."""
        self.block(request, label)

    async def yielding(self, request: Request, label: str) -> None:
        """The event loop gets a turn after each token."""
        for _ in decoding.steps(self.model, [request], self.recorder, **self.how(label)):
            self.step()
            await asyncio.sleep(0)


@contextmanager
def _heartbeat(late: list[float]) -> Iterator[asyncio.Task]:
    """A task that wants its turn every `BEAT_S` and notes in `late` by how much it came later."""

    async def beat() -> None:
        due = time.perf_counter() + BEAT_S
        try:
            while True:
                await asyncio.sleep(BEAT_S)
                late.append(max(0.0, time.perf_counter() - due))
                due = time.perf_counter() + BEAT_S
        finally:  # when nobody else ever ran, the only beat is one that is overdue
            late.append(max(0.0, time.perf_counter() - due))

    task = asyncio.create_task(beat())
    try:
        yield task
    finally:
        task.cancel()


def _threads(level: int, options: Mapping) -> int:
    alone = options.get("variant", "blocking") in ("blocking", "yielding")
    return 1 if alone else min(options.get("workers", level), level)


STRATEGY = Strategy(
    "coroutine",
    run,
    in_words("{level} coroutines", "variant", "workers"),
    style=4,
    options={"variant": choice(*VARIANTS), "workers": workers},
    threads=_threads,
)
