"""Each finding against synthetic records for every verdict, and against the published rows."""

from dataclasses import replace

import pytest
import yaml

from llmperf import findings
from llmperf.findings import CANNOT_TELL, FAILS, HOLDS, NOT_TESTABLE, published
from llmperf.measure import Record

GIB = 2**30
NOISE = (0.98, 0.99, 1.0, 1.01, 1.02)  # five repeats: an interval is possible
WEIGHTS = 0.4636 * GIB


def env(os="Linux", gpu="RTX A2000 Laptop"):
    cards = [{"name": gpu, "memory_total_bytes": 4 * GIB, "memory_used_bytes": 0}] if gpu else []
    return {"os": os, "cpu_model": "some CPU", "gpus": cards}


def run(strategy, level, seconds, *, noise=NOISE, os="Linux", gpu="RTX A2000 Laptop", **more):
    """Records of one condition, one a repeat; `more` fills options, memory, notes and the like."""
    condition = {
        "strategy": strategy,
        "level": level,
        "loop": more.pop("loop", "cached"),
        "options": more.pop("options", {}),
        "model": more.pop("model", "gpt2"),
        "dtype": "fp32",
        "quantization": None,
        "weights": "trained",
        "device": "cuda" if gpu else "cpu",
        "prompt_tokens": 32,
        "new_tokens": more.pop("tokens", 256),
        **more.pop("asked", {}),
    }
    memory = {
        k: {"status": "ok", "unit": "bytes"} | (v if isinstance(v, dict) else {"max": v})
        for k, v in more.pop("memory", {}).items()
    }
    metrics = more.pop("metrics", {})
    more.setdefault("trace", {"notes": more.pop("notes", {}), "requests": []})
    more["prediction"] = {"weights_bytes": WEIGHTS} | more.get("prediction", {})
    return [
        Record(
            experiment="x",
            condition=condition,
            repeat=i,
            environment=env(os, gpu),
            metrics={
                "duration_s": seconds * f,
                "output_tokens_per_s": level * 256 / (seconds * f),
                **{k: v * f for k, v in metrics.items()},
            }
            if more.get("status", "ok") == "ok"
            else {},
            memory=memory,
            **more,
        )
        for i, f in enumerate(noise)
    ]


def verdict(id, *groups):
    records = [r for group in groups for r in group]
    return next(v for v in findings.judge_all(records) if v.id == id)


def held(gib, allocated=0.484):
    return {"memory": {"reserved": gib * GIB, "allocated": {"first": allocated * GIB}}}


def used(device, idle=0.3, inside=0.58):
    idle = {"device_idle": idle * GIB} if idle else {}
    return {"memory": {"device_used": device * GIB, "reserved": inside * GIB, **idle}}


def both(many, windows, wsl2):
    """One request, and `many` = (strategy, level), in these seconds on the two platforms."""
    return [
        run(strategy, level, seconds, os=os)
        for os, times in (("Windows", windows), ("WSL2", wsl2))
        for (strategy, level), seconds in zip((("sequential", 1), many), times, strict=True)
    ]


def contention(level, seconds, share, **more):
    return run("threads", level, seconds, notes={"gil": {"contention": share}}, **more)


def arriving(strategy, goodput, **more):
    asked = {"arrivals": {"kind": "poisson", "rate_per_s": 3.0}}
    return run(strategy, 8, 10, metrics={"goodput_per_s": goodput}, asked=asked, **more)


def utilised(strategy, percent, level=10, **more):
    memory = {"utilization": {"mean": percent, "unit": "percent"}}
    rows = zip(run(strategy, level, 3, memory=memory, **more), NOISE, strict=True)
    return [
        replace(r, memory={k: v | {"mean": percent * f} for k, v in r.memory.items()})
        for r, f in rows
    ]


CASES = [
    # finding, records under which it holds, records under which it does not
    ("batch-time", [run("batch", n, s, os="Windows") for n, s in ((1, 2), (10, 2.5))],
     [run("batch", n, s, os="Windows") for n, s in ((1, 2), (10, 4))]),
    ("batch-throughput", [run("batch", 1, 2), run("batch", 10, 2.5)],
     [run("batch", 1, 2), run("batch", 10, 8)]),
    ("batch-reserved", [run("batch", 1, 2, **held(0.578)), run("batch", 10, 3, **held(1.051))],
     [run("batch", 1, 2, **held(0.578)), run("batch", 10, 3, **held(3.5))]),
    ("coroutine-serial", [run("sequential", 1, 2), run("coroutine", 10, 20)],
     [run("sequential", 1, 2), run("coroutine", 10, 8)]),
    ("threads-windows",
     [run("sequential", 1, 2, os="Windows"), run("threads", 10, 15, os="Windows")],
     [run("sequential", 1, 2, os="Windows"), run("threads", 10, 30, os="Windows")]),
    ("threads-streams",
     [run("threads", 10, 10), run("threads", 10, 10.1, options={"stream": "own"})],
     [run("threads", 10, 10), run("threads", 10, 5, options={"stream": "own"})]),
    ("threads-gil",
     [contention(1, 2, 0.1), contention(10, 20, 0.7)],
     [contention(1, 2, 0.1), contention(10, 20, 0.1)]),
    ("threads-wsl2",
     both(("threads", 10), (2.8, 23), (2, 85)),
     both(("threads", 10), (2.8, 23), (2, 18))),
    ("threads-utilisation",
     [utilised("batch", 80), utilised("threads", 25)],
     [utilised("batch", 80), utilised("threads", 70)]),
    ("processes-beat-threads", [run("processes", 3, 5), run("threads", 3, 7)],
     [run("processes", 3, 7), run("threads", 3, 5)]),
    ("processes-below-batch", [run("processes", 3, 5), run("batch", 3, 2)],
     [run("processes", 3, 5), run("batch", 3, 5)]),
    ("processes-memory",
     [run("processes", n, 3, **used(u)) for n, u in ((1, 1.8), (2, 2.4), (3, 3.0))],
     [run("processes", n, 3, **used(u)) for n, u in ((1, 1.0), (2, 1.1), (3, 1.2))]),
    ("wsl2-single-faster",
     both(("batch", 10), (2.8, 3.5), (1.9, 3.5)),
     both(("batch", 10), (1.9, 3.5), (2.8, 3.5))),
    ("vram-same-inside",
     [run("processes", 1, 3, os="WSL2", **used(1.0)),
      run("processes", 1, 3, os="Windows", **used(1.8))],
     [run("processes", 1, 3, os="WSL2", **used(1.0)),
      run("processes", 1, 3, os="Windows", **used(1.8, inside=0.9))]),
    ("kv-share", [run("batch", 1, 2, **held(0.58)), run("batch", 4, 2, **held(0.65))],
     [run("batch", 1, 2, **held(0.47)), run("batch", 32, 2, **held(2))]),
    ("available-vram", [run("batch", 64, 9), run("batch", 100, 9, status="oom")],
     [run("batch", 4, 9), run("batch", 5, 9, status="oom")]),
    ("batching-preferred",
     [arriving("dynamic", 3), arriving("sequential", 1), arriving("threads", 1),
      arriving("processes", 2)],
     [arriving("dynamic", 3), arriving("sequential", 1), arriving("threads", 1),
      arriving("processes", 5)]),
]  # fmt: skip


def test_every_claim_has_a_case():
    ids = [c.id for c in findings.claims()]
    assert len(ids) == 17 and set(ids) == {case[0] for case in CASES}


@pytest.mark.parametrize(("id", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_verdicts(id, good, bad):
    yes, no, nothing = verdict(id, *good), verdict(id, *bad), verdict(id)
    assert yes.verdict == HOLDS, str(yes)
    assert no.verdict == FAILS, str(no)
    assert nothing.verdict == NOT_TESTABLE
    assert yes.figures and no.figures
    assert yes.here.startswith("as claimed"), "what holds at its own level is seen here too"


def test_a_finding_is_added_as_one_row():
    row = """
    id: two-for-one
    claim: Two requests take little more time than one.
    figure: ours
    level: 2
    device: cpu
    needs: notebook 03 with batches 1 and 2
    checks:
    - {check: ratio, metric: duration_s, of: {strategy: batch}, to: {strategy: batch, level: 1},
       most: 1.2, says: "batch {n} takes {x} times as long as one"}
    """
    claim = findings.Claim(**yaml.safe_load(row))
    for seconds, word in ((1.05, HOLDS), (2.0, FAILS)):
        rows = [r for n, s in ((1, 1.0), (2, seconds)) for r in run("batch", n, s, gpu=None)]
        (found,) = findings.judge_all(rows, [claim])
        assert found.verdict == word and "batch 2 takes" in found.figures


BYTES = ["batch-reserved", "processes-memory", "vram-same-inside", "kv-share", "available-vram"]
TIMED = [c for c in CASES if c[0] not in BYTES]  # memory repeats to the byte: one run is enough


@pytest.mark.parametrize(("id", "good"), [c[:2] for c in TIMED], ids=[c[0] for c in TIMED])
def test_two_repeats_cannot_tell_and_say_which_way_they_point(id, good):
    few = verdict(id, *(group[:2] for group in good))
    assert few.verdict == CANNOT_TELL and few.points_to == HOLDS
    assert "2 repeats" in few.figures


@pytest.mark.parametrize(("id", "good"), [c[:2] for c in CASES], ids=[c[0] for c in CASES])
def test_impossible_runs_are_left_out(id, good):
    false = {"weights_bytes": WEIGHTS, "plausible": False}
    fast = [[replace(r, prediction=false) for r in group] for group in good]
    assert verdict(id, *fast).verdict == NOT_TESTABLE


def in_a_row(level=10, **more):
    return [run("sequential", 1, 2, **more), run("threads", level, 1.5 * level, **more)]


BOTH = (("sequential", 1), ("threads", 10))


def platforms(gpu):
    return [
        run(strategy, level, seconds, os=os, gpu=gpu)
        for os, times in (("Windows", (2.8, 23)), ("WSL2", (2, 85)))
        for (strategy, level), seconds in zip(BOTH, times, strict=True)
    ]


def gil(**more):
    return [contention(1, 2, 0.1, **more), contention(10, 20, 0.7, **more)]


def steps(*gib, **more):
    return [run("processes", n, 3, **used(x), **more) for n, x in enumerate(gib, 1)]


def test_watched_runs_say_how_busy_the_lock_was_and_nothing_of_speed():
    found = verdict("threads-gil", *gil(kind="watched"))
    assert found.verdict == verdict("threads-gil", *gil()).verdict
    timed = [run("sequential", 1, 2, os="Windows"), run("threads", 10, 15, os="Windows")]
    slow = run("threads", 10, 90, os="Windows", kind="watched")
    assert (
        verdict("threads-windows", *timed, slow).figures
        == verdict("threads-windows", *timed).figures
    )


CPU = {"gpu": None}


def on_cpu_steps(*gib):
    used = [{"memory": {"uss": x * GIB}} for x in gib]
    return [run("processes", n, 3, **CPU, **x) for n, x in enumerate(used, 1)]


# What was once judged decisively, though it is not the claim: (claim, records).
PROBES = {
    "threads on Linux": ("threads-windows", in_a_row(os="Linux")),
    "threads on WSL2": ("threads-windows", in_a_row(os="WSL2")),
    "two threads": ("threads-windows", in_a_row(2, os="Windows")),
    "the GIL on a processor": ("threads-gil", gil(**CPU)),
    "processes and threads on a processor": (
        "processes-beat-threads", [run("processes", 3, 5, **CPU), run("threads", 3, 7, **CPU)]),
    "processes and batch on a processor": (
        "processes-below-batch", [run("processes", 3, 5, **CPU), run("batch", 3, 2, **CPU)]),
    "platforms without a card": ("threads-wsl2", platforms(None)),
    "two tasks": ("coroutine-serial", [run("sequential", 1, 2), run("coroutine", 2, 4)]),
    "eight tokens": (
        "batch-time", [run("batch", n, 2, os="Windows", tokens=8) for n in (1, 10)]),
    "batch on another page": ("batch-time", [run("batch", n, 2, os="WSL2") for n in (1, 10)]),
    "steps on a processor": ("processes-memory", on_cpu_steps(1.8, 2.4, 3.0)),
    "one rival": ("batching-preferred", [arriving("dynamic", 3), arriving("sequential", 1)]),
    "reserved alone": (
        "batch-reserved",
        [run("batch", n, 2, memory={"reserved": n * GIB}) for n in (1, 10)]),
}  # fmt: skip


@pytest.mark.parametrize("probe", PROBES)
def test_what_is_not_the_claim_is_not_testable_and_shown_apart(probe):
    id, records = PROBES[probe]
    found = verdict(id, *records)
    assert found.verdict == NOT_TESTABLE and found.figures.startswith("needs ")
    if probe not in ("one rival", "reserved alone"):
        assert not found.here.startswith("nothing"), "the mechanism is shown, with its level"
        assert "level" in found.here


def test_a_fifth_of_the_utilisation_that_is_claimed_does_not_hold():
    assert verdict(
        "threads-utilisation", utilised("batch", 20), utilised("threads", 5)
    ).verdict == (FAILS)


def test_our_own_runs_do_not_show_what_the_first_process_takes():
    """Its context and weights are on the card before the window opens."""
    groups = [run("processes", n, 3, **used(u, idle=0)) for n, u in ((1, 1.8), (2, 2.4), (3, 3.0))]
    found = verdict("processes-memory", *groups)
    assert found.verdict == CANNOT_TELL and "what the first takes alone" in found.figures


def test_threads_that_ran_another_loop_are_not_compared_with_the_compiled_one():
    fallback = {"asked": {"loop": "compiled"}, "notes": {"loop": "cached", "fallback": "a thread"}}
    threads = run("threads", 3, 7, **fallback)
    processes = {"asked": {"loop": "compiled"}, "notes": {"loop": "compiled"}}
    found = verdict("processes-beat-threads", run("processes", 3, 5, **processes), threads)
    assert found.verdict == findings.NOT_TESTABLE
    alike = {"asked": {"loop": "cached"}, "notes": {"loop": "cached"}}
    assert (
        verdict("processes-beat-threads", run("processes", 3, 5, **alike), threads).verdict == HOLDS
    )


def test_unequal_steps_say_nothing_of_one_process():
    found = verdict("processes-memory", *steps(1.8, 2.4, 4.2))
    assert found.verdict == CANNOT_TELL and "0.60, 1.80" in found.figures


def test_reserved_memory_that_grows_while_allocated_grows_too_is_not_the_claim():
    groups = run("batch", 1, 2, **held(0.578)), run("batch", 10, 3, **held(1.051, allocated=0.9))
    assert verdict("batch-reserved", *groups).verdict == FAILS


@pytest.mark.parametrize(("os", "gib"), [("Linux", "4.0"), ("Windows", "3.5"), ("WSL2", "3.5")])
def test_available_memory_is_less_where_the_allocator_is_capped(os, gib):
    rows = run("batch", 64, 9, os=os), run("batch", 100, 9, status="oom", os=os)
    assert f"in {gib} GiB" in verdict("available-vram", *rows).figures


def test_one_holds_does_not_outvote_a_cannot_tell():
    clear = [run("batch", 1, 2, model="a"), run("batch", 10, 2.5, model="a")]
    wide = (0.4, 0.8, 1.0, 1.2, 2.4)
    unclear = [run("batch", n, 2 * n**0.4, model="b", noise=wide) for n in (1, 10)]
    found = verdict("batch-throughput", *clear, *unclear)
    assert verdict("batch-throughput", *clear).verdict == HOLDS
    assert found.verdict == CANNOT_TELL and "Elsewhere holds" in found.figures


@pytest.mark.parametrize("count", [3, 5])
def test_what_lies_around_a_limit_cannot_be_told(count):
    wide = (0.6, 0.8, 1.0, 1.2, 1.4)[:count]
    groups = [run("batch", n, s, noise=wide, os="Windows") for n, s in ((1, 2), (10, 2.9))]
    found = verdict("batch-time", *groups)
    assert found.verdict == CANNOT_TELL and found.points_to == HOLDS
    assert ("no interval" in found.figures) == (count == 3)


def test_streams_that_scatter_are_not_called_alike():
    wide = (0.6, 0.8, 1.0, 1.2, 1.4)
    own = run("threads", 10, 10, noise=wide, options={"stream": "own"})
    found = verdict("threads-streams", run("threads", 10, 10, noise=wide), own)
    assert found.verdict == CANNOT_TELL


def test_a_counterexample_refutes_and_the_others_are_named():
    groups = [run("batch", 1, 2, os="Windows", model=m) for m in "ab"]
    groups += [run("batch", 10, s, os="Windows", model=m) for m, s in (("a", 2.5), ("b", 4))]
    found = verdict("batch-time", *groups)
    assert found.verdict == FAILS and "takes 2 [" in found.figures
    assert "Elsewhere holds" in found.figures and "a fp32" in found.figures


def test_ten_requests_with_few_threads_are_no_test_of_ten_threads():
    few = run("threads", 10, 15, options={"workers": 2}, os="Windows")
    alone = run("sequential", 1, 2, os="Windows")
    assert verdict("threads-windows", alone, few).verdict == NOT_TESTABLE


def test_device_levels_must_differ():
    alike = [run("processes", 1, 3, os=o, **used(1.8)) for o in ("WSL2", "Windows")]
    assert verdict("vram-same-inside", *alike).verdict == FAILS


@pytest.mark.parametrize(
    ("slow", "usual"),
    [({"intra_op": 1}, {"intra_op": 8}), ({"stream": "own"}, {"stream": "default"})],
)
def test_of_several_variants_the_one_nearest_to_the_defaults_is_judged(slow, usual):
    rows = [run("threads", 10, s, options=o, os="Windows") for s, o in ((90, slow), (10, usual))]
    assert verdict("threads-windows", run("sequential", 1, 2, os="Windows"), *rows).verdict == HOLDS


def test_an_arriving_load_says_nothing_of_durations():
    asked = {"arrivals": {"kind": "poisson", "rate_per_s": 3.0}}
    rows = in_a_row(os="Windows", asked=asked)
    assert verdict("threads-windows", *rows).verdict == NOT_TESTABLE


def test_models_are_never_mixed():
    groups = [run("batch", n, 2, model=m, os="Windows") for n, m in ((1, "gpt2"), (10, "yi"))]
    found = verdict("batch-time", *groups)
    assert found.verdict == NOT_TESTABLE and found.here.startswith("nothing")


def test_to_thread_is_not_the_published_coroutine():
    freed = run("coroutine", 10, 10, options={"variant": "to_thread"})
    found = verdict("coroutine-serial", run("sequential", 1, 2), freed, run("coroutine", 10, 20))
    assert found.verdict == HOLDS


def test_a_foreign_engine_is_no_strategy():
    rows = [run("peer", n, 2, os="Windows") for n in (1, 10)]
    assert findings.judge_all(r for group in rows for r in group)[0].verdict == NOT_TESTABLE


def test_a_run_without_environment_is_read():
    rows = [replace(r, environment={}) for r in run("batch", 1, 2) + run("batch", 10, 2)]
    assert "unknown" in verdict("batch-time", rows).here


# What the publication's own rows support. Its speeds are single runs: never more than a direction.
PUBLISHED = {
    "batch-time": (CANNOT_TELL, HOLDS, "1.28"),  # on its own page, Windows; WSL2 has 1.89
    "batch-throughput": (CANNOT_TELL, HOLDS, "7.84"),
    "batch-reserved": (HOLDS, HOLDS, "1.82"),
    "coroutine-serial": (CANNOT_TELL, HOLDS, "1.08"),
    "threads-windows": (CANNOT_TELL, HOLDS, "0.835"),
    "threads-streams": (NOT_TESTABLE, None, "GPU"),
    "threads-gil": (NOT_TESTABLE, None, "notebook 05"),
    "threads-wsl2": (CANNOT_TELL, HOLDS, "3.6"),
    "threads-utilisation": (NOT_TESTABLE, None, "notebooks 03 and 05"),
    "processes-beat-threads": (CANNOT_TELL, HOLDS, "0.777"),
    "processes-below-batch": (CANNOT_TELL, HOLDS, "0.568"),
    "processes-memory": (FAILS, FAILS, "the first takes 0.70"),  # WSL2: no dearer than the rest
    "wsl2-single-faster": (CANNOT_TELL, HOLDS, "0.686 [0.675, 0.72]"),
    "vram-same-inside": (HOLDS, HOLDS, "0.556"),
    "kv-share": (NOT_TESTABLE, None, "notebook 03 or 07"),  # the published loop keeps no cache
    "available-vram": (NOT_TESTABLE, None, "notebook 07"),
    "batching-preferred": (NOT_TESTABLE, None, "notebook 09"),
}


@pytest.mark.parametrize("id", PUBLISHED)
def test_published_rows(id):
    found = next(v for v in findings.published_verdicts() if v.id == id)
    word, points_to, figure = PUBLISHED[id]
    assert (found.verdict, found.points_to) == (word, points_to) and figure in found.figures


def test_wsl2_batch_rows_do_not_support_about_25_percent():
    records = findings.published_records()
    rows = {os: [r for r in records if r.environment["os"] == os] for os in ("Windows", "WSL2")}
    found = verdict("batch-time", rows["Windows"])
    assert found.figures.startswith("batch 10 takes 1.28 times") and found.points_to == HOLDS
    found = verdict("batch-time", rows["WSL2"])
    assert found.verdict == NOT_TESTABLE and "1.89" in found.here


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seconds", "second", "seconds"),
        ("2.665", "fast", "fast"),
        ("2.665", "0", "seconds must be from"),
        ("GPT2", "GPT5", "the models are"),
        ("RTX A2000 Laptop", "", "empty cell"),
    ],
)
def test_a_damaged_published_table_is_one_sentence(tmp_path, monkeypatch, old, new, sentence):
    text = (published.REFERENCE / "measurements.csv").read_text(encoding="utf-8")
    (tmp_path / "measurements.csv").write_text(text.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr(published, "REFERENCE", tmp_path)
    with pytest.raises(ValueError, match=rf"measurements\.csv.*{sentence}"):
        published.measurements()


def test_impossible_published_times_are_left_out():
    yi = [r for r in findings.published_records() if r.condition["model"] == "yi-6b-chat"]
    found = verdict("batch-throughput", yi)
    assert found.verdict == NOT_TESTABLE


def test_scorecard_has_no_empty_cell():
    for records in ([], findings.published_records()):
        card = findings.scorecard(records)
        assert len(card) == 17 and (card.map(len) > 0).all().all()
        assert list(card) == ["claim", "at", "verdict", "figures", "here", "published rows"]


def test_a_record_is_printed_as_the_publication_printed_its_runs():
    gib = 2**30
    run = Record(
        "03-batch",
        {"strategy": "batch", "level": 10, "new_tokens": 256},
        0,
        environment={"gpus": [{"memory_total_bytes": 4 * gib}]},
        metrics={"duration_s": 3.549},
        memory={"reserved": {"last": 1.051 * gib}, "allocated": {"last": 0.484 * gib}},
    )
    assert published.console_line(run) == (
        "Generated 10 x 256 tokens and took 3.549 s; GPU VRAM: reserved 1.051 GB, allocated"
        " 0.484 GB, free 0.567 GB, total 4.000 GB ---> batch"
    )
    shared = replace(run, environment={"gpus": [{"memory_total_bytes": None}]})
    assert "free 0.567 GB, total unknown ---> batch" in published.console_line(shared)
    on_cpu = replace(run, memory={"reserved": {"status": "unavailable"}})
    assert "GPU VRAM: none, it ran on the processor ---> batch" in published.console_line(on_cpu)
