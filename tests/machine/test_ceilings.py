import json
from types import SimpleNamespace

import pytest
import torch

from llmperf.machine import ceilings, description, overhead, rates

MIB = 1 << 20


@pytest.fixture
def half_a_second(monkeypatch):
    """Every run takes half a second on a made-up clock, and really runs once."""

    def seconds_of(run, wait, repeats, budget_s=0.5):
        run()
        return [0.5] * repeats

    monkeypatch.setattr(rates, "seconds_of", seconds_of)


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(rates, "past_caches_bytes", lambda device: 4 * MIB)


def test_seconds_waits_before_it_reads_the_clock_and_drops_the_first(monkeypatch):
    now, events = [0.0], []

    def run():
        events.append("run")
        now[0] += 1.0 if len(events) > 2 else 50.0  # the first run compiles and loads

    def wait():
        events.append("wait")
        now[0] += 2.0

    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])
    assert rates.seconds_of(run, wait, repeats=5, budget_s=1.0) == [3.0, 3.0, 3.0]
    assert events == ["run", "wait"] * 4


def test_read_bandwidth_counts_the_bytes_of_the_buffer(half_a_second, small_buffer):
    rate = rates.read_bandwidth()
    assert rates.read_bandwidth(share=0.5)["median"] == rate["median"] / 2
    assert rate["median"] == 4 * MIB / 0.5


def test_the_buffer_is_past_the_caches_and_leaves_memory_free(monkeypatch):
    monkeypatch.setitem(rates.PROBES, "ram_available_bytes", lambda: 64 << 30)
    assert rates.past_caches_bytes("cpu") == 1 << 30
    monkeypatch.setitem(rates.PROBES, "ram_available_bytes", lambda: 1 << 30)
    assert rates.past_caches_bytes("cpu") == 128 * MIB


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_matmul_flops_counts_two_per_multiply_add(half_a_second, dtype):
    rate = rates.matmul_flops(dtype)
    assert rate["median"] == 2 * 256**3 / 0.5  # half a second is long: no larger size is tried


def test_launch_latency(monkeypatch):
    monkeypatch.setattr(rates, "TINY_OPS", 50)
    launch = rates.launch_latency()
    assert 0 < launch["enqueue"]["median"] <= launch["drained"]["median"] < 0.01
    assert len(launch["drained"]["samples"]) == 5


def test_matmul_rates_reads_its_weights_from_memory(half_a_second, small_buffer):
    seen = []

    def product(weight):
        def run(x):
            seen.append((tuple(weight.shape), tuple(x.shape), weight.data_ptr()))
            return x @ weight.T

        return run

    seconds = rates.matmul_seconds([(64, 128), (64, 128)], "bf16", 4, product)
    copies = MIB // (64 * 128 * 2)  # so that no cache holds them all
    assert len({pointer for _, _, pointer in seen}) == copies
    assert {shapes[:2] for shapes in seen} == {((64, 128), (4, 128))}
    assert seconds == {(64, 128): 0.5 / copies}


def test_measure_is_json_and_a_type_may_be_missing(monkeypatch, half_a_second, small_buffer):
    def refuse(dtype, device):
        if dtype == "fp16":
            raise RuntimeError("no kernel for Half\nand a long trace")
        return {"median": 1.0}

    monkeypatch.setattr(rates, "matmul_flops", refuse)
    monkeypatch.setattr(rates, "TINY_OPS", 10)
    result = ceilings.measure("cpu")
    assert json.loads(json.dumps(result)) == result
    assert result["flops_per_s"]["fp16"] is None


# --- kept results ---------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path))
    monkeypatch.setattr(description, "busy", lambda device: None)
    calls, warnings = [], [None]

    def measure(device):
        calls.append(device)
        return {"n": len(calls), "warning": warnings[0]}

    monkeypatch.setattr(ceilings, "measure", measure)
    return calls, warnings, tmp_path


def test_cached_measures_once(counted):
    calls, _, _ = counted
    assert ceilings.cached("cpu")["n"] == ceilings.cached("cpu")["n"] == 1
    assert calls == ["cpu"]


def test_one_card_has_one_entry_whatever_it_is_called(counted):
    assert ceilings.cached("cuda")["n"] == ceilings.cached("cuda:0")["n"] == 1
    assert ceilings.cached("cuda:1")["n"] == 2


def test_cached_belongs_to_a_torch_version(counted, monkeypatch):
    ceilings.cached("cpu")
    monkeypatch.setattr(description.importlib.metadata, "version", lambda name: "99.0")
    assert ceilings.cached("cpu")["n"] == 2


@pytest.mark.parametrize("damage", [lambda text: text[:9], lambda text: "[]",
    lambda text: text.replace('"n": 1', '"n": 9'), lambda text: "{}"])  # fmt: skip
def test_a_kept_file_that_others_wrote_or_cut_is_measured_again(counted, damage):
    _, _, folder = counted
    ceilings.cached("cpu")
    (file,) = folder.rglob("*.json")
    file.write_text(damage(file.read_text()), encoding="utf-8")
    assert ceilings.cached("cpu")["n"] == 2


def test_what_was_measured_on_a_busy_machine_is_measured_again_when_idle(counted, monkeypatch):
    _, warnings, _ = counted
    warnings[0] = "others were busy"
    monkeypatch.setattr(description, "busy", lambda device: "still busy")
    assert ceilings.cached("cpu")["n"] == ceilings.cached("cpu")["n"] == 1
    warnings[0] = None
    monkeypatch.setattr(description, "busy", lambda device: None)
    assert ceilings.cached("cpu")["n"] == 2


def test_now_takes_the_bandwidth_of_this_minute_keeps_the_higher_and_measures_no_card(monkeypatch):
    def rate(value):
        return {"read_bytes_per_s": {"median": value}, "flops_per_s": {}}

    fresh = iter((3.0, 1.0))
    monkeypatch.setattr(ceilings, "cached", lambda device: rate(2.0))
    kept = []
    monkeypatch.setattr(ceilings.description, "store_measurement", lambda *args: kept.append(args))
    read = lambda device, **how: {"median": next(fresh)}  # noqa: E731
    monkeypatch.setattr(ceilings.rates, "read_bandwidth", read)
    assert [ceilings.now("cpu")["read_bytes_per_s"]["median"] for _ in range(2)] == [3.0, 1.0]
    assert [found["read_bytes_per_s"]["median"] for _, _, found in kept] == [3.0]
    card = ceilings.now("cuda:0")  # the buffer would stay in torch's allocator
    assert card == rate(2.0) | {"most_read_bytes_per_s": 2.0}


def test_this_minute_takes_the_bandwidth_as_it_is_and_keeps_the_highest_sample(monkeypatch):
    fresh = iter(({"median": 3.0, "samples": [2.0, 3.0, 4.0]}, {"median": 1.0}))
    monkeypatch.setattr(ceilings.rates, "read_bandwidth", lambda device, **how: next(fresh))
    limits, seen = {"read_bytes_per_s": {"median": 2.0, "samples": [2.5]}}, []
    for _ in range(2):
        limits = ceilings.this_minute(limits)
        seen.append((limits["read_bytes_per_s"]["median"], limits["most_read_bytes_per_s"]))
    assert seen == [(3.0, 4.0), (1.0, 4.0)]


def test_what_could_not_be_measured_is_not_kept(counted, monkeypatch):
    found = iter(({"first": None, "reason": "no"}, {"first": 1, "reason": None}))
    monkeypatch.setattr(overhead, "overhead", lambda device: next(found))
    assert [overhead.cached("cpu")["first"] for _ in range(3)] == [None, 1, 1]


def test_cached_without_a_place_to_write(counted, monkeypatch):
    _, _, folder = counted
    (folder / "ceilings").write_text("a file where the folder should be", encoding="utf-8")
    assert ceilings.cached("cpu")["n"] == 1


# --- fixed memory of a process --------------------------------------------------------------------


def test_overhead_of_a_fresh_interpreter(monkeypatch):
    monkeypatch.setattr(overhead, "STAGES", ("interpreter",))
    result = overhead.overhead("cpu")
    assert result["reason"] is None
    for which in ("first", "further"):
        figures = result[which]["interpreter"]
        assert MIB < figures["uss"] < figures["rss"] < 100 * MIB  # no torch in it


@pytest.mark.slow
def test_overhead_grows_with_each_stage():
    result = overhead.overhead("cpu")
    for which in ("first", "further"):
        rss = [result[which][stage]["rss"] for stage in overhead.STAGES]
        assert rss == sorted(rss)
        assert rss[1] > rss[0] + 50 * MIB  # torch
        assert rss[2] > rss[1] + 10 * MIB  # transformers
        assert result[which]["torch"]["uss"] < rss[1]


def test_a_child_that_dies_is_a_reason_and_not_an_error(monkeypatch):
    monkeypatch.setattr(overhead.gpu, "used_bytes", lambda device: 0)
    result = overhead.overhead("cuda:9999")  # torch refuses it
    assert result["first"] is None and "fresh process ended" in result["reason"]


def test_cuda_overhead_takes_off_the_reserve_of_the_allocator(monkeypatch):
    used = iter([1000, 1000 + 300 + 20, 1000 + 450 + 64])
    monkeypatch.setattr(overhead.gpu, "used_bytes", lambda device: next(used))
    reserved = {"context": {"reserved": 20}, "libraries": {"reserved": 64}}
    child = SimpleNamespace(ask=lambda timeout_s, stage: reserved.get(stage, {}))
    figures = overhead._measured(child, "cuda:0")
    assert figures == {"context": 300, "libraries": 150, "total": 450}


# --- with a card ----------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
def test_measured_ceilings_of_a_card():
    result = ceilings.measure("cuda")
    assert 1e10 < result["read_bytes_per_s"]["median"] < 1e13
    launch = result["launch_s"]
    assert 1e-7 < launch["enqueue"]["median"] <= launch["drained"]["median"] < 1e-3


@pytest.mark.gpu
@needs_gpu
def test_fixed_memory_of_a_process_on_a_card():
    result = overhead.overhead("cuda:0")
    if result["first"] is None:
        pytest.skip(result["reason"])
    assert 30 * MIB < result["first"]["context"] < 4096 * MIB
    assert result["further"]["total"] > 30 * MIB
