"""The server: same tokens, one outcome for each request whatever happens, and nothing left over."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from queue import Queue

import engines
import psutil
import pytest

from llmperf import strategies
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.sampling import Sampling
from llmperf.decoding.trace import agreement
from llmperf.strategies import STRATEGIES, Server, ServerFailed, inference, server

MOST_TOKENS = 200_000


@pytest.fixture(autouse=True)
def engines_on_path(monkeypatch):
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(engines.__file__).parent), before]))


def stub(engine="slow", **options):
    return Server(engines.front(MOST_TOKENS), engine=f"engines:{engine}", **options)


def made(n, new=5, first=1, arrivals=None):
    arrivals = arrivals or [0.0] * n
    requests = (Request(i, (first,), new, arrival_s=at) for i, at in enumerate(arrivals))
    return Workload(tuple(requests))


def outcomes(trace):
    return Counter(r.status for r in trace.requests)


BOTH = pytest.mark.parametrize("batching", ["groups", "slots"])


# What it is for.


def test_tokens_are_those_of_sequential(tiny):
    work = workload.build(
        tiny.tokenizer, 9, (3, 17, 40), (12, 5, 20), sampling=Sampling(top_k=40, top_p=0.9)
    )
    trace = STRATEGIES["dynamic"](tiny, work, {"max_batch": 4})
    alone = STRATEGIES["sequential"](tiny, work, {})
    assert agreement(trace, alone)["agree"] == 9
    assert [r.status for r in trace.requests] == ["ok"] * 9
    assert max(trace.notes["batch_sizes"]) == 4 and sum(trace.notes["batch_sizes"]) == 9
    for r in trace.requests:
        assert r.submitted_s <= r.started_s <= r.token_s[0]
        assert list(r.token_s) == sorted(r.token_s)


def test_a_session_keeps_the_server_and_leaves_nothing_behind(tiny):
    work = workload.build(tiny.tokenizer, 2, 5, 3)
    with strategies.session():
        assert STRATEGIES["dynamic"].ready(tiny, 2, {}) == []
        idle = STRATEGIES["sequential"].ready(tiny, 2, {})
        assert len(idle) == 1 and psutil.pid_exists(idle[0])
        first = STRATEGIES["dynamic"](tiny, work, {"max_batch": 1})
        assert STRATEGIES["dynamic"](tiny, work, {}).digest() == first.digest()
        assert STRATEGIES["sequential"].ready(tiny, 2, {}) == idle  # the same one
    assert STRATEGIES["sequential"].ready(tiny, 2, {}) == []
    assert not psutil.pid_exists(idle[0])


def test_tokens_are_told_as_they_come():
    with stub("null") as running:
        told = []
        running.run(made(1, 30), on_token=lambda id, token: told.append((id, token)))
        assert told == [(0, token) for token in engines.TEXT]


def test_several_processes_share_the_requests():
    with stub() as running:
        trace = running.run(made(6), processes=2, rows=1)
        assert Counter(r.worker for r in trace.requests) == {"0": 3, "1": 3}
        assert len(set(running.pids())) == 2
        assert [w["requests"] for w in trace.notes["workers"]] == [3, 3]


def test_an_idle_process_waits_the_window_and_no_longer_for_a_full_batch():
    inbox = Queue()
    work = inference.InferenceLoop(None, inbox, None)
    work._slots = engines.engine(engines.letters)("groups", 2, 9, "cached", 1, None)
    put = lambda key: inbox.put({"do": "run", "key": key, "prompt": [1], "new": 1, "seed": 0})  # noqa: E731
    put(0)
    put(1)
    work._window_s = 30.0
    work._read()  # full: 30 s would hang the test
    assert list(work._waiting) == [0, 1]
    inbox.put({"do": "drop", "key": 0})
    work._waiting.pop(1)
    put(2)
    work._window_s = 0.05
    work._read()
    assert list(work._waiting) == [2]
    work._running = {9}
    work._read()  # a process at work never waits


@BOTH
def test_only_a_group_is_waited_for(monkeypatch, batching):
    with stub() as running:
        ask, sent = running._ask, []
        monkeypatch.setattr(running, "_ask", lambda *a, **m: sent.append(m) or ask(*a, **m))
        running.run(made(1), batching=batching)
    (window_s,) = (m["window_s"] for m in sent if "window_s" in m)
    assert window_s == (server.WINDOW_S if batching == "groups" else 0)


def test_requests_join_and_leave_a_running_batch():
    work = Workload((Request(0, (1,), 100), Request(1, (1,), 3)))
    with stub() as running:
        long, short = running.run(work, rows=2, batching="slots").requests
    assert long.status == short.status == "ok"
    assert short.token_s[-1] < long.token_s[50]  # it came and went meanwhile


# Limits.


def test_a_full_queue_rejects_at_once_and_each_request_has_an_outcome():
    with stub("null") as running:
        trace = running.run(made(10_000, 2), max_queue=50)
        assert outcomes(trace) == {"ok": 50, "rejected": 9_950}
        assert "50 requests wait" in next(r.reason for r in trace.requests if r.reason)


def test_a_missed_deadline_expires_the_request_waiting_or_running_and_frees_its_place():
    with stub() as running:
        both = running.run(made(2, 400), rows=1, deadline_s=0.3).requests
        assert [r.status for r in both] == ["expired"] * 2
        assert "0.3 s" in both[0].reason
        assert both[0].started_s and both[1].started_s is None
        assert outcomes(running.run(made(3, 2), rows=1, deadline_s=30)) == {"ok": 3}


def test_a_closed_loop_has_so_many_in_flight():
    with stub() as running:
        rows = running.run(made(6), concurrency=2, batching="slots").requests
    for r in rows:
        flying = sum(o.submitted_s <= r.submitted_s < o.token_s[-1] for o in rows)
        assert flying <= 2


def fail(id, token):
    raise KeyError("the caller failed")


def test_a_run_that_its_caller_ends_leaves_no_token_for_the_next():
    with stub() as running:
        with pytest.raises(KeyError):
            running.run(made(4, 100), on_token=fail)
        trace = running.run(made(4, 7))
        assert outcomes(trace) == {"ok": 4} and all(len(r.tokens) == 7 for r in trace.requests)


def test_a_run_interrupted_while_it_prepares_leaves_no_reply_for_the_next(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with stub() as running:
        (before,) = running.pids()
        with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
            once.setattr(running, "_receive", interrupted)
            running.run(made(1))
        assert not running.pids() and not psutil.pid_exists(before)
        assert outcomes(running.run(made(1, 7))) == {"ok": 1}


# Death, and what comes after it.


def killing(running, wound):
    """A callback that wounds the first process at the tenth token."""
    seen = []

    def on_token(id, token):
        seen.append(token)
        if len(seen) == 10:
            wound(psutil.Process(running.pids()[0]))

    return on_token


def test_a_killed_process_ends_the_run_with_its_reason_and_the_next_run_starts_anew():
    with stub() as running:
        running.start(2)
        pids = running.pids()
        kill = killing(running, lambda p: p.kill())
        trace = running.run(made(10, 400), processes=2, on_token=kill)
        assert outcomes(trace) == {"error": 10}
        assert "the inference process ended" in trace.requests[-1].reason
        assert not any(map(psutil.pid_exists, pids))
        assert outcomes(running.run(made(3))) == {"ok": 3}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_frozen_process_is_given_up(monkeypatch):
    monkeypatch.setattr(server, "STALL_S", 0.5)
    with stub() as running:
        trace = running.run(made(1, 400), on_token=killing(running, lambda p: p.suspend()))
        assert trace.requests[0].status == "error"
        assert "no step ended for 0.5 s" in trace.requests[0].reason


def test_a_failing_batch_fails_alone_and_an_exit_is_told_with_its_code():
    with stub("mortal") as running:
        work = Workload((Request(0, (14,), 5), Request(1, (1,), 5)))
        bad, good = running.run(work, rows=1).requests
        assert (bad.status, good.status) == ("error", "ok")
        assert bad.reason == "ValueError: this batch cannot be decoded"
        (last,) = running.run(made(1, first=13)).requests
        assert last.status == "error" and "exit code 7" in last.reason


def test_a_model_that_cannot_load_says_why():
    with pytest.raises(ServerFailed, match="MemoryError: the model does not fit"), stub("unable"):
        pass


SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import engines
from llmperf.decoding.requests import Request, Workload
from llmperf.strategies import Server

def told(id, token):
    if "die" in sys.argv:
        os._exit(1)
    raise SystemExit

with Server(engines.front(), engine="engines:slow") as server:
    print(server.pids()[0], flush=True)
    server.run(Workload((Request(0, (1,), 400),)), on_token=told)
"""


@pytest.mark.parametrize("how", ["leave", "die"])
def test_a_plain_script_needs_no_main_guard_and_leaves_no_process_behind(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script), str(Path(engines.__file__).parent), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().isdigit(), done.stderr
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout))


@BOTH
def test_soak_every_request_has_one_outcome(batching):
    """Random arrivals, a deadline, a queue that overflows; answers are whole."""
    dice = random.Random(0)
    work = made(300, 6, arrivals=[dice.random() for _ in range(300)])
    with stub() as running:
        for limits in ({"deadline_s": 0.2}, {"max_queue": 20}, {}):
            trace = running.run(work, batching=batching, **limits)
            assert outcomes(trace).total() == 300
            for r in trace.requests:
                assert r.status != "ok" or list(r.tokens) == engines.TEXT[:6]
        assert outcomes(trace) == {"ok": 300}
