"""Any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, `transformers serve`.

The way past one GPU and one machine. The model given here lends its tokenizer alone
(`models.front` loads no weights); what the server runs is the server's affair. The key is read from
the environment and goes into one header, never into a record.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import ERROR, OK, Recorder, Trace
from llmperf.models import Model
from llmperf.strategies.events import BrokenStream, Chunk, read_chunks
from llmperf.strategies.served import in_background
from llmperf.strategies.strategy import Strategy, choice, count, in_words, number, text

APIS = {"completions": "completions", "chat": "chat/completions"}
BUSY = {429, 502, 503, 504}  # worth another try
MAX_CONNECTIONS = 256  # more requests than this wait for one that is free
LOCAL = ("localhost", "127.0.0.1", "::1")
ERROR_BYTES = 1 << 16  # of an error's body that are read
REASON_CHARACTERS = 300
TIMEOUTS_S = {"timeout_s": 60.0, "connect_timeout_s": 5.0, "deadline_s": 600.0}


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Send each request when it arrives; times are those at which its events reached this client.

    Options: `url` (such as http://localhost:8000/v1), `served_model` (its name there; default the
    model's), `api` (`completions`, or `chat`, which adds the server's chat template), `key_env`
    (OPENAI_API_KEY), `timeout_s` (60, between two events), `connect_timeout_s` (5), `deadline_s`
    (600, a whole request), `retries` (2), `concurrency` (a closed loop), `extra` (fields added to
    each request, such as {"ignore_eos": True} for a forced length on vLLM or SGLang).

    A refused connection and "too busy" are tried again; every retry is counted in the notes and its
    time stays in the request's TTFT. Tokens are counted by tokenizing the answer, since an event
    may carry several or none; each has the time of the event that completed its text. The server's
    own counts are in the notes.
    """
    return in_background(_run(model, workload, TIMEOUTS_S | {**options}))


@dataclass
class _Session:
    """What the requests of a run have in common."""

    model: Model
    workload: Workload
    options: Mapping
    client: httpx.AsyncClient
    recorder: Recorder
    gate: asyncio.Semaphore
    key: str
    counts: Counter = field(default_factory=Counter)
    usage: dict[int, int] = field(default_factory=dict)  # request → tokens, as the server says


async def _run(model: Model, workload: Workload, options: Mapping) -> Trace:
    n = options.get("concurrency", len(workload.requests))
    key = os.environ.get(options.get("key_env", "OPENAI_API_KEY"), "")
    async with _client(options, key, n) as client:
        recorder, gate = Recorder(workload.requests), asyncio.Semaphore(n)
        session = _Session(model, workload, options, client, recorder, gate, key)
        rows = await asyncio.gather(*(_one(session, r) for r in workload.requests))
        recorder.merge(rows, origin=0.0)
        return recorder.trace(
            retries=session.counts["retries"],
            connections=session.counts["connections"],
            answers_with_usage=len(session.usage),
            usage_tokens=sum(session.usage.values()),
            usage_tokens_by_request=session.usage,
            outcomes=dict(Counter(row["status"] for row in rows)),
            tokens_comparable=False,  # another engine, with random numbers of its own
        )


def _client(options: Mapping, key: str, connections: int) -> httpx.AsyncClient:
    """One pool of connections for the run. Redirects are not followed: they may leak a key."""
    url, n = httpx.URL(options["url"]), min(connections, MAX_CONNECTIONS)
    return httpx.AsyncClient(
        base_url=str(url).rstrip("/") + "/",
        headers={"Accept-Encoding": "identity"}
        | ({"Authorization": f"Bearer {key}"} if key else {}),
        timeout=httpx.Timeout(
            options["timeout_s"], connect=options["connect_timeout_s"], pool=None
        ),
        limits=httpx.Limits(max_connections=n, max_keepalive_connections=n),
        trust_env=url.host not in LOCAL,  # no proxy in front of this machine itself
    )


async def _one(session: _Session, request: Request) -> dict:
    """One request from arrival to its one outcome; the row's times are as on perf_counter."""
    recorder = session.recorder
    await asyncio.sleep(request.arrival_s - recorder.now())
    chunks: list[Chunk] = []
    row = {"id": request.id, "started_s": None, "status": OK, "tokens": [], "token_s": []}
    async with session.gate:
        recorder.submitted(request.id)
        try:
            async with asyncio.timeout(session.options["deadline_s"]):
                await _with_retries(session, request, chunks)
            reason = None if chunks else "the server ended the answer without any text"
        except Exception as error:  # each request gets an outcome, whatever the server does
            reason = _reason(error, session.options)
    if reason:
        clean = reason.replace(session.key or "\0", "***").encode(errors="replace").decode()
        row |= {"status": ERROR, "reason": clean[:REASON_CHARACTERS]}
    return row | _tokens(session.model.tokenizer, chunks)


async def _with_retries(session: _Session, request: Request, chunks: list[Chunk]) -> None:
    left, pause = session.options.get("retries", 2), 0.2
    while True:
        try:
            return await _stream(session, request, chunks)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.HTTPStatusError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if not left or chunks or (status is not None and status not in BUSY):
                raise
        left -= 1
        session.counts["retries"] += 1
        await asyncio.sleep(pause)
        pause *= 2


async def _stream(session: _Session, request: Request, chunks: list[Chunk]) -> None:
    """Read one answer into `chunks`. Compressed bodies are refused: a small one may be a bomb."""
    api = session.options.get("api", "completions")

    async def count_connections(event: str, info: dict) -> None:
        session.counts["connections"] += event == "connection.connect_tcp.complete"

    async with session.client.stream(
        "POST",
        APIS[api],
        json=_body(session, request, api),
        extensions={"trace": count_connections},
    ) as response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise BrokenStream("the server compressed its answer, which was not asked for")
        if response.status_code != 200:
            body = b""
            async for received in response.aiter_raw():
                body += received[:ERROR_BYTES]
                if len(body) > ERROR_BYTES:
                    break
            said = " ".join(body.decode(errors="replace").split())
            message = f"the server answered {response.status_code}: {said}"
            raise httpx.HTTPStatusError(message, request=response.request, response=response)
        async for chunk in read_chunks(response.aiter_raw(), request.max_new_tokens):
            if chunk.text:
                chunks.append(chunk)
            if chunk.usage_tokens is not None:
                session.usage[request.id] = chunk.usage_tokens


def _body(session: _Session, request: Request, api: str) -> dict:
    sampling, model = session.workload.sampling, session.model
    prompt = model.tokenizer.decode(request.prompt_ids)
    chat = {"messages": [{"role": "user", "content": prompt}]}
    body = {
        "model": session.options.get("served_model", model.name),
        "max_tokens": request.max_new_tokens,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not sampling.greedy and sampling.top_p is not None:
        body["top_p"] = sampling.top_p
    body |= chat if api == "chat" else {"prompt": prompt}
    return body | dict(session.options.get("extra", {}))


def _tokens(tokenizer, chunks: list[Chunk]) -> dict:
    """The answer's tokens, each with the time of the event that brought its last character."""
    answer = "".join(c.text for c in chunks)
    found = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    times, i, have = [], 0, len(chunks[0].text) if chunks else 0
    for _, end in found["offset_mapping"]:
        while have < end:
            i += 1
            have += len(chunks[i].text)
        times.append(chunks[i].at_s)
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
        case httpx.HTTPStatusError() | BrokenStream():
            return str(error)
    return f"{type(error).__name__}: {error}"


def _refuse(model: Model, level: int, options: Mapping) -> None:
    try:
        url = httpx.URL(options.get("url", ""))
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(
            f"url is {options.get('url', '')!r}: give the server's base address, such as"
            " http://localhost:8000/v1"
        )
    if url.userinfo:
        raise ValueError(
            "the url names a password: set it in the environment and name it with key_env"
        )
    if not isinstance(options.get("extra", {}), Mapping):
        raise ValueError("extra adds fields to each request: give a mapping")


STRATEGY = Strategy(
    "endpoint",
    run,
    in_words("an endpoint", "served_model", "concurrency"),
    style=5,
    options={
        "url": text,
        "served_model": text,
        "api": choice(*APIS),
        "key_env": text,
        **dict.fromkeys(TIMEOUTS_S, number(1e-3)),
        "retries": number(0, 10, int),
        "concurrency": count,
        "extra": lambda name, value, level: None,
    },
    refuse=_refuse,
    rows_per_step=lambda level, options: level,
    processes=lambda level, options: 0,
    foreign=True,
)
