"""The store: whole lines, nothing lost or doubled, and files of other versions read with care."""

import json
import os
import sys
from dataclasses import asdict, replace

import pandas as pd
import pytest

from llmperf.measure import records
from llmperf.measure.records import Record, Store

CONDITION = {"strategy": "batch", "level": 4, "options": {"size": 2}, "prompt_tokens": [8, 16]}
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
    for other in ({"repeat": 1}, {"kind": "warmup"}, {"experiment": "04"}, {"condition": {}}):
        store.append(replace(FIRST, **other))
    assert len(store.read()) == 5, "what differs in any part of the key is another record"


def test_the_key_is_the_same_for_entries_in_any_order_and_after_json():
    turned = dict(reversed(CONDITION.items()))
    assert replace(FIRST, condition=turned).key == FIRST.key
    tuples = {**CONDITION, "prompt_tokens": (8, 16)}
    assert replace(FIRST, condition=tuples).key == FIRST.key
    assert replace(FIRST, condition={**CONDITION, "level": 5}).key != FIRST.key


@pytest.mark.parametrize("cut", [1, 20, "half"])
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


def test_a_broken_line_in_the_middle_costs_only_itself(store):
    store.append(FIRST)
    with store.path.open("ab") as file:
        file.write(b'not json\n\n[1, 2]\n{"experiment": "x"}\n')
    with pytest.warns(UserWarning, match="3 left out or cut: line 2"):
        assert store.read() == [FIRST]


def test_a_newer_schema_is_read_as_far_as_it_is_known(store):
    newer = {**asdict(FIRST), "schema": records.SCHEMA + 1, "tomorrow": {"a": 1}}
    store.path.write_text(json.dumps(newer) + "\n", encoding="utf-8")
    with pytest.warns(UserWarning, match=f"schema {records.SCHEMA + 1} is newer"):
        (found,) = records.read(store.path)
    assert replace(found, schema=records.SCHEMA) == FIRST


def test_an_older_record_gets_defaults(store):
    store.path.write_text('{"experiment": "03", "condition": {}, "repeat": 0}\n', encoding="utf-8")
    assert store.read() == [Record("03", {}, 0)]


def test_nan_is_refused_before_anything_is_written(store):
    with pytest.raises(ValueError):
        store.append(replace(FIRST, metrics={"duration_s": float("nan")}))
    assert store.path.read_bytes() == b"" and FIRST.key not in store


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
        warnings=["unstable: a", "unstable: b"],
    )
    frame = records.frame([known, replace(FIRST, repeat=1, status="oom", metrics={})])
    row, failed = frame.iloc[0], frame.iloc[1]
    assert row.strategy == "batch" and row.level == 4 and row.prompt_tokens == "[8, 16]"
    assert row.options == '{"size": 2}'
    assert row.duration_s == 1.5 and row.ttft_ms == 12.0 and row.max_rss_bytes == 300
    assert row.mbu == 0.5 and (row.agree, row.compared) == (3, 4)
    assert row.warnings == "unstable: a; unstable: b"
    assert pd.isna(row.max_power_watts) and pd.isna(failed.duration_s) and pd.isna(failed.mbu)
    assert failed.status == "oom" and "reasons" not in frame and "detail" not in frame


def test_a_record_without_a_trace_says_why():
    with pytest.raises(ValueError, match="'oom' has no trace: too big"):
        replace(FIRST, status="oom", reason="too big").to_trace()
