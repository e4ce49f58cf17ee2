"""The server kept from run to run for `processes`, `dynamic` and `continuous`.

Starting it is never part of a run's time.
"""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.machine import ask, gpu
from llmperf.machine.gpu import torch_in_use
from llmperf.models import Model
from llmperf.strategies.server import Server

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
            close()


def ensure_started(model: Model, processes: int, weights: str = "own") -> list[int]:
    """Start the server's processes; return the pids this run does not use.

    On a GPU an idle process holds a context that the device level counts, so there it is ended.
    """
    kept = _kept[0] if _kept else None
    other = processes and kept and (kept.model.source, kept.weights) != (model.source, weights)
    too_many = kept and model.device != "cpu" and len(kept.pids()) > processes
    if other or too_many:
        close()
    if not processes:
        return pids()
    if not _kept:
        _kept.append(Server(model, weights=weights))
        _kept[0].device_before = _device_used(model.device)
    _kept[0].start(processes)
    return _kept[0].pids(processes)


def kept_server(model: Model, processes: int = 1, weights: str = "own") -> Server:
    """The started server of `processes`, `dynamic` and `continuous`; use it inside a `session`."""
    ensure_started(model, processes, weights)
    return _kept[0]


def pids() -> list[int]:
    """The kept processes."""
    return _kept[0].pids() if _kept else []


def run(model: Model, workload: Workload, processes: int = 1, weights: str = "own", **how) -> Trace:
    """Run on the kept server; `how` as for `Server.run`."""
    how.pop("on_step", None)
    with session():
        server = kept_server(model, processes, weights)
        trace = server.run(workload, processes=processes, **how)
    if server.device_before:
        trace.notes["device_before"] = server.device_before
    return trace


def _device_used(device: str) -> dict:
    """`bytes` in use on a card, or None and the `reason`; without what this process's allocator
    keeps unused. Empty on a processor."""
    if device == "cpu":
        return {}
    if torch := torch_in_use():
        torch.cuda.empty_cache()
    used, reason = ask(lambda: gpu.used_bytes(device))
    return {"bytes": used, "reason": reason}


def close() -> None:
    """End the kept processes."""
    if _kept:
        _kept.pop().close()


atexit.register(close)  # of a session that nobody leaves
