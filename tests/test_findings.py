"""Each finding against synthetic records for every verdict, and against the published rows."""

import pytest

from llmperf import findings
from llmperf.findings import CANNOT_TELL, FAILS, HOLDS, NOT_TESTABLE
from llmperf.findings.evidence import judge, ratio

GIB = 2**30
NOISE = (0.98, 0.99, 1.0, 1.01, 1.02)  # five repeats: an interval is possible


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
        "new_tokens": 256,
        **more.pop("asked", {}),
    }
    memory = {
        k: v if isinstance(v, dict) else {"max": v} for k, v in more.pop("memory", {}).items()
    }
    metrics = more.pop("metrics", {})
    notes = more.pop("notes", {})
    return [
        {
            "experiment": "x",
            "condition": condition,
            "repeat": i,
            "kind": "measure",
            "status": "ok",
            "environment": env(os, gpu),
            "metrics": {
                "duration_s": seconds * f,
                "output_tokens_per_s": level * 256 / (seconds * f),
                **{k: v * f for k, v in metrics.items()},
            },
            "memory": {k: {"status": "ok", "unit": "bytes", **v} for k, v in memory.items()},
            "trace": {"notes": notes},
            **more,
        }
        for i, f in enumerate(noise)
    ]


def verdict(id, *groups):
    records = [r for group in groups for r in group]
    return next(v for v in findings.judge_all(records) if v.id == id)


def held(gib, **other):
    return {"memory": {"reserved": gib * GIB, **other}}


def used(device, idle=0.3, inside=0.58):
    memory = {"device_used": {"first": idle * GIB, "max": device * GIB}, "reserved": inside * GIB}
    return {"memory": memory}


def both(many, windows, wsl2):
    """One request, and `many` = (strategy, level), in these seconds on the two platforms."""
    return [
        run(strategy, level, seconds, os=os)
        for os, times in (("Windows", windows), ("WSL2", wsl2))
        for (strategy, level), seconds in zip((("sequential", 1), many), times, strict=True)
    ]


def blocked(level, seconds, share, **more):
    notes = {"event_loop": {"longest_block_s": share * seconds / level}}
    return run("coroutine", level, seconds, notes=notes, **more)


def contention(level, seconds, share, **more):
    return run("threads", level, seconds, notes={"gil": {"contention": share}}, **more)


def arriving(strategy, goodput, **more):
    asked = {"arrivals": {"kind": "poisson", "rate_per_s": 3.0}}
    return run(strategy, 8, 10, metrics={"goodput_per_s": goodput}, asked=asked, **more)


def oom(level):
    return [r | {"status": "oom", "metrics": {}} for r in run("batch", level, 1)[:1]]


CASES = [
    # finding, records under which it holds, records under which it does not
    ("batch-time", [run("batch", 1, 2), run("batch", 10, 2.5)],
     [run("batch", 1, 2), run("batch", 10, 4)]),
    ("batch-throughput", [run("batch", 1, 2), run("batch", 10, 2.5)],
     [run("batch", 1, 2), run("batch", 10, 8)]),
    ("batch-reserved", [run("batch", 1, 2, **held(0.578)), run("batch", 10, 3, **held(0.95))],
     [run("batch", 1, 2, **held(0.578)), run("batch", 10, 3, **held(3.5))]),
    ("coroutine-serial", [run("sequential", 1, 2), blocked(10, 20, 10)],
     [run("sequential", 1, 2), blocked(10, 8, 10)]),
    ("threads-windows", [run("sequential", 1, 2), run("threads", 10, 15)],
     [run("sequential", 1, 2), run("threads", 10, 30)]),
    ("threads-streams",
     [run("threads", 4, 10), run("threads", 4, 10.1, options={"stream": "own"})],
     [run("threads", 4, 10), run("threads", 4, 5, options={"stream": "own"})]),
    ("threads-gil",
     [contention(1, 2, 0.1), contention(4, 8, 0.7), run("threads", 1, 1, loop="compiled"),
      run("threads", 4, 2, loop="compiled")],
     [contention(1, 2, 0.1), contention(4, 8, 0.1), run("threads", 1, 1, loop="compiled"),
      run("threads", 4, 4, loop="compiled")]),
    ("threads-wsl2",
     both(("threads", 10), (2.8, 23), (2, 85)),
     both(("threads", 10), (2.8, 23), (2, 18))),
    ("threads-utilisation",
     [run("batch", 10, 3, memory={"utilization": {"mean": 75}}),
      run("threads", 10, 30, memory={"utilization": {"mean": 25}})],
     [run("batch", 10, 3, memory={"utilization": {"mean": 75}}),
      run("threads", 10, 30, memory={"utilization": {"mean": 70}})]),
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
    ("available-vram", [run("batch", 64, 9), run("batch", 60, 9), oom(100)],
     [run("batch", 4, 9), oom(5)]),
    ("batching-preferred",
     [arriving("dynamic", 3), arriving("sequential", 1), arriving("threads", 1),
      arriving("processes", 2)],
     [arriving("dynamic", 3), arriving("sequential", 1), arriving("threads", 1),
      arriving("processes", 5)]),
]  # fmt: skip


def test_every_finding_has_a_check_and_a_case():
    ids = [f.id for f in findings.findings()]
    assert len(ids) == 17 and set(ids) == set(findings.CHECKS) == {case[0] for case in CASES}


@pytest.mark.parametrize(("id", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_verdicts(id, good, bad):
    yes, no, nothing = verdict(id, *good), verdict(id, *bad), verdict(id)
    assert yes.verdict == HOLDS, str(yes)
    assert no.verdict == FAILS, str(no)
    assert nothing.verdict == NOT_TESTABLE and nothing.needed
    assert yes.figures and no.figures and yes.settings


BYTES = ["batch-reserved", "processes-memory", "vram-same-inside", "kv-share", "available-vram"]
TIMED = [c for c in CASES if c[0] not in BYTES]  # memory repeats to the byte: one run is enough


@pytest.mark.parametrize(("id", "good"), [c[:2] for c in TIMED], ids=[c[0] for c in TIMED])
def test_two_repeats_cannot_tell_and_say_which_way_they_point(id, good):
    few = verdict(id, *(group[:2] for group in good))
    assert few.verdict == CANNOT_TELL and few.points_to == HOLDS
    assert "2 repeats" in few.figures and "5 repeats" in few.needed


@pytest.mark.parametrize(("id", "good"), [c[:2] for c in CASES], ids=[c[0] for c in CASES])
def test_unstable_and_impossible_runs_are_said(id, good):
    dirty = [[r | {"warnings": ["unstable: others use 90 % of the CPU"]} for r in g] for g in good]
    assert "not quiet" in " ".join(verdict(id, *dirty).warnings)
    fast = [[r | {"prediction": {"plausible": False}} for r in group] for group in good]
    found = verdict(id, *fast)
    assert found.verdict == NOT_TESTABLE and "faster than their machine" in found.figures


def test_some_impossible_runs_are_counted():
    good = [run("batch", 1, 2), run("batch", 10, 2.5)]
    false = [r | {"prediction": {"plausible": False}} for r in run("batch", 10, 0.01)]
    found = verdict("batch-time", *good, false)
    assert found.verdict == HOLDS and "5 runs left out" in found.warnings[0]


def test_what_is_between_the_limits_cannot_be_told():
    wide = (0.6, 0.8, 1.0, 1.2, 1.4)
    found = verdict("batch-time", run("batch", 1, 2, noise=wide), run("batch", 10, 2.9, noise=wide))
    assert found.verdict == CANNOT_TELL and found.low < 1.5 < found.high


def test_streams_that_scatter_are_not_called_alike():
    wide = (0.6, 0.8, 1.0, 1.2, 1.4)
    own = run("threads", 4, 10, noise=wide, options={"stream": "own"})
    assert verdict("threads-streams", run("threads", 4, 10, noise=wide), own).verdict == CANNOT_TELL


def test_three_repeats_are_judged_by_their_range():
    figure = ratio([2.0, 2.1, 2.2], [1.0, 1.0, 1.1])
    assert (figure.low, figure.high) == (2.0 / 1.1, 2.2) and "no interval" in figure.basis
    assert judge(figure, least=1.5) == (HOLDS, HOLDS)
    assert judge(figure, least=2.0)[0] == CANNOT_TELL
    assert judge(figure, most=1.5) == (FAILS, FAILS)


def test_a_counterexample_on_one_machine_refutes_and_the_others_are_named():
    groups = [run("batch", 1, 2, os=o) for o in ("Windows", "WSL2")]
    groups += [run("batch", 10, 2.5, os="Windows"), run("batch", 10, 4, os="WSL2")]
    found = verdict("batch-time", *groups)
    assert found.verdict == FAILS and found.value == pytest.approx(2)
    assert "Elsewhere holds" in found.figures and "Windows" in found.figures


def test_one_request_with_few_threads_is_no_test_of_many():
    few = run("threads", 10, 15, options={"workers": 2})
    assert verdict("threads-windows", run("sequential", 1, 2), few).verdict == NOT_TESTABLE


def test_device_levels_must_differ():
    alike = [run("processes", 1, 3, os=o, **used(1.8)) for o in ("WSL2", "Windows")]
    assert verdict("vram-same-inside", *alike).verdict == FAILS


def test_of_several_variants_the_one_nearest_to_the_defaults_is_judged():
    lean = [run("threads", 10, 90, options={"intra_op": 1}), run("sequential", 1, 2)]
    full = run("threads", 10, 10, options={"intra_op": 8})
    assert verdict("threads-windows", *lean, full).verdict == HOLDS
    own = run("threads", 10, 90, options={"stream": "own"})
    default = run("threads", 10, 10, options={"stream": "default"})
    assert verdict("threads-windows", lean[1], own, default).verdict == HOLDS


def test_an_arriving_load_says_nothing_of_durations():
    asked = {"arrivals": {"kind": "poisson", "rate_per_s": 3.0}}
    rows = [run(s, n, 2, asked=asked) for s, n in (("sequential", 1), ("threads", 10))]
    assert verdict("threads-windows", *rows).verdict == NOT_TESTABLE
    few = [arriving("dynamic", 3), arriving("threads", 1, options={"workers": 2})]
    assert verdict("batching-preferred", *few).verdict == HOLDS


def test_models_are_never_mixed():
    groups = run("batch", 1, 2, model="gpt2"), run("batch", 10, 2.5, model="yi-6b-chat")
    assert verdict("batch-time", *groups).verdict == NOT_TESTABLE


def test_to_thread_is_not_the_published_coroutine():
    freed = run("coroutine", 10, 10, options={"variant": "to_thread"})
    assert verdict("coroutine-serial", run("sequential", 1, 2), freed).verdict == NOT_TESTABLE


def test_a_run_without_environment_is_read():
    rows = [r | {"environment": {}} for r in run("batch", 1, 2) + run("batch", 10, 2.5)]
    assert "unknown" in verdict("batch-time", rows).settings[0]


# What the publication's own rows support. Its speeds are single runs: never more than a direction.
PUBLISHED = {
    "batch-time": (CANNOT_TELL, FAILS, "1.89"),  # WSL2; on Windows 1.28
    "batch-throughput": (CANNOT_TELL, HOLDS, "7.84"),
    "batch-reserved": (HOLDS, HOLDS, "0.473 GiB"),
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
    "vram-same-inside": (HOLDS, HOLDS, "0.56"),
    "kv-share": (FAILS, FAILS, "127%"),
    "available-vram": (NOT_TESTABLE, None, "notebook 07"),
    "batching-preferred": (NOT_TESTABLE, None, "notebook 09"),
}


@pytest.mark.parametrize("id", PUBLISHED)
def test_published_rows(id):
    found = next(v for v in findings.published_verdicts() if v.id == id)
    word, points_to, figure = PUBLISHED[id]
    assert (found.verdict, found.points_to) == (word, points_to) and figure in found.figures


def test_wsl2_batch_rows_do_not_support_about_25_percent():
    wsl2 = [r for r in findings.published_records() if r["environment"]["os"] == "WSL2"]
    found = next(v for v in findings.judge_all(wsl2) if v.id == "batch-time")
    assert found.value == pytest.approx(3.607 / 1.913) and found.points_to == FAILS
    windows = [r for r in findings.published_records() if r["environment"]["os"] == "Windows"]
    found = next(v for v in findings.judge_all(windows) if v.id == "batch-time")
    assert found.value == pytest.approx(3.549 / 2.782) and found.points_to == HOLDS


def test_impossible_published_times_are_left_out():
    yi = [r for r in findings.published_records() if r["condition"]["model"] == "yi-6b-chat"]
    found = next(v for v in findings.judge_all(yi) if v.id == "batch-time")
    assert found.verdict == NOT_TESTABLE and "faster than their machine" in found.figures


def test_scorecard_has_no_empty_cell():
    for records in ([], findings.published_records()):
        card = findings.scorecard(records)
        assert len(card) == 17 and (card.map(len) > 0).all().all()
