"""Sequential, batch, coroutine and threads: same tokens, checked options, nothing left behind."""

import _thread
import asyncio
import gc
import itertools
import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llmperf import strategies
from llmperf.decoding import generate
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import Workload
from llmperf.decoding.sampling import GREEDY, Sampling
from llmperf.decoding.trace import agreement
from llmperf.strategies import STRATEGIES, threads

SAMPLED = Sampling(temperature=0.9, top_k=50, top_p=0.9)
VARIANTS = [
    ("batch", {}),
    ("batch", {"batch_size": 2}),
    ("coroutine", {}),
    ("coroutine", {"variant": "yielding"}),
    ("coroutine", {"variant": "to_thread"}),
    ("threads", {}),
    ("threads", {"workers": 2, "intra_op": 1}),
    ("threads", {"intra_op": 2}),
]
IN_ORDER = [("sequential", {}), *VARIANTS]


def names(cases):
    return [" ".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in cases]


def make(tiny, n=5, prompt=(3, 17, 9), new=(6, 4, 9), sampling=GREEDY):
    return workload.build(tiny.tokenizer, n, prompt, new, sampling=sampling)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=names(VARIANTS))
def test_same_tokens_as_sequential(tiny, name, options, sampling):
    work = make(tiny, sampling=sampling)
    reference = STRATEGIES["sequential"](tiny, work, {})
    trace = STRATEGIES[name](tiny, work, options)
    found = agreement(trace, reference)
    assert tuple(found.values()) == (5, 5, None)
    assert trace.digest() == reference.digest()


@pytest.mark.parametrize(("name", "options"), IN_ORDER, ids=names(IN_ORDER))
@pytest.mark.parametrize("arrivals", [(0,), (0.15, 0.0, 0.1, 0.0, 0.05)], ids=["at once", "spread"])
def test_every_request_has_its_times(tiny, name, options, arrivals):
    work = make(tiny)
    arrived = [replace(r, arrival_s=arrivals[r.id % len(arrivals)]) for r in work.requests]
    trace = STRATEGIES[name](tiny, Workload(tuple(arrived)), options)
    assert [len(r.tokens) for r in trace.requests] == [6, 4, 9, 6, 4]
    for r in trace.requests:
        times = [r.scheduled_s, r.submitted_s, r.started_s, *r.token_s, trace.duration_s]
        assert times == sorted(times)


def overlaps(trace):
    spans = sorted((r.started_s, r.token_s[-1]) for r in trace.requests)
    return any(later[0] < earlier[1] for earlier, later in zip(spans, spans[1:], strict=False))


def slow_step(milliseconds):
    return {"on_step": lambda: time.sleep(milliseconds / 1e3)}


@pytest.mark.parametrize(
    ("name", "options", "together"),
    [
        ("sequential", {}, False),
        ("coroutine", {}, False),
        ("coroutine", {"variant": "yielding"}, True),
        ("coroutine", {"variant": "to_thread"}, True),
        ("threads", {}, True),
        ("threads", {"workers": 1}, False),
    ],
)
def test_who_runs_while_another_runs(tiny, name, options, together):
    trace = STRATEGIES[name](tiny, make(tiny, 3), options | slow_step(3))
    assert overlaps(trace) == together


def test_a_blocking_task_holds_the_event_loop_and_a_thread_does_not(tiny):
    """A blocking task leaves one beat, the overdue one; with others the heart beats many times."""
    work = make(tiny, 3, 4, 10)
    held = STRATEGIES["coroutine"](tiny, work, slow_step(5)).notes["event_loop"]
    assert held["beats"] == 1 and held["longest_block_s"] >= 30 * 0.005 - 0.01
    for variant in ("yielding", "to_thread"):
        free = STRATEGIES["coroutine"](tiny, work, {"variant": variant} | slow_step(5))
        assert free.notes["event_loop"]["beats"] > 3


def test_as_many_threads_as_tasks_also_on_few_cores(tiny):
    """asyncio's own pool has four threads more than there are cores."""
    level = (os.cpu_count() or 1) + 6
    options = {"variant": "to_thread"} | slow_step(5)
    trace = STRATEGIES["coroutine"](tiny, make(tiny, level, 4, 20), options)
    assert max(r.started_s for r in trace.requests) < min(r.token_s[-1] for r in trace.requests)


def test_a_coroutine_run_works_where_an_event_loop_already_runs(tiny):
    async def in_a_notebook():
        return STRATEGIES["coroutine"](tiny, make(tiny, 2), {})

    assert asyncio.run(in_a_notebook()).output_tokens == 10


def test_threads_say_how_they_ran(tiny):
    before = torch.get_num_threads()
    notes = STRATEGIES["threads"](tiny, make(tiny, 4), {"workers": 2, "intra_op": 1}).notes
    assert notes["intra_op_threads"] == 1
    assert len(notes["workers"]) == 2 and all(w["cpu_s"] >= 0 for w in notes["workers"])
    assert isinstance(notes["interpreter"]["gil_enabled"], bool)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wanted", [1, 2])
def test_intra_op_threads_reach_every_worker_and_are_put_back(tiny, wanted):
    """OpenMP keeps the number per thread, so it is asked in the workers and in later threads."""
    seen, before = [], torch.get_num_threads()
    options = {"intra_op": wanted, "on_step": lambda: seen.append(torch.get_num_threads())}
    STRATEGIES["threads"](tiny, make(tiny, 3), options)
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert set(seen) == {wanted}
    assert torch.get_num_threads() == before == later[0]


def test_gil_contention_is_a_share_or_says_why_not(tiny, monkeypatch):
    gil = STRATEGIES["threads"](tiny, make(tiny), {"watch": True}).notes["gil"]
    assert 0 <= gil.get("contention", 0) <= 1 and len(gil) == 1
    monkeypatch.setattr(threads, "gilknocker", None)
    gil = STRATEGIES["threads"](tiny, make(tiny), {"watch": True}).notes["gil"]
    assert gil == {"unavailable": "gilknocker is not installed (it is the optional extra `gil`)"}


def test_a_run_that_is_timed_is_not_watched(tiny, monkeypatch):
    monkeypatch.setattr(threads, "gil_watch", None)
    gil = STRATEGIES["threads"](tiny, make(tiny), {}).notes["gil"]
    assert "was not watched" in gil["unavailable"]


def test_gil_contention_rises_when_a_thread_holds_the_lock():
    pytest.importorskip("gilknocker")

    def holder():
        end = time.perf_counter() + 0.6
        while time.perf_counter() < end:
            pass

    with threads.gil_watch() as held:
        holder()
    with threads.gil_watch() as free:
        time.sleep(0.6)
    assert held["contention"] > 0.5 > 0.2 > free["contention"]


@pytest.mark.parametrize(("name", "options"), IN_ORDER, ids=names(IN_ORDER))
def test_an_error_in_one_worker_is_raised_and_ends_the_others(tiny, name, options):
    """Request 1 fails: the run ends with its error, long before the others would have ended."""
    calls, count = [], itertools.count()

    def failing():
        time.sleep(0.002)
        number = next(count)  # one step in C: two threads cannot get the same number
        calls.append(number)
        if number == 7:
            raise MemoryError("CUDA out of memory")

    before = threading.active_count()
    with pytest.raises(MemoryError, match="out of memory"):
        STRATEGIES[name](tiny, make(tiny, 4, 4, 100), options | {"on_step": failing})
    assert len(calls) < 30
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("name", "options"),
    [c for c in IN_ORDER if c[0] in ("coroutine", "threads")],
    ids=names([c for c in IN_ORDER if c[0] in ("coroutine", "threads")]),
)
def test_ctrl_c_ends_every_worker(tiny, name, options, caplog):
    """It comes while the answers, 8 s of them, are being written: as from a terminal."""
    before, start = threading.active_count(), time.perf_counter()
    # a shell has what it starts in the background ignore Ctrl-C
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, _thread.interrupt_main)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            STRATEGIES[name](tiny, make(tiny, 4, 4, 400), options | slow_step(5))
    finally:
        timer.join()
        signal.signal(signal.SIGINT, found)
    assert time.perf_counter() - start < 5
    assert threading.active_count() == before
    gc.collect()
    assert "never retrieved" not in caplog.text  # one Ctrl-C is reported once


def test_a_notebooks_event_loop_goes_on_after_a_coroutine_run(tiny):
    async def cell():
        task = asyncio.current_task()
        with pytest.raises(RuntimeError, match="the loop failed"):
            STRATEGIES["coroutine"](tiny, make(tiny, 2), {"on_step": failing})
        STRATEGIES["coroutine"](tiny, make(tiny, 2), {"variant": "to_thread"})
        await asyncio.sleep(0)
        return asyncio.current_task() is task

    def failing():
        raise RuntimeError("the loop failed")

    assert asyncio.run(cell())


def test_a_coroutine_run_stays_in_the_callers_thread(tiny):
    seen = set()
    STRATEGIES["coroutine"](
        tiny, make(tiny, 2), {"on_step": lambda: seen.add(threading.get_ident())}
    )
    assert seen == {threading.get_ident()}


@pytest.fixture
def costless(monkeypatch):
    """A decoding loop that costs nothing: what is left is the strategy itself."""

    def nothing(model, requests, **how):
        for step in range(max(r.max_new_tokens for r in requests)):
            yield [0 if step < r.max_new_tokens else None for r in requests]

    monkeypatch.setattr(generate, "decode", nothing)


@pytest.mark.parametrize(
    ("name", "options", "n"),
    [
        ("threads", {"intra_op": 1}, 100),
        ("coroutine", {}, 1000),
        ("coroutine", {"variant": "yielding"}, 1000),
        ("coroutine", {"variant": "to_thread"}, 1000),
    ],
)
def test_a_crowd_ends_and_leaves_nothing_behind(tiny, costless, name, options, n):
    before = threading.active_count()
    trace = STRATEGIES[name](tiny, make(tiny, n, 3, 2), options)
    assert trace.output_tokens == 2 * n
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("threads", {"workers": 0}, "workers is 0: it must be a whole number, at least 1"),
        ("threads", {"workers": -2}, "workers is -2: it must be a whole number"),
        ("threads", {"workers": 2.5}, "workers is 2.5: it must be a whole number"),
        ("threads", {"intra_op": 0}, "intra_op is 0"),
        ("threads", {"stream": "own"}, "a stream of its own needs a CUDA GPU"),
        ("threads", {"stream": "mine"}, "stream is 'mine': it must be default or own"),
        ("threads", {"batch": 2}, "threads has no option 'batch': its options are workers"),
        ("coroutine", {"variant": "magic"}, "variant is 'magic': it must be blocking or yielding"),
        ("coroutine", {"workers": 0}, "workers is 0"),
        ("batch", {"batch_size": 0}, "batch_size is 0"),
        ("sequential", {"workers": 2}, "sequential has no option 'workers': its options are none"),
        ("fast", {}, "unknown strategy 'fast': choose sequential, batch"),
    ],
)
def test_bad_options_are_one_clear_sentence(tiny, name, options, words):
    with pytest.raises(ValueError, match=words):
        strategies.check(name, tiny, 4, options)


def test_intra_op_is_refused_on_a_gpu(tiny):
    with pytest.raises(ValueError, match="intra_op is for the cpu: leave it out"):
        strategies.check("threads", replace(tiny, device="cuda:0"), 2, {"intra_op": 1})


def test_a_worker_keeps_its_stream_over_all_runs(monkeypatch):
    made = []
    fake = SimpleNamespace(Stream=lambda device: made.append(device) or len(made))
    monkeypatch.setattr(threads.torch, "cuda", fake)
    threads._stream.cache_clear()
    try:
        runs = [[threads._stream("cuda:0", worker) for worker in range(3)] for _ in range(4)]
    finally:
        threads._stream.cache_clear()
    assert runs == [[1, 2, 3]] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["default", "own"])
def test_streams_give_the_same_tokens(tiny_folder, stream):
    from llmperf import models

    model = models.load(str(tiny_folder), dtype="fp32", device="cuda")
    work = make(model)
    reference = STRATEGIES["sequential"](model, work, {})
    assert STRATEGIES["threads"](model, work, {"stream": stream}).digest() == reference.digest()
