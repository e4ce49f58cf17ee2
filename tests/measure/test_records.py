"""The store: whole lines, nothing lost or doubled, and files of other versions read with care."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pandas as pd
import pytest

from llmperf.measure import Record, Store, frame, records
from llmperf.strategies import STRATEGIES

CONDITION = {
    "strategy": "batch",
    "level": 4,
    "options": {"batch_size": 2},
    "prompt_tokens": [8, 16],
}
FIRST = Record("03-batch", CONDITION, 0, metrics={"duration_s": 1.5}, token_digest="größe")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run" / "records.jsonl")


def test_a_record_is_one_line_and_comes_back_whole(store):
    store.append(FIRST)
    store.append(replace(FIRST, repeat=1, status="oom", reason="out of memory", metrics={}))
    assert store.path.read_bytes().count(b"\n") == 2
    assert store.read() == Store(store.path).read()
    assert store.read()[0] == FIRST
    assert [r.status for r in store.read()] == ["ok", "oom"]


def test_a_line_is_on_the_disk_when_append_returns(store, monkeypatch):
    synced = []
    monkeypatch.setattr(records.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    store.append(FIRST)
    assert synced == [store.path.stat().st_size], "flushed to the file before the sync"


def test_a_record_that_is_there_is_not_doubled(store):
    store.append(FIRST)
    store.append(replace(FIRST, metrics={"duration_s": 9.9}))
    Store(store.path).append(FIRST)
    assert [r.metrics["duration_s"] for r in store.read()] == [1.5]
    other_condition = {"condition": {**CONDITION, "level": 5}}
    for other in ({"repeat": 1}, {"kind": "warmup"}, {"experiment": "04"}, other_condition):
        store.append(replace(FIRST, **other))
    assert len(store.read()) == 5, "what differs in any part of the key is another record"


def test_the_key_is_the_same_for_entries_in_any_order_and_after_json():
    turned = dict(reversed(CONDITION.items()))
    assert replace(FIRST, condition=turned).key == FIRST.key
    tuples = {**CONDITION, "prompt_tokens": (8, 16)}
    assert replace(FIRST, condition=tuples).key == FIRST.key
    assert replace(FIRST, condition={**CONDITION, "level": 5}).key != FIRST.key


@pytest.mark.parametrize("cut", [2, 20, "half"])
def test_a_torn_last_line_is_dropped_with_a_warning(store, cut):
    store.append(FIRST)
    whole = store.path.read_bytes()
    store.append(replace(FIRST, repeat=1))
    torn = store.path.read_bytes()
    keep = len(whole) + (len(torn) - len(whole)) // 2 if cut == "half" else len(torn) - cut
    store.path.write_bytes(torn[:keep])
    with pytest.warns(UserWarning, match="records.jsonl: a torn last line was dropped"):
        again = Store(store.path)
    assert store.path.read_bytes() == whole
    again.append(replace(FIRST, repeat=1))
    assert store.path.read_bytes() == torn, "the run that was cut off is written anew"


def test_a_file_that_is_only_a_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"experiment": "03')
    with pytest.warns(UserWarning, match="torn"):
        assert Store(path).read() == []


def test_a_whole_last_line_without_a_newline_is_kept(store):
    store.append(FIRST)
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-1])
    again = Store(store.path)
    assert store.path.read_bytes() == whole and FIRST.key in again.keys


def test_a_full_disk_leaves_the_file_as_it_was(store, monkeypatch):
    store.append(FIRST)
    before = store.path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(records.os, "fsync", full)
        with pytest.raises(records.NotWritten, match="No space left on device.*--resume"):
            store.append(replace(FIRST, repeat=1))
    assert store.path.read_bytes() == before and replace(FIRST, repeat=1).key not in store.keys
    store.append(replace(FIRST, repeat=1))
    assert len(store.read()) == 2


OTHER_WRITER = """
import sys
from llmperf.measure import Store
try:
    Store(sys.argv[1])
    print("opened")
except ValueError as error:
    print(error)
"""


def test_a_second_process_may_not_write_until_the_first_is_gone(tmp_path):
    path = tmp_path / "records.jsonl"
    hold = "import sys; from llmperf.measure import Store; s = Store(sys.argv[1]); " \
        "print('held', flush=True); sys.stdin.read()"  # fmt: skip
    first = subprocess.Popen(
        [sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    second = [sys.executable, "-c", OTHER_WRITER, path]
    try:
        assert first.stdout.readline() == "held\n"
        said = subprocess.run(second, capture_output=True, text=True, check=True).stdout
        assert "another process writes to records.jsonl: wait until it ends" in said
    finally:
        first.kill()  # a lock that outlives its process would bar the folder for ever
        first.communicate()
    assert "opened" in subprocess.run(second, capture_output=True, text=True, check=True).stdout


DAMAGED = {
    "incomplete, or not JSON": [
        b"not json",
        b'{"experiment": "03',
        b"[" * 100_000,
        b"\xff\xfe",
        b"NaN",
    ],
    "not a record": [b"[1, 2]", b"3", b'"text"', b"null"],
    "repeat: missing": [b'{"experiment": "x", "condition": {"strategy": "s", "level": 1}}'],
    "metrics: missing or of another type": ["metrics", [1]],
    "repeat: missing or of another type": ["repeat", "one"],
    "condition, memory or environment": ["condition", {"strategy": "batch", "level": "four"}],
    "memory or environment: missing": ["memory", {"rss": 5}],
    "environment: missing or of": ["environment", {"gpus": ["RTX"]}],
    "or of another type": ["condition", {"strategy": "batch", "level": 0}],
}


@pytest.mark.parametrize("said", DAMAGED)
def test_a_damaged_line_costs_only_itself(store, said):
    name, value = DAMAGED[said][:2] if isinstance(DAMAGED[said][0], str) else (None, None)
    lines = DAMAGED[said]
    if name:
        lines = [json.dumps({**asdict(FIRST), "repeat": 9, name: value}).encode()]
    store.append(FIRST)
    with store.path.open("ab") as file:
        file.write(b"\n".join([*lines, b"", b""]))
    store.append(replace(FIRST, repeat=1))
    found, left_out = records.scan(store.path)
    assert found == [FIRST, replace(FIRST, repeat=1)]
    assert len(left_out) == 1 and left_out[0].startswith("records.jsonl, line 2: ")
    assert said in left_out[0]
    with pytest.warns(UserWarning, match="line 2"):
        assert store.read() == found


def test_the_mark_that_an_editor_adds_is_not_part_of_the_first_record(store):
    store.append(FIRST)
    store.path.write_bytes(b"\xef\xbb\xbf" + store.path.read_bytes())
    assert records.scan(store.path) == ([FIRST], [])


def test_doubled_records_are_read_once_and_said(store):
    store.append(FIRST)
    store.path.write_bytes(store.path.read_bytes() * 3)
    with pytest.warns(UserWarning, match="a record that was read before .2 lines"):
        assert store.read() == [FIRST]


def test_a_line_too_long_is_left_out_unread(store, monkeypatch):
    monkeypatch.setattr(records, "MOST_LINE_BYTES", 2048)
    store.append(FIRST)
    with store.path.open("ab") as file:
        file.write(b"x" * 9000 + b"\n")
    store.append(replace(FIRST, repeat=1))
    found, left_out = records.scan(store.path)
    assert len(found) == 2 and len(left_out) == 1 and "not JSON" in left_out[0]


def test_a_file_of_other_lines_is_not_read_to_its_end(store, monkeypatch):
    monkeypatch.setattr(records, "MOST_DAMAGED", 10)
    store.path.write_bytes(b"\n" * 6 + b"x\n" * 100_000)
    found, left_out = records.scan(store.path)
    assert not found and "line 11: the file was read up to there" in left_out[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_a_pipe_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "folder.jsonl"):
        for attempt in (Store, records.scan):
            with pytest.raises(ValueError, match="is not a file"):
                attempt(tmp_path / name)


def test_a_packed_file_reads_alike_and_a_torn_one_gives_what_it_holds(store, tmp_path):
    for repeat in range(50):
        store.append(replace(FIRST, repeat=repeat, token_digest=os.urandom(64).hex()))
    pack = tmp_path / "p.jsonl.gz"
    pack.write_bytes(gzip.compress(store.path.read_bytes()))
    assert records.scan(pack) == (store.read(), [])
    pack.write_bytes(pack.read_bytes()[:-1000])
    found, left_out = records.scan(pack)
    assert 0 < len(found) < 50 and "read up to there" in left_out[0]


def test_a_newer_schema_is_read_as_far_as_it_is_known(store):
    newer = {**asdict(FIRST), "schema": records.SCHEMA + 1, "tomorrow": {"a": 1}}
    store.path.write_text(json.dumps(newer) + "\n", encoding="utf-8")
    with pytest.warns(UserWarning, match=f"schema {records.SCHEMA + 1} is newer"):
        (found,) = store.read()
    assert replace(found, schema=records.SCHEMA) == FIRST


def test_an_older_record_gets_defaults(store):
    older = {"experiment": "03", "condition": CONDITION, "repeat": 0, "prediction": None}
    store.path.write_text(json.dumps(older) + "\n", encoding="utf-8")
    assert store.read() == [Record("03", CONDITION, 0)]


def test_a_run_faster_than_the_bandwidth_known_then_is_held_against_a_higher_one(store):
    seen = {"plausible": False, "mbu": 1.2, "mfu": 0.1, "most_read_bytes_per_s": 20e9}
    store.append(replace(FIRST, repeat=0, prediction=seen))
    assert [r.possible for r in store.read()] == [False]
    store.append(replace(FIRST, repeat=1, prediction={"most_read_bytes_per_s": 25e9}))
    assert [r.possible for r in store.read()] == [True, True]
    store.append(replace(FIRST, repeat=2, prediction={**seen, "mbu": 1.3}))
    store.append(replace(FIRST, repeat=3, prediction={**seen, "mfu": 1.1}))
    assert [r.possible for r in store.read()] == [True, True, False, False]


def test_requests_are_dropped_where_no_trace_is_wanted(store):
    trace = {"duration_s": 1.0, "requests": [{"id": 0}], "notes": {"gil": {"contention": 0.5}}}
    store.append(replace(FIRST, trace=trace))
    (found,), _ = records.scan(store.path, traces=False)
    assert found.trace == {**trace, "requests": []} and store.read()[0].trace == trace


def test_a_lone_surrogate_does_not_end_the_measurement(store):
    store.append(replace(FIRST, reason="half a \ud800 character"))
    assert store.read()[0].reason == "half a ? character"


def test_nan_is_refused_before_anything_is_written(store):
    with pytest.raises(ValueError):
        store.append(replace(FIRST, metrics={"duration_s": float("nan")}))
    assert store.path.read_bytes() == b"" and FIRST.key not in store.keys


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot write records to records.jsonl") as refused:
        Store(tmp_path / "file" / "records.jsonl")
    assert "choose a folder that you may write to" in str(refused.value)
    assert "\n" not in str(refused.value) and refused.value.__cause__ is None


@pytest.mark.skipif(sys.platform == "win32", reason="a folder has no write bit on Windows")
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="choose a folder that you may write to"):
            Store(tmp_path / "records.jsonl")
    finally:
        tmp_path.chmod(0o700)


def test_a_notebook_alone_gets_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    given = records.open_store(str(tmp_path / "a.jsonl"), "03-batch")
    alone = records.open_store("", "03-batch")
    assert given.path == tmp_path / "a.jsonl"
    assert alone.path.parent == tmp_path / "interactive"
    assert alone.path.name.startswith("03-batch-")


def test_a_card_that_is_only_there_is_not_shown_for_a_run_on_the_processor():
    card = {"device_used": {"unit": "bytes", "max": 5.0}, "rss": {"unit": "bytes", "max": 3.0}}
    for device, shown in (("cpu", False), ("cuda", True)):
        condition = {"strategy": "batch", "level": 1, "device": device}
        table = frame([Record("x", condition, 0, memory=card)])
        assert table.max_device_used_bytes.notna().all() == shown and table.max_rss_bytes[0] == 3


def test_options_and_notes_of_another_form_are_shown_as_they_are():
    strange = {"strategy": "threads", "level": 2, "options": {"workers": "many"}}
    (row,) = frame([Record("x", strange, 0, trace={"notes": 5})]).to_dict("records")
    assert row["label"] == "threads workers=many"


def test_a_frame_is_flat_and_unknown_is_missing():
    known = replace(
        FIRST,
        metrics={"duration_s": 1.5, "ttft_ms": {"median": 12.0, "n": 4}, "reasons": {"x": "y"}},
        memory={
            "rss": {"status": "ok", "unit": "bytes", "max": 300},
            "power": {"status": "unavailable", "reason": "no GPU", "unit": "watts"},
        },
        prediction={"mbu": 0.5, "detail": {"a": 1}},
        agreement={"agree": 3, "total": 4, "first_divergence": [1, 2]},
        trace={"notes": {"gil": {"contention": 0.25, "unit": "share"}, "tasks": 3}},
        warnings=["unstable: a", "unstable: b"],
    )
    table = frame([known, replace(FIRST, repeat=1, status="oom", metrics={})])
    row, failed = table.iloc[0], table.iloc[1]
    assert row.strategy == "batch" and row.level == 4 and row.prompt_tokens == "[8, 16]"
    assert row.option_batch_size == 2 and row.variant == "batch batch_size=2"
    assert row.duration_s == 1.5 and row.ttft_ms == 12.0 and row.max_rss_bytes == 300
    assert row.note_gil_contention == 0.25 and row.counts and not failed.counts
    assert row.mbu == 0.5 and (row.agree, row.compared) == (3, 4)
    assert row.warnings == "unstable: a; unstable: b"
    assert pd.isna(row.max_power_watts) and pd.isna(failed.duration_s) and pd.isna(failed.mbu)
    assert failed.status == "oom" and "reasons" not in table and "detail" not in table
    assert row.machine is None, "a record without an environment is of no known machine"


def test_words_where_numbers_belong_are_missing_numbers():
    wrong = replace(FIRST, metrics={"duration_s": "a while", "ttft_ms": {"median": [1]}},
                    memory={"rss": {"unit": "bytes", "max": "much"}})  # fmt: skip
    row = frame([wrong]).iloc[0]
    assert row.duration_s is None and row.ttft_ms is None and row.max_rss_bytes is None


def test_settings_are_told_apart_even_where_their_words_are_equal():
    warm = {"greedy": False, "temperature": 0.5}
    conditions = [CONDITION, {**CONDITION, "sampling": warm}, {**CONDITION, "level": 9}]
    table = frame(Record("03", c, 0) for c in conditions)
    assert table.setting[0] == table.setting[2] != table.setting[1]
    assert table.setting[1] == f"{table.setting[0]} (2)"


def test_a_label_is_the_strategys_own_words():
    (label,) = frame([Record("05", {"strategy": "threads", "level": 3}, 0)]).label
    assert label == STRATEGIES["threads"].words(3, {})
    (label,) = frame([Record("x", {"strategy": "of tomorrow", "level": 3}, 0)]).label
    assert label == "of tomorrow"


def test_one_walk_finds_a_number_in_the_metrics():
    record = replace(FIRST, metrics={"ttft_ms": {"median": 2.0, "p99": None}, "words": "a"})
    wanted = ("ttft_ms.median", "ttft_ms.p99", "ttft_ms", "words", "none.median")
    assert [record.metric(q) for q in wanted] == [2.0, None, None, None, None]


def test_a_failure_after_the_run_that_it_watched_is_kept(store):
    failed = replace(FIRST, kind="failed", status="error", reason="killed", metrics={})
    for r in (FIRST, failed):  # a watched run or a twin of one condition fails as `failed` too
        store.append(r)
    assert [r.status for r in store.read()] == ["ok", "error"]
