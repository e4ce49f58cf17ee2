"""What a server lets in: limits and requests checked, in one sentence each."""

from __future__ import annotations

from dataclasses import asdict

from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import Sampling


def threads_each(processes: int) -> int | None:
    """The share of the cores of each of several processes; None (torch's default) for one."""
    import psutil

    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return None if processes == 1 else max(1, cores // processes)


def check_request(request: Request, shape, sampling: Sampling, deadline_s: float | None) -> None:
    """Raise ValueError, in one sentence, for a request that can never be answered."""
    total = len(request.prompt_ids) + request.max_new_tokens
    if total > shape.max_positions:
        raise ValueError(
            f"{len(request.prompt_ids)} prompt tokens + {request.max_new_tokens} new tokens ="
            f" {total}, but the model has {shape.max_positions} positions: shorten one of the two"
        )
    wrong = [i for i in request.prompt_ids if not (type(i) is int and 0 <= i < shape.vocab)]
    wrong += [i for i in sampling.suppress if not 0 <= i < shape.vocab]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is not a token of the model: ids are whole numbers from 0 to"
            f" {shape.vocab - 1}"
        )
    if deadline_s is not None and not deadline_s > 0:
        raise ValueError(f"deadline_s is {deadline_s}: it must be above 0 seconds, or None")


def check_limits(max_batch: int, window_s: float, max_queue: int, processes: int) -> None:
    """Raise ValueError, in one sentence, for limits of a server that cannot be."""
    limits = {"max_batch": max_batch, "max_queue": max_queue, "processes": processes}
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if not 0 <= window_s < 60:
        raise ValueError(f"window_s is {window_s}: it must be at least 0 and under 60 seconds")


def message(key: int, request: Request, sampling: Sampling, stop: Stop) -> dict:
    """A request as it crosses the pipe."""
    ends = {"end_ids": sorted(stop.end_ids), "sentence_ids": sorted(stop.sentence_ids)}
    return {
        "do": "run",
        "key": key,
        "prompt": request.prompt_ids,
        "new": request.max_new_tokens,
        "seed": request.seed,
        "sampling": asdict(sampling),
        "stop": {**ends, "min_tokens": stop.min_tokens},
    }
