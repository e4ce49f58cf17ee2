"""An event loop in a thread of its own, for strategies that are asynchronous inside.

A notebook's own loop is busy running the cell, and a second one cannot be started in its thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import wait as done
from functools import cache


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="llmperf").start()
    return loop


def wait(work: Coroutine):
    """Run `work` in that loop until it is done; an interrupt here cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, _event_loop())
    try:
        while not done([future], timeout=0.2).done:
            pass  # waiting in slices, since Windows cannot interrupt a wait without a time limit
        return future.result()
    except BaseException:
        future.cancel()
        raise
