"""What every run in this process needs: the queue, arrivals, an end from outside, an event loop."""

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping

from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import Recorder

SLEEP_S = 0.05  # the longest sleep before a thread looks whether the run was cancelled


class Cancelled(Exception):
    """The run was ended from outside: by Ctrl-C, or because another worker failed."""


def decode_arguments(
    workload: Workload, options: Mapping, cancel: threading.Event | None = None
) -> dict:
    """The arguments of `decoding.run`; without `loop` the default of `decoding` holds.

    When `cancel` is set, the decoding loop raises Cancelled after its next token.
    """
    on_step = options.get("on_step")

    def step() -> None:
        if cancel.is_set():
            raise Cancelled
        if on_step:
            on_step()

    loop = {"loop": options["loop"]} if "loop" in options else {}
    return loop | {"sampling": workload.sampling, "on_step": step if cancel else on_step}


def in_order(requests: Iterable[Request]) -> Iterator[Request]:
    """The requests by arrival, as one queue: `next` on it is safe from several threads."""
    lock, waiting = threading.Lock(), iter(sorted(requests, key=lambda r: r.arrival_s))

    def take() -> Request | None:
        with lock:
            return next(waiting, None)

    return iter(take, None)


def wait_for_arrival(
    request: Request, recorder: Recorder, cancel: threading.Event | None = None
) -> None:
    """Sleep until the request has arrived. Raises Cancelled when the run ends before."""
    while (left := request.arrival_s - recorder.now()) > 0:
        time.sleep(min(left, SLEEP_S))
        if cancel and cancel.is_set():
            raise Cancelled


def run_async(work: Coroutine):
    """Run `work` in an event loop of its own in this thread, also inside a notebook's event loop.

    The notebook's loop and its task, which wait for the cell, are put aside and back. Not
    `Runner.run`: it would hold Ctrl-C back until the next await.
    """
    outer = asyncio._get_running_loop()
    task = asyncio.current_task(outer) if outer else None
    if task:
        asyncio.tasks._leave_task(outer, task)
    asyncio._set_running_loop(None)
    main = None
    try:
        with asyncio.Runner() as runner:
            main = runner.get_loop().create_task(work)
            return runner.get_loop().run_until_complete(main)
    finally:
        if main and main.done() and not main.cancelled():
            main.exception()  # read, else asyncio reports a Ctrl-C a second time
        asyncio._set_running_loop(outer)
        if task:
            asyncio.tasks._enter_task(outer, task)
