"""Any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, `transformers serve`.

The key is read from the environment and goes into one header, never into a record.
"""

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import httpx
import orjson

from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import ERROR, OK, Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import run_control
from llmperf.strategies.strategy import COUNT, TEXT, Strategy, choice, in_words, number

PATHS = {"completions": "completions", "chat": "chat/completions"}
MAX_CONNECTIONS = 256  # more requests than this wait for one that is free
LOCAL = ("localhost", "127.0.0.1", "::1")
ERROR_BYTES = 1 << 16  # of an error's body that are read
REASON_CHARACTERS = 300
CONNECT_S = 5.0
TIMEOUTS_S = {"timeout_s": 60.0, "deadline_s": 600.0}
LONGEST_EVENT = 1 << 20  # bytes: no honest event is longer
CHARACTERS_PER_TOKEN = 64  # of the longest plausible answer, so that memory stays bounded
MOST_TOKENS = 10**9  # that a server may say it has counted
OWN_FIELDS = {"model", "prompt", "messages", "max_tokens", "stream"}


class BrokenStream(ValueError):
    """The stream is not what it should be; the message says how, and is not yet cut or cleaned."""


@dataclass(frozen=True)
class Chunk:
    """A piece of text, when it came (perf_counter), and the server's own count if it gave one."""

    text: str
    at_s: float
    usage_tokens: int | None = None


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Send each request when it arrives; times are those at which its events reached this client.

    Options: `url` (such as http://localhost:8000/v1), `served_model` (its name there; default the
    model's), `api` (`completions`, or `chat`, which adds the server's chat template), `key_env`
    (OPENAI_API_KEY), `timeout_s` (60, between two events), `deadline_s` (600, a whole request),
    `concurrency` (a closed loop), `extra` (fields added to each request, such as
    {"ignore_eos": True} for a forced length on vLLM or SGLang).

    Tokens are counted by tokenizing the answer, since an event may carry several or none; each has
    the time of the event that completed its text. The server's own count is in the notes, and in
    `not_followed` the names of what was asked of the sampling and has no place in the API; `extra`
    can give a server top_k where it knows it.
    """
    return run_control.run_async(_run(model, workload, options))


async def _run(model: Model, workload: Workload, options: Mapping) -> Trace:
    n = options.get("concurrency", len(workload.requests))
    key = os.environ.get(options["key_env"], "").strip()
    asked = workload.sampling
    top_k = None if asked.greedy or "top_k" in options["extra"] else asked.top_k
    unsent = {"top_k": top_k, "suppress": asked.suppress}
    usage: list[int] = []  # tokens of each answer, as the server says

    async def answer(request: Request) -> dict:
        """One request from arrival to its one outcome; the row's times are as on perf_counter."""
        await asyncio.sleep(request.arrival_s - recorder.now())
        chunks: list[Chunk] = []
        row = {"id": request.id, "started_s": None, "status": OK}
        async with gate:
            recorder.submitted(request.id)
            try:
                async with asyncio.timeout(options["deadline_s"]):
                    body = _body(model, workload, request, options)
                    await _stream(client, options, body, chunks)
                usage.extend([c.usage_tokens for c in chunks if c.usage_tokens is not None][-1:])
                some = any(c.text for c in chunks)
                reason = None if some else "the server ended the answer without any text"
            except Exception as error:  # each request gets an outcome, whatever the server does
                reason = _reason(error, options)
        if reason:
            clean = reason.replace(key or "\0", "***").encode(errors="replace").decode()
            row |= {"status": ERROR, "reason": clean[:REASON_CHARACTERS]}
        return row | _tokens(model.tokenizer, chunks)

    async with _client(options, key, n) as client:
        recorder, gate = Recorder(workload.requests), asyncio.Semaphore(n)
        rows = await asyncio.gather(*map(answer, workload.requests))
        recorder.merge(rows)
        return recorder.trace(
            usage_tokens=sum(usage) if usage else None,
            tokens_comparable=False,  # another engine, with random numbers of its own
            not_followed=[name for name, value in unsent.items() if value],
        )


def _client(options: Mapping, key: str, connections: int) -> httpx.AsyncClient:
    """One pool of connections for the run. Redirects are not followed: they may leak a key."""
    url, n = httpx.URL(options["url"]), min(connections, MAX_CONNECTIONS)
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(
        base_url=str(url).rstrip("/") + "/",
        headers={"Accept-Encoding": "identity"} | authorization,
        timeout=httpx.Timeout(options["timeout_s"], connect=CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=n, max_keepalive_connections=n),
        trust_env=url.host not in LOCAL,  # no proxy in front of this machine itself
    )


async def _stream(client: httpx.AsyncClient, options: Mapping, body: dict, chunks: list) -> None:
    """Read one answer into `chunks`. Compressed bodies are refused: a small one may be a bomb."""
    async with client.stream("POST", PATHS[options["api"]], json=body) as response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise BrokenStream("the server compressed its answer, which was not asked for")
        if response.status_code != 200:
            said = b""
            async for received in response.aiter_raw():
                said += received[:ERROR_BYTES]
                if len(said) > ERROR_BYTES:
                    break
            words = " ".join(said.decode(errors="replace").split())
            raise BrokenStream(f"the server answered {response.status_code}: {words}")
        async for chunk in read_chunks(response.aiter_raw(), body["max_tokens"]):
            if chunk.text or chunk.usage_tokens is not None:
                chunks.append(chunk)


def _body(model: Model, workload: Workload, request: Request, options: Mapping) -> dict:
    sampling = workload.sampling
    prompt = model.tokenizer.decode(request.prompt_ids)
    chat = {"messages": [{"role": "user", "content": prompt}]}
    body = {
        "model": options.get("served_model", model.name),
        "max_tokens": request.max_new_tokens,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not sampling.greedy and sampling.top_p is not None:
        body["top_p"] = sampling.top_p
    body |= chat if options["api"] == "chat" else {"prompt": prompt}
    return body | dict(options["extra"])


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


def _tokens(tokenizer, chunks: list[Chunk]) -> dict:
    """The answer's tokens, each with the time of the event that brought its last character."""
    chunks = [c for c in chunks if c.text]
    answer = "".join(c.text for c in chunks)
    found = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    ends = list(accumulate(len(c.text) for c in chunks))  # of each chunk, in characters
    times = [chunks[bisect_left(ends, end)].at_s for _, end in found["offset_mapping"]]
    return {"tokens": list(found["input_ids"]), "token_s": times}


def _reason(error: Exception, options: Mapping) -> str:
    """One sentence: what happened, at which server."""
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout():
            return f"no server answers at {options['url']}: {error or 'no connection in time'}"
        case httpx.ReadTimeout():
            return f"no event for {options['timeout_s']:g} s (timeout_s)"
        case TimeoutError():
            return f"no whole answer within {options['deadline_s']:g} s (deadline_s)"
        case BrokenStream():
            return str(error)
        case httpx.LocalProtocolError():  # its text may quote the key, escaped
            return "the request cannot be sent: look at the key and the url for stray characters"
    return f"{type(error).__name__}: {error}"


def _refuse(model: Model, level: int, options: Mapping) -> None:
    try:
        url = httpx.URL(options.get("url", ""))
    except httpx.InvalidURL:
        url = httpx.URL("")
    port = url.port or 80  # httpx takes any number
    if url.scheme not in ("http", "https") or not url.host or not 0 < port < 65536:
        raise ValueError(
            f"url is {options.get('url', '')!r}: give the server's base address, such as"
            " http://localhost:8000/v1"
        )
    if not os.environ.get(options["key_env"], "").isascii():
        raise ValueError(f"the key in {options['key_env']} has non-ASCII characters: set it again")
    if url.userinfo:
        raise ValueError(
            "the url names a password: set it in the environment and name it with key_env"
        )


STRATEGY = Strategy(
    "endpoint",
    run,
    in_words("an endpoint", "served_model", "concurrency"),
    style=5,
    options={
        "url": TEXT,
        "served_model": TEXT,
        "api": choice(*PATHS),
        "key_env": TEXT,
        **dict.fromkeys(TIMEOUTS_S, number(1e-3, 1e6)),
        "concurrency": COUNT,
        "extra": (
            lambda v: isinstance(v, Mapping) and not OWN_FIELDS & v.keys(),
            f"a mapping: fields added to each request, none of {', '.join(sorted(OWN_FIELDS))}",
        ),
    },
    defaults={"api": "completions", "key_env": "OPENAI_API_KEY", "extra": {}, **TIMEOUTS_S},
    refuse=_refuse,
    rows_per_step=lambda level, options: level,
    processes=lambda level, options: 0,
    foreign=True,
)
