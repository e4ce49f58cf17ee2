"""The endpoint strategy: against a server that misbehaves in every way, and against a real one."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time

import engines
import httpx
import pytest
from fake_endpoint import FakeEndpoint, Tap

from llmperf.decoding import requests as workload
from llmperf.decoding.sampling import GREEDY, Sampling
from llmperf.decoding.trace import Trace
from llmperf.measure import load, metrics
from llmperf.strategies import STRATEGIES

SECRET = "sk-very-secret"


@pytest.fixture(scope="module")
def front():
    return engines.front()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LLMPERF_TEST_KEY", SECRET)


def run(front, server, n=1, sampling=GREEDY, arrivals=None, **options) -> Trace:
    work = workload.build(front.tokenizer, n, 8, 19, sampling=sampling)
    work = load.arriving(work, **arrivals) if arrivals else work
    options = {"url": getattr(server, "url", server), "key_env": "LLMPERF_TEST_KEY"} | options
    return STRATEGIES["endpoint"](front, work, options)


def test_tokens_are_counted_by_the_tokenizer_and_timed_by_their_event(front):
    with FakeEndpoint() as server:
        trace = run(front, server, n=3)
    for r in trace.requests:
        assert r.status == "ok"
        assert front.tokenizer.decode(r.tokens) == "All cats are grey."
        assert len(r.tokens) == len(r.token_s) == 18  # the byte tokenizer's count, not 4 events
        assert [r.token_s.count(t) for t in sorted(set(r.token_s))] == [3, 5, 4, 6]
    assert trace.notes["usage_tokens"] == 57
    assert not trace.notes["tokens_comparable"]


def test_times_agree_with_the_servers_own_log(front):
    with FakeEndpoint(gap_s=0.05, pieces=("a",) * 12) as server:
        trace = run(front, server)
    (r,), (sent,) = trace.requests, server.sent
    mine, log = r.token_s[-1] - r.token_s[0], sent[-1] - sent[0]
    assert mine == pytest.approx(log, rel=0.05)


def test_the_request_asks_for_what_the_workload_says(front):
    with FakeEndpoint() as server:
        run(front, server, served_model="m", extra={"ignore_eos": True})
        run(front, server, sampling=Sampling(temperature=0.7, top_p=0.9), api="chat")
    first, second = server.bodies
    prompt = front.tokenizer.decode(workload.build(front.tokenizer, 1, 8, 1).requests[0].prompt_ids)
    assert first["prompt"] == prompt and first["model"] == "m" and first["max_tokens"] == 19
    assert first["temperature"] == 0 and first["stream"] and first["ignore_eos"]
    assert second["messages"] == [{"role": "user", "content": prompt}]
    assert (second["temperature"], second["top_p"]) == (0.7, 0.9)


def test_what_the_api_cannot_be_asked_is_noted(front):
    with FakeEndpoint(gap_s=0) as server:
        notes = [
            run(front, server, sampling=sampling, **options).notes["not_followed"]
            for sampling, options in (
                (Sampling(top_k=5, suppress=(3,)), {}),
                (Sampling(top_k=5), {"extra": {"top_k": 5}}),
                (GREEDY, {}),
            )
        ]
    assert notes == [["top_k", "suppress"], [], []]
    assert [body.get("top_k") for body in server.bodies] == [None, 5, None]


def test_the_key_goes_into_the_header_and_nowhere_else(front):
    with FakeEndpoint("refuses") as server:
        trace = run(front, server)
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert "401" in trace.requests[0].reason and "***" in trace.requests[0].reason
    assert SECRET not in json.dumps(trace.to_dict())


def test_a_key_with_a_carriage_return_is_sent_without_it(front, monkeypatch):
    """As a line of a file with Windows line ends leaves it."""
    monkeypatch.setenv("LLMPERF_TEST_KEY", SECRET + "\r")
    with FakeEndpoint(gap_s=0) as server:
        trace = run(front, server)
    assert trace.requests[0].status == "ok"
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_a_key_that_cannot_be_sent_is_in_no_reason(front, monkeypatch):
    monkeypatch.setenv("LLMPERF_TEST_KEY", SECRET[:5] + "\n" + SECRET[5:])
    with FakeEndpoint() as server:
        trace = run(front, server)
    assert trace.requests[0].status == "error" and "stray characters" in trace.requests[0].reason
    assert SECRET[5:] not in json.dumps(trace.to_dict())


def test_connections_are_used_again(front):
    with FakeEndpoint(gap_s=0) as server:
        run(front, server, n=6, concurrency=2)
    assert server.connections == 2


def test_requests_are_sent_at_their_arrival(front):
    with FakeEndpoint(gap_s=0) as server:
        trace = run(front, server, n=4, arrivals={"kind": "even", "rate_per_s": 20})
    sent = [r.submitted_s for r in trace.requests]
    assert all(at >= i / 20 - 0.002 for i, at in enumerate(sent))


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("not json", "not JSON"),
        ("no object", "another form"),
        ("odd form", "another form"),
        ("error event", "the cache is full"),
        ("closes", "ProtocolError|ReadError"),
        ("ends early", "before the answer's end"),
        ("stalls", "no event for 0.4 s"),
        ("comments", "within 1 s"),
        ("hangs", "no event for 0.4 s"),
        ("endless event", "event of more than"),
        ("endless text", "far more than 19 tokens"),
        ("surrogate", "not JSON"),
        ("not a number", "not JSON"),
        ("infinite count", "not JSON"),
        ("text is a list", "another form"),
        ("deep", "not JSON"),
        ("compressed", "compressed its answer"),
    ],
)
def test_whatever_the_server_does_each_request_gets_its_answer(front, mode, says):
    with FakeEndpoint(mode) as server:
        trace = run(front, server, n=2, timeout_s=0.4, deadline_s=1)
    for r in trace.requests:
        assert r.status == "error"
        assert re.search(says, r.reason), r.reason
        assert len(r.tokens) == len(r.token_s)  # what had come before is kept, and discarded
    assert metrics.summarize(trace)["requests_ok"] == 0


def test_an_endless_error_body_is_read_no_further_than_its_reason_needs(front):
    with FakeEndpoint("endless error") as server:
        trace = run(front, server, deadline_s=20)
    assert trace.requests[0].reason.startswith("the server answered 500: xxx")
    assert len(trace.requests[0].reason) == 300
    assert server.written < 50_000_000  # a few socket buffers, not twenty seconds of it


@pytest.mark.parametrize("before", [270, 285, 295])
def test_a_key_is_replaced_before_anything_is_cut(front, before):
    with FakeEndpoint("error event", error="x" * before + SECRET) as server:
        reason = run(front, server).requests[0].reason
    assert len(reason) <= 300 and "sk-" not in reason
    with FakeEndpoint("refuses", error="x" * before) as server:
        assert "sk-" not in run(front, server).requests[0].reason


def test_a_server_that_is_down_is_an_answer(front):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    trace = run(front, f"http://127.0.0.1:{port}/v1", n=2)
    assert all("no server answers" in r.reason for r in trace.requests)


def test_an_answer_without_text_is_an_error(front):
    with FakeEndpoint(pieces=("",)) as server:
        trace = run(front, server)
    assert "without any text" in trace.requests[0].reason


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": ""}, "url is ''"),
        ({"url": "localhost:8000"}, "base address"),
        ({"url": "http://me:pw@host/v1"}, "password"),
        ({"url": "http://host/v1", "api": "talk"}, "completions or chat"),
        ({"url": "http://host/v1", "concurrency": 1.5}, "whole number"),
        ({"url": "http://host/v1", "timeout_s": "5"}, "timeout_s is '5'"),
        ({"url": "http://host/v1", "deadline_s": float("nan")}, "deadline_s"),
        ({"url": "http://host/v1", "extra": 3}, "a mapping"),
        ({"url": "http://host/v1", "extra": {"max_tokens": None}}, "none of max_tokens, messages"),
        ({"url": 3}, "url is 3"),
        ({"url": "http://host/v1", "timeout_s": 0}, "timeout_s"),
        ({"url": "http://host/v1", "key": "sk"}, "no option 'key'"),
    ],
)
def test_options_that_cannot_be_are_refused(front, options, says):
    with pytest.raises(ValueError, match=says):
        STRATEGIES["endpoint"].check(front, 1, options)


# A real server.


def serving_python():
    """An interpreter with the extra `serving`: this one, or the one LLMPERF_SERVE_PYTHON names."""
    if named := os.environ.get("LLMPERF_SERVE_PYTHON"):
        return named
    found = all(importlib.util.find_spec(m) for m in ("fastapi", "uvicorn", "openai"))
    return sys.executable if found else None


@pytest.fixture(scope="module")
def real(embedded):
    """`transformers serve` on the embedded model, on a free port of the loopback address."""
    python = serving_python()
    if python is None:
        pytest.skip("needs the extra `serving` (fastapi, uvicorn, openai), or LLMPERF_SERVE_PYTHON")
    from llmperf.models import embedded

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(embedded.folder())
    main = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [python, "-c", main, "serve", folder, "--device", "cpu", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, f"transformers serve ended with {process.returncode}"
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield port, folder
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_a_real_server_gives_the_tokens_of_sequential_and_the_times_a_listener_sees(embedded, real):
    port, folder = real
    work = workload.build(embedded.tokenizer, 2, 24, 16, sampling=GREEDY)
    options = {"served_model": folder, "concurrency": 1, "timeout_s": 300}
    with Tap("127.0.0.1", port) as tap:
        trace = STRATEGIES["endpoint"](embedded, work, options | {"url": tap.url})
    alone = STRATEGIES["sequential"](embedded, work, {})
    for r, mine in zip(trace.requests, alone.requests, strict=True):
        assert r.status == "ok", r.reason
        theirs = embedded.tokenizer.decode(mine.tokens, skip_special_tokens=True)
        assert embedded.tokenizer.decode(r.tokens) == theirs.rstrip("\ufffd")  # half a character
    assert trace.notes["usage_tokens"] == 32
    compare_with_listener(trace, tap)


def compare_with_listener(trace, tap):
    """TTFT and TPOT from the bytes that went by, within 5 %."""
    sends = [i for i, (_, data) in enumerate(tap.seen) if data.startswith(b"POST")]
    ends = [*sends[1:], len(tap.seen)]
    rows = metrics.per_request(trace)
    for r, row, first, end in zip(trace.requests, rows, sends, ends, strict=True):
        bare = [(at, d.replace(b" ", b"")) for at, d in tap.seen[first + 1 : end]]
        spoken = [at for at, d in bare if b'"text":"' in d.replace(b'"text":""', b"")]
        ttft = (spoken[0] - tap.seen[first][0]) * 1e3
        tpot = (spoken[-1] - spoken[0]) * 1e3 / (len(r.tokens) - 1)
        assert row["ttft_ms"] == pytest.approx(ttft, rel=0.05)
        assert row["tpot_ms"] == pytest.approx(tpot, rel=0.05)
