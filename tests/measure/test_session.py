"""measure(): the order, what is resumed, what fails, when it stops, what a record holds."""

import gc
import json
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmperf import machine, predict, strategies
from llmperf.decoding.requests import GREEDY, PUBLISHED
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import Condition, Record, Store, measure, paired, results, session
from llmperf.measure.session import REFERENCE_REQUESTS, WARMUP_RUNS, WARMUP_TOKENS

CEILINGS = {
    "read_bytes_per_s": {"median": 1e12},
    "flops_per_s": dict.fromkeys(("fp32", "bf16", "fp16"), {"median": 1e15}),
    "launch_s": {"drained": {"median": 1e-6}},
}


class Blind:
    """In the sampler's place: starts no process and sees nothing."""

    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def window(self, **_):
        return nullcontext({})


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No other program is busy."""
    monkeypatch.setattr(machine, "busy", lambda device: None)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "records.jsonl")


@pytest.fixture
def points(tiny):
    return [Condition(tiny, "sequential", n, prompt_tokens=4, new_tokens=2) for n in (1, 2, 3)]


def run(conditions, store, **options):
    options = {"sampler": Blind(), "limits": CEILINGS, **options}
    return measure("test", conditions, store, **options)


def counted(store):
    return [r for r in store.read() if r.kind == "measure"]


def made_up(seconds):
    """A strategy whose every run takes the next of `seconds`, and the last one from then on."""
    left = list(seconds)

    def strategy(model, workload, options):
        taken = left.pop(0) if len(left) > 1 else left[0]
        requests = tuple(
            RequestTrace(r.id, 4, 0.0, 0.0, 0.0, (taken / 2, taken), (1, 2))
            for r in workload.requests
        )
        return Trace(requests, taken)

    return strategy


def stand_in(monkeypatch, name, run):
    """The strategy of that name runs `run` instead."""
    known = strategies.STRATEGIES
    monkeypatch.setitem(known, name, replace(known[name], run=run))


def failing(error):
    def strategy(model, workload, options):
        raise error

    return strategy


# The order of the runs


def test_every_round_has_each_condition_once_in_an_order_of_its_own(points, store, tmp_path):
    run(points, store, repeats=6, seed=1)
    levels = [(r.repeat, r.condition["level"]) for r in counted(store)]
    rounds = [[n for repeat, n in levels if repeat == i] for i in range(6)]
    assert [repeat for repeat, _ in levels] == sorted(repeat for repeat, _ in levels)
    assert all(sorted(order) == [1, 2, 3] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1, "not the same order in every round"
    again, other = Store(tmp_path / "again.jsonl"), Store(tmp_path / "other.jsonl")
    run(points, again, repeats=6, seed=1)
    run(points, other, repeats=6, seed=2)
    assert [(r.repeat, r.condition["level"]) for r in counted(again)] == levels
    assert [(r.repeat, r.condition["level"]) for r in counted(other)] != levels


@pytest.mark.parametrize("kept", [0, 4, 7, -2])
def test_a_run_that_was_cut_off_ends_with_the_same_records(
    points, tiny, store, tmp_path, monkeypatch, kept
):
    stand_in(monkeypatch, "batch", failing(ValueError("no")))
    conditions = [*points, Condition(tiny, "batch", 2, prompt_tokens=4, new_tokens=2)]
    run(conditions, store, repeats=3)
    lines = store.path.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:kept]) + lines[kept][:30])
    with pytest.warns(UserWarning, match="torn"):
        again = Store(cut)
    before = again.read()
    run(conditions, again, repeats=3)
    assert again.read()[: len(before)] == before, "what was there is not touched"
    whole = sorted((r.key, r.status, r.reason or "") for r in store.read())
    assert sorted((r.key, r.status, r.reason or "") for r in again.read()) == whole
    assert len({key for key, *_ in whole}) == len(whole)


def test_what_is_there_is_not_run_again(points, store, monkeypatch):
    run(points, store, repeats=2)
    size, asked = store.path.stat().st_size, []
    monkeypatch.setattr(machine, "busy", lambda device: asked.append(1))
    stand_in(monkeypatch, "sequential", failing(AssertionError("run again")))
    found = run(points, store, repeats=2)
    assert store.path.stat().st_size == size and not asked
    assert list(found.frame.status) == ["ok"] * 6


# Failures


def test_a_failure_is_a_record_and_the_rest_go_on(points, tiny, store, monkeypatch):
    home = str(Path.home())
    error = ValueError(f"cannot read {home}/model\nand a second line")
    stand_in(monkeypatch, "batch", failing(error))
    found = run([Condition(tiny, "batch", 2, new_tokens=2), points[0]], store, repeats=3)
    rows = found.frame.sort_values("repeat")
    assert list(rows[rows.strategy == "sequential"].status) == ["ok"] * 3
    failed = [r for r in found.records if r.condition["strategy"] == "batch"]
    assert [(r.kind, r.status) for r in failed] == [("failed", "error")]
    assert failed[0].reason == "ValueError: cannot read ~/model"
    assert all(r.trace is None and not r.metrics and not r.prediction for r in failed)


def test_what_surely_does_not_fit_is_refused_with_the_arithmetic(points, tiny, store, monkeypatch):
    """Its cache alone: 2 x 2 layers x 16 entries x 4 bytes x 11 tokens for each row."""
    huge = Condition(tiny, "batch", 2, "cached", prompt_tokens=10, new_tokens=2)
    object.__setattr__(huge, "level", 200_000_000)  # no machine here has 524 GiB
    monkeypatch.setattr(
        Condition, "run", lambda *a, **k: made_up([1.0])(None, points[0].workload, {})
    )
    found = run([huge, points[0]], store, repeats=2)
    rows = found.frame.groupby("level").status.agg(list)
    assert rows[200_000_000] == ["skipped"] and rows[1] == ["ok", "ok"]
    said = next(r.reason for r in found.records if r.status == "skipped")
    assert said.startswith("refused beforehand: ") and "kv cache 524.52" in said
    assert "does not fit in" in said and "held already" in said


@pytest.mark.parametrize("kind", ["torch", "python", "text"])
def test_out_of_memory_has_a_status_of_its_own(tiny, store, monkeypatch, kind):
    import torch

    error = {
        "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "python": MemoryError(),
        "text": RuntimeError("[enforce fail] DefaultCPUAllocator: Out of memory"),
    }[kind]
    stand_in(monkeypatch, "batch", failing(error))
    found = run([Condition(tiny, "batch", 2, new_tokens=2)], store, repeats=2)
    assert list(found.frame.status) == ["oom"]


def test_what_a_failed_run_held_is_free_before_the_next_run(tiny, points, store, monkeypatch):
    class Tensor:
        pass

    held, alive = [], []

    def fails(model, workload, options):
        tensor = Tensor()
        tensor.cycle = tensor
        held.append(weakref.ref(tensor))
        raise MemoryError

    def looks(model, workload, options):
        alive.extend(ref() is not None for ref in held)
        return made_up([1.0])(model, workload, options)

    gc.disable()
    stand_in(monkeypatch, "batch", fails)
    stand_in(monkeypatch, "sequential", looks)
    run([Condition(tiny, "batch", 1, new_tokens=2), points[0]], store, repeats=2)
    gc.enable()
    assert held and alive and not any(alive)


def test_a_failure_leaves_its_place_open_and_is_tried_again(tiny, store, monkeypatch):
    condition = Condition(tiny, "batch", 1, prompt_tokens=4, new_tokens=2)
    stand_in(monkeypatch, "batch", failing(RuntimeError("worker 1 died (exit code -9)")))
    found = run([condition], store, repeats=3)
    assert list(found.frame.status) == ["error"] and found.frame.kind[0] == "failed"
    stand_in(monkeypatch, "batch", made_up([1.0]))
    again = run([condition], Store(store.path), repeats=3)
    assert [r.status for r in again.records if r.kind == "measure"] == ["ok"] * 3
    assert not [r for r in again.records if r.kind == "failed"]  # repaired: the file keeps it
    assert "worker 1 died" in store.path.read_text(encoding="utf-8")


def test_a_request_that_failed_makes_its_run_a_failure(tiny, store, monkeypatch):
    def strategy(model, workload, options):
        bad = RequestTrace(0, 4, 0.0, 0.0, None, (), (), "error", "the server is gone")
        return Trace((bad,), 1.0)

    stand_in(monkeypatch, "batch", strategy)
    found = run([Condition(tiny, "batch", 1, new_tokens=2)], store, repeats=2)
    assert list(found.frame.status) == ["error"] and not counted(store)
    assert found.frame.reason[0] == "the server is gone"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_never_a_failed_run(tiny, store, monkeypatch, stop):
    """Not even when leaving the sampler's window breaks on the way out."""

    @contextmanager
    def breaks():
        try:
            yield {}
        except stop:
            raise BrokenPipeError("the sampler took the signal too") from None

    warm = made_up([1.0])

    def interrupted(model, workload, options):
        if any(r.kind == "warmup" for r in store.read()):
            raise stop
        return warm(model, workload, options)

    stand_in(monkeypatch, "batch", interrupted)
    sampler = Blind()
    sampler.window = lambda **_: breaks()
    with pytest.raises(stop):
        run([Condition(tiny, "batch", 1, prompt_tokens=5, new_tokens=2)], store, sampler=sampler)
    assert not counted(store)


def test_bad_numbers_are_refused(points, store):
    with pytest.raises(ValueError, match="repeats is 0"):
        run(points, store, repeats=0)
    with pytest.raises(ValueError, match="there is no condition"):
        run([], store)
    assert store.read() == []


# What is kept apart, and what a record holds


def test_warmup_and_reference_are_kept_and_never_counted(tiny, store):
    conditions = [
        Condition(tiny, strategy, level, prompt_tokens=4, new_tokens=6)
        for strategy, level in (("batch", 6), ("sequential", 6), ("batch", 2))
    ]
    found = run(conditions, store, repeats=2)
    kinds = [r.kind for r in store.read()]
    assert (kinds.count("measure"), kinds.count("warmup"), kinds.count("reference")) == (6, 3, 1)
    assert set(found.frame.kind) == {"measure"} and len(found.frame) == 6
    for r in store.read():
        longest = max(len(row.tokens) for row in Trace.from_dict(r.trace).requests)
        if r.kind == "warmup":
            assert longest == WARMUP_TOKENS
            assert len(r.metrics["warmup_s"]) == WARMUP_RUNS["cpu"]
        else:
            assert longest == 6
        if r.kind == "reference":
            assert r.condition["strategy"] == "sequential"
            assert len(Trace.from_dict(r.trace).requests) == REFERENCE_REQUESTS


def test_notebooks_of_a_study_share_a_reference(tiny, store, monkeypatch):
    points = [Condition(tiny, "batch", n, prompt_tokens=4, new_tokens=4) for n in (1, 3)]
    run(points[1:], store, repeats=1)
    monkeypatch.setattr(session, "_warm", set())  # as in another process
    more = Store(store.path)
    found = measure("other", points, more, repeats=1, sampler=Blind(), limits=CEILINGS).records
    kinds = [r.kind for r in more.read()]
    assert kinds.count("reference") == 1
    assert [r.agreement["agree"] for r in found if r.kind == "measure"] in ([1, 3], [3, 1])
    warm = [len(r.metrics["warmup_s"]) for r in found if r.kind == "warmup"]
    assert sorted(warm) == [1, 2]  # nothing has warmed this process before the first
    again = measure("third", points, more, repeats=1, sampler=Blind(), limits=CEILINGS).records
    assert [len(r.metrics["warmup_s"]) for r in again if r.kind == "warmup"] == [1, 1]
    larger = Condition(tiny, "batch", 4, prompt_tokens=4, new_tokens=4)
    run([larger], Store(store.path), repeats=1)
    assert [r.condition["level"] for r in store.read() if r.kind == "reference"] == [3, 4]


def test_what_runs_in_other_processes_warms_this_one_not(tiny, store, monkeypatch):
    point = Condition(tiny, "batch", 2, prompt_tokens=4, new_tokens=4)
    run([point], store, repeats=1)
    monkeypatch.setattr(session, "_warm", set())
    known = strategies.STRATEGIES
    monkeypatch.setitem(known, "threads", replace(known["threads"], served=True))
    served = replace(point, strategy="threads")
    found = run([served], Store(store.path), repeats=1).records
    warm = [r for r in found if r.kind == "warmup" and r.condition["strategy"] == "threads"]
    assert [len(r.metrics["warmup_s"]) for r in warm] == [1] and not session._warm


def test_a_reference_by_another_loop_is_not_shared(tiny, store):
    point = Condition(tiny, "batch", 2, "cached", prompt_tokens=4, new_tokens=4)
    run([point], store, repeats=1)
    lines = [json.loads(line) for line in store.path.read_text().splitlines()]
    for line in (x for x in lines if x["kind"] == "reference"):
        line["trace"]["notes"]["loop"] = "recompute"
    store.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    measure("other", [point], Store(store.path), repeats=1, sampler=Blind(), limits=CEILINGS)
    assert [r.kind for r in store.read()].count("reference") == 2


@pytest.mark.parametrize("change", ["packages", "lengths", "damaged"])
def test_a_reference_of_other_work_or_packages_is_not_shared(tiny, store, change):
    point = Condition(tiny, "batch", 2, prompt_tokens=4, new_tokens=4)
    run([point], store, repeats=1)
    lines = [json.loads(line) for line in store.path.read_text().splitlines()]
    for line in (x for x in lines if x["kind"] == "reference"):
        if change == "packages":
            line["environment"]["packages"]["torch"] = "1.0"
        elif change == "damaged":
            del line["trace"]["requests"][0]["tokens"]
    store.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = replace(point, new_tokens=5) if change == "lengths" else point
    measure("other", [other], Store(store.path), repeats=1, sampler=Blind(), limits=CEILINGS)
    assert [r.kind for r in store.read()].count("reference") == 2


@pytest.mark.parametrize(
    ("strategy", "lengths", "options", "requests"),
    [
        ("sequential", 4, {}, 2),
        ("sequential", [4, 5], {}, 6),
        ("sequential", (4, 5), {}, 6),  # each length may need a buffer or a graph
        ("coroutine", 4, {}, 2),
        ("coroutine", 4, {"variant": "to_thread"}, 6),
        ("threads", 4, {"workers": 3}, 3),
        ("batch", 4, {"batch_size": 4}, 4),
    ],
)
def test_a_warmup_runs_what_runs_at_the_same_time(tiny, strategy, lengths, options, requests):
    condition = Condition(tiny, strategy, 6, prompt_tokens=lengths, options=options)
    short = condition.shortened(2).requests
    assert len(short) == requests
    assert {r.max_new_tokens for r in short} == {2}


@pytest.mark.parametrize(("seconds", "runs"), [([1.0], 2), ([1.0, 0.8], 3), ([1.0, 2.0, 3.0], 3)])
def test_warmup_ends_when_times_settle(tiny, store, monkeypatch, seconds, runs):
    stand_in(monkeypatch, "batch", made_up(seconds))
    monkeypatch.setitem(WARMUP_RUNS, "cpu", WARMUP_RUNS["cuda"])
    run([Condition(tiny, "batch", 2, prompt_tokens=4, new_tokens=2)], store, repeats=1)
    (warm,) = [r for r in store.read() if r.kind == "warmup"]
    assert len(warm.metrics["warmup_s"]) == runs


def test_agreement_is_recorded_and_shows_other_tokens(tiny, store, monkeypatch):
    batch = Condition(tiny, "batch", 6, prompt_tokens=(3, 9), new_tokens=5)
    found = run([batch], store, repeats=1)
    (row,) = found.frame.itertuples()
    assert (row.agree, row.compared) == (4, 4)
    honest = strategies.STRATEGIES["batch"]

    def wrong(model, workload, options):
        trace = honest(model, workload, options)
        bad = trace.requests[1]
        tokens = (bad.tokens[0], bad.tokens[1] + 1, *bad.tokens[2:])
        requests = [replace(r, tokens=tokens) if r.id == bad.id else r for r in trace.requests]
        return replace(trace, requests=tuple(requests))

    stand_in(monkeypatch, "batch", wrong)
    (record,) = [r for r in run([replace(batch, seed=1)], store, repeats=1).records if r.agreement]
    assert record.agreement == {"agree": 3, "total": 4, "first_divergence": [1, 1]}


def test_tokens_of_another_random_stream_are_not_compared(tiny, store):
    both = [
        Condition(tiny, "peer", 2, prompt_tokens=4, new_tokens=3, sampling=sampling)
        for sampling in (GREEDY, PUBLISHED)
    ]
    found = run(both, store, repeats=1)
    kept = {r.condition["sampling"]["greedy"]: r.agreement for r in found.records}
    assert kept == {True: {"agree": 2, "total": 2, "first_divergence": None}, False: None}
    assert found.frame.compared.sum() == 2


def test_the_prediction_is_made_before_the_run_and_audited_after(tiny, store, monkeypatch):
    one = Condition(tiny, prompt_tokens=4, new_tokens=2)
    (row,) = run([one], store, repeats=1).frame.itertuples()
    assert row.plausible and 0 < row.mbu < 1 and row.bound_s < row.duration_s
    assert row.read_bytes_per_s == 1e12 and row.memory_level == "process"
    assert 0 < row.memory_low_bytes < row.memory_high_bytes
    slow = {**CEILINGS, "read_bytes_per_s": {"median": 1.0}}
    other = Store(store.path.with_name("slow.jsonl"))
    (row,) = run([replace(one, seed=1)], other, repeats=1, limits=slow).frame.itertuples()
    assert not row.plausible and row.mbu > 1


def test_before_a_run_is_called_impossible_the_bandwidth_is_measured_again(
    tiny, store, monkeypatch
):
    slow = {**CEILINGS, "read_bytes_per_s": {"median": 1.0}}
    monkeypatch.setattr(session.ceilings, "now", lambda device: slow)
    monkeypatch.setattr(session.ceilings, "this_minute", lambda limits, device: CEILINGS)
    one = Condition(tiny, prompt_tokens=4, new_tokens=2)
    (row,) = run([one], store, repeats=1, limits=None).frame.itertuples()
    assert row.plausible and row.most_read_bytes_per_s == 1e12 and row.read_bytes_per_s == 1.0


def test_watched_runs_count_for_nothing_else(tiny, store, monkeypatch):
    asked = []
    right = Condition.run
    monkeypatch.setattr(
        Condition, "run", lambda *a, watch=False: (asked.append(watch), right(*a, watch=watch))[1]
    )
    one = Condition(tiny, "threads", 2, prompt_tokens=4, new_tokens=2)
    timed = run([one], store, repeats=1)
    watched = run([one], store, repeats=2, watch=True)
    assert asked.count(True) == 2 and len(counted(store)) == 1
    assert len(watched.traces("watched", level=2)) == 2 and len(timed.traces(level=2)) == 1
    assert len(run([one], store, repeats=2, watch=True).traces("watched")) == 2
    assert asked.count(True) == 2


def test_only_threads_can_be_watched(tiny, store):
    one = Condition(tiny, prompt_tokens=4, new_tokens=2)
    (failed,) = run([one], store, repeats=1, watch=True).frame.itertuples()
    assert failed.status == "error" and "sequential has no option 'watch'" in failed.reason


def test_a_store_of_another_machine_is_read_and_not_added_to(tiny, store):
    one = Condition(tiny, prompt_tokens=4, new_tokens=2)
    run([one], store, repeats=1)
    path = store.path.with_name("moved.jsonl")
    own = json.dumps(store.read()[0].environment["cpu_model"])
    path.write_text(store.path.read_text().replace(own, '"Apple M9"'), encoding="utf-8")
    moved = Store(path)
    assert len(run([one], moved, repeats=1).records) == len(store.read())
    with pytest.raises(ValueError, match="moved.jsonl holds runs of another machine .Apple M9"):
        run([one], moved, repeats=2)


def test_the_audit_counts_the_tokens_that_came_and_no_other_machine(tiny):
    asked = {"url": "http://localhost:1/v1"}
    other = Condition(tiny, "endpoint", 1, "cached", options=asked, prompt_tokens=4, new_tokens=2)
    assert session.predict_run(other, limits=CEILINGS) == {}
    assert session.prediction.audit(other, {}, made_up([1.0])(tiny, other.workload, {})) == {}
    one = Condition(tiny, "batch", 2, prompt_tokens=4, new_tokens=8)
    before = session.predict_run(one, limits=CEILINGS)
    whole = one.run()
    half = replace(whole, requests=(whole.requests[0], replace(whole.requests[1], tokens=())))
    full, less = (session.prediction.audit(one, before, trace) for trace in (whole, half))
    assert less["mbu"] == pytest.approx(full["mbu"] / 2)


def test_a_full_disk_ends_the_measurement_and_is_no_fault_of_a_condition(tiny, store, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    conditions = [Condition(tiny, "batch", n, prompt_tokens=4, new_tokens=2) for n in (1, 2)]
    with monkeypatch.context() as patched:
        patched.setattr(session.records.os, "fsync", full)
        with pytest.raises(session.records.NotWritten, match="No space left"):
            run(conditions, store, repeats=1)
    assert store.read() == []
    assert {r.kind for r in run(conditions, store, repeats=1).records} == {"warmup", "measure"}


def test_a_step_is_expected_at_the_bandwidth_of_its_round(tiny, store, monkeypatch):
    seen = iter((2e12, 3e12))
    monkeypatch.setattr(session.ceilings, "now", lambda device: CEILINGS)
    later = lambda limits, device: limits | {"read_bytes_per_s": {"median": next(seen)}}  # noqa: E731
    monkeypatch.setattr(session.ceilings, "this_minute", later)
    one = Condition(tiny, prompt_tokens=4, new_tokens=2)
    frame = run([one], store, repeats=2, expect=True, limits=None).frame
    assert list(frame.read_bytes_per_s) == [2e12, 3e12] and frame.expected_tpot_ms.notna().all()
    frame = run([replace(one, seed=1)], store, repeats=2, limits=None).frame
    assert list(frame.read_bytes_per_s) == [1e12, 1e12]


def test_a_run_says_which_loop_ran_and_the_other_sizes_do_not(tiny, store, monkeypatch):
    honest = strategies.STRATEGIES["batch"].run

    def falls_back(model, workload, options):
        trace = honest(model, workload, {})
        notes = {"loop": "compiled"}
        if len(workload.requests) == 2:
            notes = {"loop": "cached", "fallback": "no kernel for this size"}
        return replace(trace, notes=notes)

    stand_in(monkeypatch, "batch", falls_back)
    sizes = [Condition(tiny, "batch", n, "compiled", 4, 3) for n in (1, 2, 3)]
    frame = run(sizes, store, repeats=1).frame.set_index("level")
    assert frame.warnings[2] == "compiled ran as cached: no kernel for this size"
    assert frame.warnings[1] == frame.warnings[3] == ""


def test_the_same_condition_twice_is_compared_and_never_counted(tiny, store, monkeypatch):
    rng = np.random.default_rng(0)
    stand_in(monkeypatch, "batch", made_up(np.exp(0.02 * rng.normal(size=40)).tolist()))
    conditions = [Condition(tiny, "batch", n, prompt_tokens=4, new_tokens=2) for n in (1, 2)]
    found = run(conditions, store, repeats=8, twin=True)
    assert len(found.frame) == 16 and len([r for r in found.records if r.kind == "twin"]) == 8
    twin = found.twin()
    assert twin.verdict == "cannot tell" and twin.low is not None


def test_memory_of_a_card_that_this_process_holds_is_not_in_use(monkeypatch):
    card = {"name": "RTX 4070", "memory_used_bytes": 5 * 2**30}
    here = {"gpus": [dict(card)], "os": "Windows"}
    monkeypatch.setattr(session.machine, "describe", lambda: here)
    monkeypatch.setattr(session, "torch_in_use", lambda: torch)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 3 * 2**30)
    found = session._described.__wrapped__()
    context = predict.least_context("windows")
    assert found["gpus"][0]["memory_used_bytes"] == 2 * 2**30 - context


def test_on_a_gpu_the_memory_of_a_served_run_is_that_of_its_workers(tiny):
    on_card = Condition(replace(tiny, device="cuda:0"), "processes", 2)
    held = {"allocated_bytes": 5, "reserved_bytes": 7}
    trace = Trace((), 1.0, {"workers": [held, held], "device_before": {"bytes": 3}})
    found = session._memory_of_workers(on_card, trace)
    assert (found["allocated"]["max"], found["reserved"]["max"]) == (10, 14)
    assert found["device_before"]["max"] == 3
    unknown = session._memory_of_workers(on_card, Trace((), 1.0, {"workers": [held, {}]}))
    assert unknown["allocated"]["status"] == unknown["device_before"]["status"] == "unavailable"
    assert session._memory_of_workers(Condition(tiny, "processes", 2), trace) == {}


def test_a_busy_machine_is_noted_in_the_record_and_the_frame(points, store, monkeypatch):
    noted = iter(["others use 50 % of the CPU", None])
    monkeypatch.setattr(machine, "busy", lambda device: next(noted))
    frame = run(points, store, repeats=2).frame
    assert list(frame[frame.repeat == 0].warnings) == ["unstable: others use 50 % of the CPU"] * 3
    assert not frame[frame.repeat == 1].warnings.str.contains("others").any()


# Warnings that only a series shows


def series(speeds, level=1, **fields):
    return [
        Record("e", {"strategy": "s", "level": level}, i, metrics={"output_tokens_per_s": v})
        for i, v in enumerate(speeds)
    ]


def test_a_drift_warns_in_every_record_of_the_measurement():
    rows = [series([10 * n, 9.5 * n, 9 * n], n) for n in (1, 2, 3, 4)]
    mixed = [r for three in zip(*rows, strict=True) for r in three]
    found = results.with_warnings(mixed)
    text = "unstable: throughput has a trend of -10.0% over 12 runs"
    assert {tuple(r.warnings) for r in found} == {(text,)}
    assert all(not r.warnings for r in mixed), "the records themselves are left as they were"
    assert results.with_warnings(found) == found, "and nothing is said twice"
    steady = [r for n in (1, 2) for r in series([10 * n, 11 * n, 9.9 * n], n)]
    assert not any(r.warnings for r in results.with_warnings(steady))


def test_failed_runs_and_warmups_are_no_part_of_a_series():
    rows = series([30.0, 30.1, 29.9, 30.0])
    odd = [
        replace(rows[0], kind="warmup", metrics={"warmup_s": [1]}),
        replace(rows[0], kind="twin", metrics={"output_tokens_per_s": 60.0}),
        replace(rows[0], repeat=9, status="oom", metrics={}),
        replace(rows[0], repeat=10, metrics={"output_tokens_per_s": None}),
    ]
    assert not any(r.warnings for r in results.with_warnings([*odd, *rows]))


def test_drift_reaches_the_results_and_leaves_the_store_alone(tiny, store, monkeypatch):
    times = [1.0] * 4 + [1.0, 1.03, 1.06, 1.09, 1.12, 1.15, 1.18, 1.2]  # reference, warm-up, runs
    stand_in(monkeypatch, "sequential", made_up(times[1:]))
    frame = run([Condition(tiny, prompt_tokens=4, new_tokens=2)], store, repeats=8).frame
    assert frame.warnings.str.contains("unstable: throughput has a trend").all()
    assert all(json.loads(line)["warnings"] == [] for line in store.path.open(encoding="utf-8"))


def test_arms_run_in_turn_and_the_first_round_is_not_counted():
    ran = []

    def arm(name):
        def go():
            ran.append(name)
            taken = 100.0 if len(ran) <= 2 else {"a": 1.0, "b": 2.0}[name]
            return Trace((RequestTrace(0, 1, 0.0, 0.0, 0.0, (taken,), (7,)),), taken)

        return go

    speeds = paired({"a": arm("a"), "b": arm("b")}, rounds=6)
    assert speeds == {"a": [1.0] * 6, "b": [0.5] * 6}
    rounds = [tuple(ran[i : i + 2]) for i in range(0, 14, 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}
    with pytest.raises(ValueError, match="rounds is 0"):
        paired({"a": arm("a")}, rounds=0)


def test_memory_is_watched(points, store):
    found = run(points[:1], store, repeats=1, sampler=None)
    assert found.frame.max_rss_bytes.iloc[0] > 50e6


@pytest.mark.parametrize(("home", "shown"), [("/home/ann", "no ~/x"), ("/", "no /home/ann/x")])
def test_a_reason_names_no_home_and_keeps_its_slashes(points, store, monkeypatch, home, shown):
    def fail(*_, **__):
        raise OSError("no /home/ann/x")

    monkeypatch.setattr(Path, "home", lambda: Path(home))
    monkeypatch.setattr(Condition, "run", fail)
    found = run(points[:1], store, repeats=1)
    assert found.records[-1].reason == f"OSError: {shown}"


def test_a_kept_process_leaves_the_card_before_anything_asks_for_room(tmp_path, monkeypatch):
    asked = []

    def stop(model):
        raise InterruptedError("asked for room")

    monkeypatch.setattr(session.served, "ensure_started", lambda model, n: asked.append(n))
    monkeypatch.setattr(session.predict, "cap_allocator", stop)
    condition = SimpleNamespace(model=SimpleNamespace(device="cuda:0"))
    with pytest.raises(InterruptedError):
        measure("x", [condition], Store(tmp_path / "r.jsonl"), limits=CEILINGS)
    assert asked == [0]
