"""Server-sent events of an OpenAI-compatible stream, with everything that may be wrong in them."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson

LONGEST_EVENT = 1 << 20  # bytes: no honest event is longer
CHARACTERS_PER_TOKEN = 64  # of the longest plausible answer, so that memory stays bounded
MOST_TOKENS = 10**9  # that a server may say it has counted


class BrokenStream(ValueError):
    """The stream is not what it should be; the message says how, and is not yet cut or cleaned."""


@dataclass(frozen=True)
class Chunk:
    """A piece of text, when it came (perf_counter), and the server's own count if it gave one."""

    text: str
    at_s: float
    usage_tokens: int | None = None


async def read_chunks(stream: AsyncIterator[bytes], max_new_tokens: int) -> AsyncIterator[Chunk]:
    """The pieces of one answer, up to its end. Raises BrokenStream."""
    ended, done, characters, unfinished = False, False, 0, b""
    async for received in stream:  # to its end, which frees the connection
        at = time.perf_counter()
        *lines, unfinished = (unfinished + received).split(b"\n")
        if len(unfinished) > LONGEST_EVENT:
            raise BrokenStream(f"the server sent an event of more than {LONGEST_EVENT} bytes")
        for line in lines:
            data = line[5:].strip().decode(errors="replace")
            done = done or data == "[DONE]"
            if done or not line.startswith(b"data:"):
                continue  # comments and field names
            chunk, last = _parse(data, at)
            ended = ended or last
            characters += len(chunk.text)
            if characters > CHARACTERS_PER_TOKEN * (max_new_tokens + 16):
                raise BrokenStream(f"the server sent far more than {max_new_tokens} tokens")
            yield chunk
    if not (ended or done):
        raise BrokenStream("the server closed the stream before the answer's end")


def _parse(data: str, at: float) -> tuple[Chunk, bool]:
    """The chunk and whether it is the last with text, from one event."""
    try:
        event = orjson.loads(data)  # NaN, Infinity and lone surrogates are none either
    except ValueError:
        raise BrokenStream(f"the server sent an event that is not JSON: {data!r}") from None
    try:
        if error := event.get("error"):
            said = error.get("message", error) if isinstance(error, dict) else error
            raise BrokenStream(f"the server reported an error: {said}")
        choice = (event.get("choices") or [{}])[0]
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        tokens = (event.get("usage") or {}).get("completion_tokens")
        counted = tokens is None or type(tokens) is int and 0 <= tokens <= MOST_TOKENS
        if not (isinstance(text, str) and counted):
            raise TypeError
        return Chunk(text, at, tokens), choice.get("finish_reason") is not None
    except (AttributeError, TypeError, LookupError):
        raise BrokenStream(f"the server sent an event of another form: {data!r}") from None
