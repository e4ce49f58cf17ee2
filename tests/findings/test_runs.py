"""Loading, comparing and sharing runs: whole ones, torn ones, and those of other versions."""

import dataclasses
import gzip
from pathlib import Path

import pandas as pd
import pytest

from llmperf import findings
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.findings import sharing
from llmperf.findings.sharing import without_free_text
from llmperf.measure import Record, Store, metrics
from llmperf.study.cli import main

ENV = {
    "os": "Linux", "os_version": "Debian GNU/Linux 12", "kernel": "5.15.153.1",
    "cpu_model": "AMD EPYC", "cores_logical": 2, "cores_allowed": 2, "cores_quota": None,
    "gpus": [], "packages": {"torch": "2.13.0"}, "python": "3.11.7", "on_battery": None,
    "reasons": {},
}  # fmt: skip
CARD = {"name": "RTX 4090", "driver": "560.1", "driver_model": None, "memory_total_bytes": 2**34,
        "utilization_percent": 0, "processes": [{"pid": 5, "name": "secret.exe"}]}  # fmt: skip
NOISE = (0.98, 0.99, 1.0, 1.01, 1.02)


def record(level, speed, repeat, env=ENV, **more):
    times = tuple(0.1 + i / (30 * speed) for i in range(8))
    requests = [RequestTrace(i, 4, 0.0, 0.0, 0.01, times, tuple(range(8))) for i in range(level)]
    trace = Trace(tuple(requests), times[-1] + 0.001, {"gil": {"contention": 0.25}})
    condition = {"strategy": "batch", "level": level, "loop": "cached", "options": {},
                 "model": "gpt2", "dtype": "fp32", "device": "cuda" if env.get("gpus") else "cpu",
                 "prompt_tokens": 4, "new_tokens": 8}  # fmt: skip
    return dataclasses.replace(
        Record(
            experiment="03-batch",
            condition=condition | more.pop("condition", {}),
            repeat=repeat,
            environment=env,
            trace=trace.to_dict(),
            token_digest=trace.digest(),
            metrics=metrics.summarize(trace),
            memory={"rss": {"status": "ok", "unit": "bytes", "max": 5}},
            prediction={"plausible": True, "why": "it is"},
        ),
        **more,
    )


def write(folder, speed=1.0, env=ENV, levels=(1, 2, 4), **more):
    store = Store(folder / "records.jsonl")
    for level in levels:
        for repeat, noise in enumerate(NOISE):
            store.append(record(level, speed * noise, repeat, env, **more))
    return folder


def only(path):
    (run,) = findings.load_runs([path])
    return run


def test_loading_skips_token_times_and_keeps_the_rest(tmp_path):
    run = only(write(tmp_path / "a"))
    whole = Store(tmp_path / "a" / "records.jsonl").read()
    for ours, theirs in zip(run.records, whole, strict=True):
        trace = {**theirs.trace, "requests": []}
        assert ours == dataclasses.replace(theirs, trace=trace)
    assert run.name.startswith("linux-2core")
    assert not run.notes and len(run.measured) == 15


def test_files_folders_packs_and_folders_of_runs(tmp_path):
    write(tmp_path / "many" / "a")
    write(tmp_path / "many" / "b")
    (tmp_path / "many" / "empty").mkdir()
    assert [r.name for r in findings.load_runs([tmp_path / "many"])][1].endswith("#2")
    pack = findings.share(tmp_path / "many" / "a", tmp_path / "x.jsonl.gz")
    assert len(only(pack).records) == len(only(tmp_path / "many" / "a").records)
    notebooks = tmp_path / "interactive"
    for name in ("03-batch-1", "05-threads-2"):
        Store(notebooks / f"{name}.jsonl").append(record(1, 1, 0))
    assert len(only(notebooks).records) == 2


def test_shared_files_are_runs_and_empty_ones_are_left_out(tmp_path):
    """Not one run with the records of two machines; a study that was ended at once stops nobody."""
    write(tmp_path / "a")
    many = tmp_path / "many"
    many.mkdir()
    for name in ("x", "y"):
        findings.share(tmp_path / "a", many / f"{name}.jsonl.gz")
    assert [len(run.records) for run in findings.load_runs([many])] == [15, 15]
    runs = tmp_path / "runs"
    write(runs / "whole")
    (runs / "ended").mkdir()
    (runs / "ended" / "records.jsonl").touch()
    assert len(only(runs).records) == 15


@pytest.mark.parametrize(
    ("model", "shown"),
    [("gpt2", True), ("01-ai/Yi-6B-Chat", True), ("llama-3.1-70b:layers=4", True),
     ("my-private-model", False), ("models/alice", False), ("/home/alice/m", False),
     (r"C:\alice", False), ("~/m", False)],
)  # fmt: skip
def test_the_folder_of_a_model_is_not_named(tmp_path, monkeypatch, model, shown):
    (tmp_path / "models" / "alice").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sharing.public_model(model) == (model if shown else "<a local model>")


def test_the_latest_run(tmp_path, monkeypatch):
    monkeypatch.setattr("llmperf.findings.runs.RUNS", tmp_path)
    monkeypatch.setattr("llmperf.findings.runs.REFERENCE", tmp_path / "kit")
    with pytest.raises(ValueError, match="nothing was measured"):
        findings.latest(tmp_path / "records.jsonl")
    write(tmp_path / "kit" / "runs" / "slug", levels=(1,))
    assert len(findings.latest().records) == 5
    for name, level in (("03-a-1", 1), ("03-a-2", 2), ("05-b-1", 3)):
        Store(tmp_path / "interactive" / f"{name}.jsonl").append(record(level, 1, 0))
    Store(tmp_path / "interactive" / "09-c-1.jsonl")  # a notebook that is only starting
    assert [r.condition["level"] for r in findings.latest().records] == [2, 3]
    study = write(tmp_path / "study") / "records.jsonl"
    assert len(findings.latest(study).records) == 15
    traces = [findings.latest(study, traces=wanted).records[0].trace for wanted in (False, True)]
    assert [bool(trace["requests"]) for trace in traces] == [False, True]


def test_torn_pack_and_no_environment(tmp_path):
    whole = findings.share(write(tmp_path / "a", levels=range(1, 40)), tmp_path / "whole.jsonl.gz")
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(whole.read_bytes()[:-2000])
    run = only(torn)
    assert 0 < len(run.records) < 195 and "read up to there" in run.notes[0]
    bare = only(write(tmp_path / "b", env={}))
    assert "unknown" in bare.name
    assert str(findings.compare_runs([bare, run]))


@pytest.mark.parametrize("what", ["missing", "empty", "nonsense"])
def test_nothing_to_read_is_one_sentence(tmp_path, what, capsys):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "nonsense":
        path = path.with_suffix(".jsonl")
        path.write_text("hello\n", encoding="utf-8")
    assert main(["compare", str(path)]) == 2
    assert capsys.readouterr().err.startswith("llmperf: ")


def test_dirty_runs_are_marked(tmp_path):
    env = ENV | {"on_battery": True}
    run = only(write(tmp_path / "a", env=env, warnings=["unstable: others use 90 % of the CPU"]))
    said = " ".join(run.notes)
    assert "warning on 15 of 15 runs" in said and "battery" in said
    false = only(write(tmp_path / "b", prediction={"plausible": False}))
    assert "faster than the machine can be" in false.notes[0] and not false.measured
    assert "note: on battery" in str(findings.compare_runs([run]))


def twins(tmp_path, factor, **more):
    return findings.load_runs([write(tmp_path / "a", 1.0), write(tmp_path / "b", factor, **more)])


@pytest.mark.parametrize(("factor", "word"), [(2, "faster"), (0.5, "slower")])
def test_a_change_of_one_machine_is_found_though_nothing_recorded_differs(tmp_path, factor, word):
    found = findings.compare_runs(twins(tmp_path, factor))
    assert found.pairs[0].verdict.startswith(f"{word} in 3 of 3") and found.differs.empty
    assert "nothing that is recorded explains it" in found.pairs[0].verdict


@pytest.mark.parametrize(
    ("faster", "of", "said"),
    [
        (2, 78, "cannot tell: faster in 2 of 78 conditions, no more than chance gives"),
        (70, 78, "faster in 70 of 78 conditions; nothing that is recorded explains it"),
        (1, 1, "faster in 1 of 1 conditions; nothing that is recorded explains it"),
    ],
)
def test_as_many_differences_as_chance_gives_are_no_finding(faster, of, said):
    verdicts = ["faster"] * faster + ["cannot tell"] * (of - faster)
    rows = pd.DataFrame({"verdict": verdicts, "low": 1.0})
    assert findings.Pair("a", "b", [], rows, 0.08, "8 conditions measured twice").verdict == said


def test_single_runs_are_not_counted_as_conditions_that_could_differ():
    rows = pd.DataFrame({"verdict": ["faster", *["cannot tell"] * 17], "low": [1.3, *[None] * 17]})
    said = findings.Pair("a", "b", ["os"], rows, 0.18, "2 conditions measured twice").verdict
    assert said == "faster in 1 of 1 conditions (17 more have too few runs for an interval)"
    none = findings.Pair("a", "b", [], rows[1:], 0.18, "2 conditions measured twice").verdict
    assert none == "cannot tell: no condition has runs enough for an interval"


def test_runs_on_a_processor_are_compared_by_the_processor_though_there_is_a_card():
    env = {"cpu_model": "AMD EPYC", "gpus": [{"name": "RTX 4090"}]}
    for device, hardware in (("cpu", "AMD EPYC"), ("cuda", "RTX 4090")):
        record = Record("e", {"strategy": "batch", "level": 1, "device": device}, 0)
        assert findings.Run("a", (record,), env).hardware == hardware


def test_launches_that_differ_as_usual_cannot_be_told_apart(tmp_path):
    found = findings.compare_runs(twins(tmp_path, 1.04))
    assert found.pairs[0].verdict.startswith("cannot tell") and "assumed" in found.pairs[0].basis
    assert found.pairs[0].rows.ratio.median() == pytest.approx(1.03, abs=0.03)


@pytest.mark.parametrize("again", [{"experiment": "04-again"}, {"kind": "twin"}])
def test_conditions_that_were_measured_twice_say_how_far_launches_differ(tmp_path, again):
    """The same condition twice, 30 % apart: a change of 20 % is no finding then."""
    pair = twins(tmp_path, 1.2)
    assert findings.compare_runs(pair).pairs[0].verdict.startswith("faster in 3 of 3")
    second = [
        dataclasses.replace(
            r,
            **again,
            metrics=r.metrics | {"output_tokens_per_s": 1.3 * r.metrics["output_tokens_per_s"]},
        )
        for r in pair[0].measured
        if r.condition["level"] == 1
    ]
    wide = dataclasses.replace(pair[0], records=(*pair[0].records, *second))
    found = findings.compare_runs([wide, pair[1]]).pairs[0]
    assert found.verdict.startswith("cannot tell") and found.basis == "1 conditions measured twice"
    assert found.margin == pytest.approx(0.3)


def windows_and_wsl2(tmp_path, factor=1.5, **more):
    windows = write(tmp_path / "w", 1.0, ENV | {"os": "Windows", "gpus": [CARD]})
    wsl2 = write(tmp_path / "l", factor, ENV | {"os": "WSL2", "gpus": [CARD]}, **more)
    return findings.load_runs([windows, wsl2])


def test_a_pair_on_one_card_gets_ratios_after_what_differs(tmp_path):
    found = findings.compare_runs(windows_and_wsl2(tmp_path))
    (pair,) = found.pairs
    assert pair.verdict == "faster in 3 of 3 conditions" and pair.differs == ["os"]
    assert all(r.low < r.ratio < r.high for r in pair.rows.itertuples())
    text = str(found)
    assert text.index("What differs") < text.index("(2)/(1)")
    (line,) = (x for x in text.splitlines() if x.startswith("    batch 4"))
    assert len(line) < 100 and line.endswith("  faster") and f"{pair.rows.ratio[2]:.2f}" in line
    assert f"{pair.rows['first'][2]:.4g} " in line and f" {pair.rows.second[2]:.4g} " in line
    assert "Different machines" not in text and "without an equal one" not in text
    slower = findings.compare_runs(windows_and_wsl2(tmp_path / "d"), "duration_s").pairs[0]
    assert slower.verdict.startswith("faster") and slower.rows.ratio[0] < 1
    same = findings.compare_runs(windows_and_wsl2(tmp_path / "s", 1.01)).pairs[0]
    assert same.verdict.startswith("cannot tell: none of 3")
    near = findings.compare_runs(windows_and_wsl2(tmp_path / "n", 1.08))
    noted = near.pairs[0].rows[near.pairs[0].rows.low > 1]
    assert len(noted) and set(noted.note) == {"inside the 10% of two launches"}


def test_a_condition_of_one_run_alone_is_shown_with_its_median(tmp_path):
    a, b = write(tmp_path / "a", levels=(1, 2)), write(tmp_path / "b", levels=(2, 4))
    found = findings.compare_runs(findings.load_runs([a, b]))
    assert list(found.alone.level) == [1, 4] and list(found.pairs[0].rows.level) == [2]
    text = str(found)
    below = text[text.index("without an equal one") :].splitlines()
    assert [x.split()[:2] for x in below if x.startswith("    ")][1:] == [
        ["batch", "1"],
        ["batch", "4"],
    ]


def test_what_may_not_be_compared(tmp_path):
    other = windows_and_wsl2(tmp_path, condition={"model": "yi-6b-chat"})
    found = findings.compare_runs(other)
    assert "no condition is the same" in found.pairs[0].verdict
    assert list(found.differs.index) == ["os"] and len(found.table.columns) == 2
    card = findings.load_runs(
        [write(tmp_path / "x", env=ENV | {"gpus": [CARD | {"name": "RTX 3060"}]})]
    )
    apart = findings.compare_runs([other[0], *card])
    assert not apart.pairs and apart.across[0].verdict.startswith("cannot tell: none of 3")
    assert "Different machines: the ratio mixes hardware, software" in str(apart)
    with pytest.raises(ValueError, match="choose one of .*ttft_ms"):
        findings.compare_runs(other, "speed")


def test_fewer_tokens_are_not_a_speed(tmp_path):
    a, b = windows_and_wsl2(tmp_path)
    cut = [dataclasses.replace(r, metrics=r.metrics | {"output_tokens": 1}) for r in b.records]
    found = findings.compare_runs([a, dataclasses.replace(b, records=tuple(cut))])
    assert found.pairs[0].rows.ratio.isna().all()
    assert "output_tokens" in found.pairs[0].rows.note[0]


def test_published_tables_stand_beside(tmp_path):
    table = findings.compare_runs([*findings.published_runs(), only(write(tmp_path))]).table
    assert (
        table.loc[("batch", 10)].notna().sum() == 2 and table.loc[("batch", 2)].notna().sum() == 3
    )
    windows = next(c for c in table if "Windows" in c)
    assert table.loc[("batch", 10), windows] == pytest.approx(2560 / 3.549)


SECRET = "a-person"


def test_a_shared_file_names_nobody(tmp_path):
    env = ENV | {"gpus": [CARD | {"uuid": "GPU-77"}], "host_gpus": "their-laptop", "novel": SECRET,
                 "reasons": {"hags": r"C:\Users\a-person\x.exe failed"}}  # fmt: skip
    more = {
        "condition": {"model": "/home/a-person/models/mine", "options": {"base_url": "http://h:1"}},
        "warnings": [f"unstable: {SECRET} at their-laptop, ~/work, 192.168.0.7, me@mail.org"],
        "reason": "HTTP 401 with api_key=abc and hf_abcdefghijkl at https://their.host/v1",
        "run_id": SECRET,
    }
    pack = findings.share(write(tmp_path / SECRET, env=env, **more), tmp_path / "x")
    text = gzip.decompress(pack.read_bytes()).decode()
    for word in (SECRET, "their", "192.168", "mail.org", "abc", "/home", "Users", "GPU-77", "h:1",
                 "secret", '"pid"'):  # fmt: skip
        assert word not in text, word
    shared = only(pack)
    assert shared.environment["os_version"] == "Debian GNU/Linux 12"
    assert shared.measured[0].condition["model"] == "<a local model>"
    assert pack.name == "x.jsonl.gz" and len(shared.measured) == 15


def test_a_shared_file_compares_as_the_run_itself(tmp_path):
    a, b = windows_and_wsl2(tmp_path)
    shared = only(findings.share(tmp_path / "l", tmp_path / "x"))
    ours, theirs = (findings.compare_runs([a, x]).pairs[0] for x in (b, shared))
    assert ours.rows.equals(theirs.rows) and len(ours.rows)
    ours, theirs = (findings.judge_all(x.records) for x in (b, shared))
    assert [str(v) for v in ours] == [str(v) for v in theirs]


SECRETS = (
    "AKIAIOSFODNN7EXAMPLE", "AIzaSyA1234567890abcdefghijklmno", "gsk_abcdefgh12345678",
    "nvapi-abcdefgh12345678", "sk-abcdefgh12345678", "Basic dXNlcjpwYXNzd29yZA==",
    '{"password": "hunter2"}', "api_key=hunter2", "node7.cluster.local", "db.example.com:5432",
    "fe80::1ff:fe23:4567:890a%eth0", "2001:db8:85a3:0:0:8a2e:370:7334", "10.0.0.12:80",
    r"C:\\Users\\Jane Doe\\models", "/home/Jane Doe/models",
)  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_leaves_neither_in_a_text_nor_in_a_key(secret):
    value = {f"see {secret}": 1, "why": secret, "list": [{"x": secret}, 2], "unit": "bytes"}
    assert without_free_text(value) == {"why": None, "list": [{"x": None}, 2], "unit": "bytes"}


def test_no_half_file_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(run):
        yield "{}\n"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharing, "_lines", full)
    with pytest.raises(ValueError, match="cannot write .*No space left"):
        findings.share(findings.shipped_runs()[0], tmp_path / "run.jsonl.gz")
    assert not list(tmp_path.iterdir())


def test_only_listed_fields_are_shared(tmp_path):
    more = {"condition": {"novel": "x1"}, "memory": {"rss": {"unit": "bytes", "max": 5}}}
    env = ENV | {"novel": "x2", "gpus": [CARD | {"novel": "x3"}]}
    pack = findings.share(write(tmp_path / "a", env=env, **more), tmp_path / "p")
    text = gzip.decompress(pack.read_bytes()).decode()
    assert not any(f"x{i}" in text for i in (1, 2, 3)) and "RTX 4090" in text


def test_sharing_says_what_is_wrong(tmp_path):
    write(tmp_path / "m" / "a")
    write(tmp_path / "m" / "b")
    with pytest.raises(ValueError, match="holds 2 runs"):
        findings.share(tmp_path / "m", tmp_path / "x")
    findings.share(tmp_path / "m" / "a", tmp_path / "x")
    with pytest.raises(ValueError, match="is there already"):
        findings.share(tmp_path / "m" / "a", tmp_path / "x")


def test_command_line(tmp_path, capsys, monkeypatch):
    windows_and_wsl2(tmp_path)
    folders = [str(tmp_path / name) for name in "wl"]
    assert main(["compare", *folders, "--published"]) == 0
    out = capsys.readouterr().out
    assert "published" in out and "faster in 3 of 3 conditions" in out
    assert main(["share", folders[0], "--to", str(tmp_path / "p")]) == 0
    assert "p.jsonl.gz" in capsys.readouterr().out and (tmp_path / "p.jsonl.gz").exists()


def test_shipped_runs_can_be_read():
    for folder in findings.shipped_runs():
        (run,) = findings.load_runs([folder])
        assert run.measured, Path(folder).name
