"""Server-sent events of an OpenAI-compatible stream, with everything that may be wrong in them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

LONGEST_EVENT = 1 << 20  # bytes: no honest event is longer
DRAIN_S = 0.5  # for what may follow the answer's end
CHARACTERS_PER_TOKEN = 64  # of the longest plausible answer, so that memory stays bounded


class BrokenStream(ValueError):
    """The stream is not what it should be; the message says how."""


@dataclass(frozen=True)
class Chunk:
    """A piece of text, when it came (perf_counter), and the server's own count if it gave one."""

    text: str
    at_s: float
    usage_tokens: int | None = None


async def read_chunks(stream: AsyncIterator[bytes], max_new_tokens: int) -> AsyncIterator[Chunk]:
    """The pieces of one answer, up to its end.

    Raises BrokenStream for an event that is not JSON, the server's own error event, one that never
    ends, far more text than was asked for, and a stream that stops before its end.
    """
    ended, characters = False, 0
    events = _events(stream)
    async for data, at in events:
        if data == "[DONE]":
            await _drain(events)
            return
        chunk, last = _parse(data, at)
        ended = ended or last
        characters += len(chunk.text)
        if characters > CHARACTERS_PER_TOKEN * (max_new_tokens + 16):
            raise BrokenStream(f"the server sent far more than {max_new_tokens} tokens")
        yield chunk
    if not ended:
        raise BrokenStream("the server closed the stream before the answer's end")


async def _drain(events: AsyncIterator) -> None:
    """Read to the end of the body: only then can the connection be used again."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in events:
                pass


async def _events(stream: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, float]]:
    """Each line of data and when it came; comments and field names are left out."""
    rest = b""
    async for part in stream:
        at = time.perf_counter()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode(errors="replace"), at
        if len(rest) > LONGEST_EVENT:
            raise BrokenStream(f"the server sent an event of more than {LONGEST_EVENT} bytes")


def _parse(data: str, at: float) -> tuple[Chunk, bool]:
    """The chunk and whether it is the last with text, from one event."""
    try:
        event = json.loads(data)
    except ValueError:
        raise BrokenStream(f"the server sent an event that is not JSON: {data[:80]!r}") from None
    if not isinstance(event, dict):
        raise BrokenStream(f"the server sent an event that is no object: {data[:80]!r}")
    if event.get("error"):
        error = event["error"]
        said = error.get("message", error) if isinstance(error, dict) else error
        raise BrokenStream(f"the server reported an error: {str(said)[:200]}")
    try:
        choice = (event.get("choices") or [{}])[0]
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        usage = (event.get("usage") or {}).get("completion_tokens")
        return Chunk(str(text), at, usage), choice.get("finish_reason") is not None
    except (AttributeError, TypeError, KeyError):
        raise BrokenStream(f"the server sent an event of another form: {data[:80]!r}") from None
