"""The server: same tokens, one outcome for each request whatever happens, and nothing left over."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import engines
import psutil
import pytest

from llmperf import strategies
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import GREEDY, PUBLISHED, Sampling
from llmperf.decoding.trace import agreement
from llmperf.models import byte_tokenizer
from llmperf.strategies import STRATEGIES, RequestFailed, Server, ServerFailed, messages
from llmperf.strategies.answers import Detokenizer
from llmperf.strategies.inference import Inbox

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
MOST_TOKENS = 200_000
TEXT = "all-cats-are-grey-in-the-dark."


@pytest.fixture(autouse=True)
def engines_on_path(monkeypatch):
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(engines.__file__).parent), before]))


def stub(engine="slow", **options):
    return Server(engines.front(MOST_TOKENS), engine=f"engines:{engine}", **options)


BOTH = pytest.mark.parametrize("batching", ["groups", "slots"])


async def read(stream):
    return [token async for token in stream]


async def outcome(stream):
    """The status a caller sees, by iterating to the end."""
    try:
        await read(stream)
        return "ok"
    except RequestFailed as failed:
        assert failed.status == stream.status
        return failed.status


# What it is for.


def test_tokens_are_those_of_sequential(tiny):
    work = workload.build(
        tiny.tokenizer, 9, (3, 17, 40), (12, 5, 20), sampling=Sampling(top_k=40, top_p=0.9)
    )
    trace = STRATEGIES["dynamic"](tiny, work, {"max_batch": 4})
    alone = STRATEGIES["sequential"](tiny, work, {})
    assert agreement(trace, alone).agree == 9
    assert [r.status for r in trace.requests] == ["ok"] * 9
    assert max(trace.notes["batch_sizes"]) == 4 and sum(trace.notes["batch_sizes"]) == 9
    for r in trace.requests:
        assert r.submitted_s <= r.started_s <= r.token_s[0]
        assert list(r.token_s) == sorted(r.token_s)


def test_a_session_keeps_the_server_and_leaves_nothing_behind(tiny):
    work = workload.build(tiny.tokenizer, 2, 5, 3)
    with strategies.session():
        assert strategies.ready("dynamic", tiny, 2, {}) == []
        idle = strategies.ready("sequential", tiny, 2, {})
        assert len(idle) == 1 and psutil.pid_exists(idle[0])
        first = STRATEGIES["dynamic"](tiny, work, {"max_batch": 1})
        assert STRATEGIES["dynamic"](tiny, work, {}).digest() == first.digest()
        assert strategies.ready("sequential", tiny, 2, {}) == idle  # the same one
    assert strategies.ready("sequential", tiny, 2, {}) == []
    assert not psutil.pid_exists(idle[0])


def test_a_text_comes_back_as_text_that_ends_at_the_stop_rule():
    async def go():
        async with stub("null") as server:
            tokens = await read(server.generate("hello", max_new_tokens=30))
            assert "".join(t.text for t in tokens) == TEXT
            assert [t.at_s for t in tokens] == sorted(t.at_s for t in tokens)
            hyphen = tokens[3].id
            short = await read(
                server.generate("hello", max_new_tokens=30, stop=Stop(frozenset({hyphen})))
            )
            assert "".join(t.text for t in short) == "all-"

    asyncio.run(go())


def test_several_processes_share_the_requests():
    async def go():
        async with stub(processes=2, rows=1) as server:
            streams = [server.generate("a", max_new_tokens=5) for _ in range(6)]
            await asyncio.gather(*map(read, streams))
            assert Counter(s.worker for s in streams) == {"0": 3, "1": 3}
            assert len(set(server.pids())) == 2

    asyncio.run(go())


def message(key, sampling=GREEDY):
    return messages.dump(key, Request(key, (1,), 1), sampling, Stop())


def test_one_batch_has_one_way_of_drawing():
    inbox = Inbox()
    for key, sampling in enumerate([GREEDY, PUBLISHED, GREEDY, GREEDY, GREEDY]):
        inbox.put(message(key, sampling))
    taken = [[j.key for j in inbox.take(3, idle=True)[1]] for _ in range(3)]
    assert taken == [[0, 2, 3], [1], [4]]


def test_an_idle_process_waits_the_window_and_no_longer_for_a_full_batch():
    inbox = Inbox()
    inbox.put(message(0))
    inbox.put(message(1))
    assert len(inbox.take(2, True, window_s=30.0)[1]) == 2  # full: 30 s would hang the test
    inbox.put(message(2))
    (late,) = inbox.take(2, True, window_s=0.05)[1]
    assert time.perf_counter() - late.came_s >= 0.05
    assert inbox.take(2, idle=False) == ([], [], set())  # a process at work never waits
    inbox.put({"do": "drop", "key": 9})
    inbox.put({"do": "report"})
    assert inbox.take(2, idle=True) == ([{"do": "report"}], [], {9})


def test_requests_join_and_leave_a_running_batch():
    async def go():
        async with stub(rows=2, batching="slots") as server:
            long = server.generate(Request(0, (1,), 200))
            await anext(long)
            short = [server.generate(Request(i, (1,), 3)) for i in (1, 2)]
            assert [await outcome(s) for s in short] == ["ok", "ok"]
            assert long.status is None  # they came and went meanwhile
            never = server.generate(Request(3, (1,) * 301, 3))
            assert await outcome(never) == "error" and "never fits" in never.reason
            long.cancel()
            assert await outcome(server.generate("a", max_new_tokens=2)) == "ok"

    asyncio.run(go())


# Admission.


@pytest.mark.parametrize(
    ("request_", "options", "says"),
    [
        ("", {}, "empty prompt"),
        (None, {}, "a text or a Request"),
        ("x" * 500, {"max_new_tokens": MOST_TOKENS}, "200000 positions"),
        (Request(0, (999,), 4), {}, "999 is not a token"),
        (Request(0, (-1,), 4), {}, "-1 is not a token"),
        (Request(0, ("a",), 4), {}, "'a' is not a token"),
        ("x", {"max_new_tokens": 0}, "at least 1"),
        ("x", {"deadline_s": 0}, "above 0 seconds"),
        ("x", {"sampling": Sampling(suppress=(4000,))}, "4000 is not a token"),
    ],
)
def test_a_request_that_can_never_be_answered_is_refused_in_one_sentence(request_, options, says):
    async def go():
        server = stub()  # not started: admission comes first
        with pytest.raises(ValueError, match=says):
            server.generate(request_, **options)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"rows": 0}, "rows"),
        ({"max_queue": 0}, "max_queue"),
        ({"processes": 0}, "processes"),
        ({"batching": "none"}, "choose groups or slots"),
        ({"window_s": -1}, "window_s"),
        ({"window_s": float("nan")}, "window_s"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits, says):
    with pytest.raises(ValueError, match=says):
        stub(**limits)


def test_a_full_queue_rejects_at_once_and_ten_thousand_requests_are_each_answered():
    async def go():
        async with stub("null", max_queue=50) as server:
            streams = [server.generate("a", max_new_tokens=2) for _ in range(10_000)]
            assert sum(s.status == "rejected" for s in streams) == 9_950
            assert "50 requests wait" in next(s.reason for s in streams if s.reason)
            seen = Counter(await asyncio.gather(*map(outcome, streams)))
        assert seen == {"ok": 50, "rejected": 9_950} == server.counts

    asyncio.run(go())


# Cancels, deadlines, readers that go away.


@BOTH
def test_a_cancel_ends_a_running_and_a_waiting_request_and_frees_their_place(batching):
    async def go():
        async with stub(rows=1, batching=batching) as server:
            running = server.generate(Request(0, (1,), 100_000))  # would take a thousand seconds
            waiting = server.generate(Request(1, (1,), 100_000))
            await anext(running)
            waiting.cancel()
            running.cancel()
            running.cancel()  # twice is no harm
            assert running.status == waiting.status == "cancelled"
            assert len(await read(server.generate("c", max_new_tokens=3))) == 3
        assert server.counts == {"cancelled": 2, "ok": 1}

    asyncio.run(go())


def test_a_cancelled_task_cancels_its_request():
    async def go():
        async with stub() as server:
            task = asyncio.create_task(read(server.generate("a", max_new_tokens=400)))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert server.counts == {"cancelled": 1}

    asyncio.run(go())


def test_a_missed_deadline_expires_the_request_waiting_or_running():
    async def go():
        async with stub(rows=1) as server:
            both = [server.generate("a", max_new_tokens=400, deadline_s=0.2) for _ in range(2)]
            assert [await outcome(s) for s in both] == ["expired"] * 2
            assert "0.2 s" in both[0].reason
            assert both[0].started_s and both[1].started_s is None
            easy = server.generate("a", max_new_tokens=2, deadline_s=30)
            assert await outcome(easy) == "ok"

    asyncio.run(go())


def test_a_client_that_stops_reading_holds_up_nobody():
    async def go():
        async with stub() as server:
            stuck = server.generate("a", max_new_tokens=30)
            others = [server.generate("b", max_new_tokens=5) for _ in range(20)]
            assert [await outcome(s) for s in others] == ["ok"] * 20
            while stuck.status is None:
                await asyncio.sleep(0.01)
            assert len(await read(stuck)) == 30  # all there, and no more than it asked for

    asyncio.run(go())


# Death, and what comes after it.


def test_a_killed_process_fails_what_waits_and_can_be_started_again():
    async def go():
        async with stub() as server:
            streams = [server.generate("a", max_new_tokens=400) for _ in range(20)]
            await anext(streams[0])
            psutil.Process(server.pids()[0]).kill()
            assert {await outcome(s) for s in streams} == {"error"}
            assert "the inference process ended" in streams[-1].reason
            late = server.generate("a")
            assert late.status == "error" and "start() starts it again" in late.reason
            with pytest.raises(ServerFailed, match="the inference process ended"):
                await server.prepare(1)
            await server.start(1)
            await server.prepare(1)
            assert await outcome(server.generate("a", max_new_tokens=3)) == "ok"

    asyncio.run(go())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_frozen_process_is_given_up():
    async def go():
        async with stub() as server:
            stream = server.generate("a", max_new_tokens=400)
            await anext(stream)
            os.kill(server.pids()[0], signal.SIGSTOP)
            assert await outcome(stream) == "error"
            assert "no sign of life" in stream.reason

    asyncio.run(go())


def test_a_failing_batch_fails_alone_and_an_exit_is_told_with_its_code():
    async def go():
        async with stub("mortal", rows=1) as server:
            bad = server.generate(Request(0, (14,), 5))
            good = server.generate(Request(1, (1,), 5))
            assert (await outcome(bad), await outcome(good)) == ("error", "ok")
            assert bad.reason == "ValueError: this batch cannot be decoded"
            last = server.generate(Request(2, (13,), 5))
            assert await outcome(last) == "error" and "exit code 7" in last.reason

    asyncio.run(go())


def test_when_one_of_two_processes_dies_both_end_and_every_request_has_its_outcome():
    async def go():
        async with stub(processes=2) as server:
            streams = [server.generate("a", max_new_tokens=400) for _ in range(10)]
            await anext(streams[1])
            pids = server.pids()
            psutil.Process(pids[0]).kill()
            assert [await outcome(s) for s in streams] == ["error"] * 10
            psutil.wait_procs([p for p in map(process, pids) if p], timeout=10)
            assert not any(map(process, pids))

    asyncio.run(go())


def process(pid):
    """The process of that id, unless it has ended."""
    try:
        found = psutil.Process(pid)
        return None if found.status() == psutil.STATUS_ZOMBIE else found
    except psutil.NoSuchProcess:
        return None


def test_a_model_that_cannot_load_says_why():
    async def go():
        with pytest.raises(ServerFailed, match="MemoryError: the model does not fit"):
            async with stub("unable"):
                pass

    asyncio.run(go())


# Shutting down.


def test_closing_drains_what_was_admitted_and_takes_nothing_new():
    async def go():
        server = stub(rows=2)
        await server.start(1)
        await server.prepare(1, rows=2)
        pids = server.pids()
        tasks = [asyncio.create_task(outcome(server.generate("a", max_new_tokens=9)))]
        tasks += [asyncio.create_task(outcome(server.generate("b", max_new_tokens=9)))] * 1
        await asyncio.sleep(0)
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0)
        assert server.generate("late").status == "rejected"
        await closing
        assert [await t for t in tasks] == ["ok", "ok"]
        assert not any(psutil.pid_exists(p) for p in pids)
        await server.close()  # twice is no harm

    asyncio.run(go())


def test_leaving_by_an_error_cancels_instead_of_waiting():
    async def go():
        streams = []
        with pytest.raises(KeyError):
            async with stub() as server:
                streams.append(server.generate("a", max_new_tokens=400))
                raise KeyError("the caller failed")
        assert await outcome(streams[0]) == "cancelled"

    asyncio.run(go())


SCRIPT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import engines
from llmperf.strategies import Server

async def go():
    server = Server(engines.front(), engine="engines:slow")
    await server.start(1)
    await server.prepare(1)
    stream = server.generate("a", max_new_tokens=400)
    await anext(stream)
    print(server.pids()[0], flush=True)
    if "die" in sys.argv:
        import os
        os._exit(1)
    await server.close(drain=False)

asyncio.run(go())
"""


@pytest.mark.parametrize("how", ["close", "die"])
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
def test_soak_every_request_has_one_outcome_whatever_is_done_to_it(batching):
    """500 requests: 5 % malformed, random cancels and deadlines, a queue that overflows."""
    dice = random.Random(0)
    refused, asked = 0, 500

    async def one(server):
        nonlocal refused
        await asyncio.sleep(dice.random())
        try:
            request = Request(0, (10**6,), 4) if dice.random() < 0.05 else "some text"
            deadline = 0.02 if dice.random() < 0.1 else None
            stream = server.generate(request, max_new_tokens=6, deadline_s=deadline)
        except ValueError:
            refused += 1
            return "refused"
        if dice.random() < 0.3:
            loop = asyncio.get_running_loop()
            loop.call_later(dice.random() * 0.05, stream.cancel)
        return await outcome(stream)

    async def go():
        async with stub(max_queue=100, batching=batching) as server:
            seen = Counter(await asyncio.gather(*(one(server) for _ in range(asked))))
            assert not server._live and not server._queue
            assert not any(p.outstanding for p in server._processes)
        assert refused > 5 and seen.total() == asked
        assert seen - Counter(refused=refused) == server.counts
        assert (
            {"ok", "cancelled", "expired"}
            <= set(seen)
            <= {
                "ok",
                "cancelled",
                "expired",
                "rejected",
                "refused",
            }
        )

    asyncio.run(go())


# Text.


def pieces(text_or_ids):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text_or_ids)["input_ids"] if isinstance(text_or_ids, str) else text_or_ids
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.add(id, last=n == len(ids)) for n, id in enumerate(ids, 1)]


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 👋🏽!", " leading  spaces\n", ""])
def test_pieces_of_text_join_to_the_whole_and_never_split_a_character(text):
    assert "".join(pieces(text)) == text
    assert not any("\ufffd" in piece for piece in pieces(text))


def test_bytes_that_are_no_text_are_given_up_in_time_and_an_open_character_at_the_end():
    first, second = byte_tokenizer()("é")["input_ids"]
    assert pieces([first]) == ["\ufffd"]
    assert sum(map(len, pieces([second] * 100))) > 80
