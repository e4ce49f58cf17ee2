"""Batches that start and end together, behind the methods of `decoding.Slots`."""

from __future__ import annotations

from collections.abc import Callable

from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import Sampling


class Grouped:
    """A group of up to `rows` requests is one batch of `decode`; the next one waits for its end.

    `decode(requests, sampling, stop)` gives one list of tokens a step, None for rows that ended.
    All requests of a group are sampled and stopped like its first.
    """

    def __init__(self, decode: Callable, rows: int, loop: str = "", reason: str | None = None):
        self.loop, self.reason = loop, reason
        self._decode, self._rows = decode, rows
        self._group: list[tuple] = []  # (key, request, sampling, stop)
        self._left: set = set()  # keys that still want tokens
        self._steps, self._count = None, 0

    @property
    def free(self) -> int:
        return 0 if self._steps else self._rows - len(self._group)

    def admit(self, key, request: Request, sampling: Sampling, stop: Stop) -> None:
        """Add a request to the group that starts with the next step."""
        self._group.append((key, request, sampling, stop))
        self._left.add(key)

    def drop(self, key) -> None:
        """The request is no longer wanted; the group ends when none is."""
        self._left.discard(key)
        if not self._left:
            if self._steps:
                self._steps.close()
            self._group, self._steps, self._count = [], None, 0

    def step(self) -> list[tuple]:
        """(key, token, whether it is the last) of each request that is still wanted."""
        if self._steps is None:
            _, _, sampling, stop = self._group[0]
            self._steps = self._decode([g[1] for g in self._group], sampling, stop)
        row = next(self._steps, None)
        if row is None:
            raise RuntimeError("the decoding loop ended before the request did")
        self._count += 1
        found = []
        for (key, request, _, stop), token in zip(self._group, row, strict=True):
            if token is not None and key in self._left:
                last = self._count >= request.max_new_tokens or stop.ends(token, self._count)
                found.append((key, token, last))
        for key, _, last in found:
            if last:
                self.drop(key)
        return found
