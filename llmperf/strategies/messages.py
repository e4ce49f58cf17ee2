"""A request on its way to an inference process: checked, written, read."""

from __future__ import annotations

from dataclasses import asdict

from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import Sampling


def check(request: Request, shape, sampling: Sampling, deadline_s: float | None) -> None:
    """Raise ValueError, in one sentence, for a request that can never be answered."""
    if not isinstance(request, Request):
        raise ValueError(f"a request is a text or a Request, not a {type(request).__name__}")
    total = len(request.prompt_ids) + request.max_new_tokens
    if total > shape.max_positions:
        raise ValueError(
            f"{len(request.prompt_ids)} prompt tokens + {request.max_new_tokens} new tokens ="
            f" {total}, but the model has {shape.max_positions} positions: shorten one of the two"
        )
    for id in (*request.prompt_ids, *sampling.suppress):
        if not (type(id) is int and 0 <= id < shape.vocab):
            most = shape.vocab - 1
            raise ValueError(f"{id!r} is not a token: ids are whole numbers from 0 to {most}")
    if deadline_s is not None and not deadline_s > 0:
        raise ValueError(f"deadline_s is {deadline_s}: it must be above 0 seconds, or None")


def dump(key: int, request: Request, sampling: Sampling, stop: Stop) -> dict:
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


def load(m: dict) -> tuple[Request, Sampling, Stop]:
    """The inverse of `dump`; the request's id is its key."""
    sampling = Sampling(**{**m["sampling"], "suppress": tuple(m["sampling"]["suppress"])})
    ends = {name: frozenset(m["stop"][name]) for name in ("end_ids", "sentence_ids")}
    stop = Stop(**ends, min_tokens=m["stop"]["min_tokens"])
    return Request(m["key"], tuple(m["prompt"]), m["new"], m["seed"]), sampling, stop
