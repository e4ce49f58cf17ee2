"""One request's answer on its way: the server pushes tokens, the caller reads them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llmperf.decoding.trace import CANCELLED, OK

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character
PATIENCE = 8  # ids to wait for a character's end; UTF-8 needs 4 bytes at most, so this is no text


@dataclass(frozen=True, slots=True)
class Token:
    """One token as the caller gets it; `text` is empty while a character is unfinished."""

    id: int
    text: str
    at_s: float  # time.perf_counter when it was ready to be read


class RequestFailed(RuntimeError):
    """The request ended without its answer: `status` is a status of `llmperf.decoding.trace`."""

    def __init__(self, status: str, reason: str):
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class Detokenizer:
    """Feed it ids, get the text that has become certain; without a tokenizer there is none.

    A token may hold a part of a character, and its text may depend on the token before it (a
    leading space). So a few earlier ids are decoded along and their text is cut off again, as vLLM
    and text-generation-inference do.
    """

    def __init__(self, tokenizer=None):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids whose text is already out
        self._pending: list[int] = []  # ids whose text is not

    def add(self, id: int, last: bool = False) -> str:
        """The text that this id completes; empty while a character is open, unless it is `last`."""
        if self._tokenizer is None:
            return ""
        self._pending.append(id)
        known = self._decode(self._context)
        text = self._decode(self._context + self._pending)[len(known) :]
        unfinished = text.endswith(REPLACEMENT) and len(self._pending) < PATIENCE
        if not last and (not text or unfinished):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class Stream:
    """A request's answer: the server pushes tokens, the caller reads `async for token in stream`.

    It ends after the last token, or raises RequestFailed. `status` is ok, error, rejected,
    cancelled or expired (`reason` says why it is not ok), and None before. `started_s` is when
    decoding began (perf_counter), `worker` which process has it. A reader that is slow holds up
    nobody: at most `max_new_tokens` tokens wait for it.
    """

    def __init__(self, key: int, message: dict, tokenizer, end: Callable[..., None]):
        self.key, self.message = key, message
        self.started_s: float | None = None
        self.worker = "0"
        self.status: str | None = None
        self.reason: str | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._end = end  # of the server: (stream, status, reason)
        self._unread: deque[Token] = deque()
        self._news = asyncio.Event()
        self._detokenizer = Detokenizer(tokenizer)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Token:
        while not self._unread:
            if self.status == OK:
                raise StopAsyncIteration
            if self.status is not None:
                raise RequestFailed(self.status, self.reason)
            self._news.clear()
            try:
                await self._news.wait()
            except asyncio.CancelledError:  # the caller's task was cancelled, so the request is
                self.cancel()
                raise
        return self._unread.popleft()

    def cancel(self) -> None:
        """End the request now, unless it has ended. Call it in the server's event loop."""
        self._end(self, CANCELLED, "the caller cancelled it")

    def push(self, id: int, last: bool) -> None:
        """A token has come."""
        self._unread.append(Token(id, self._detokenizer.add(id, last), time.perf_counter()))
        self._news.set()

    def finish(self, status: str, reason: str | None = None) -> None:
        """The one outcome. A second one is a fault of the server and raises RuntimeError."""
        if self.status is not None:
            raise RuntimeError(f"request {self.key} has already ended as {self.status!r}")
        self.status, self.reason = status, reason
        if self.timer:
            self.timer.cancel()
        self._news.set()
