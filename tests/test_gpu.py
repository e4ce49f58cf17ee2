"""What only a GPU can show: `pytest -m gpu` (without nbval installed, add `-o addopts=""`).

GPT-2 with random weights at its true shapes, so that no network is needed.
"""

import time

import pytest
import torch

from llmperf import decoding, machine, models, predict
from llmperf.decoding import graph_step
from llmperf.decoding import requests as workload
from llmperf.decoding.sampling import GREEDY
from llmperf.decoding.trace import agreement
from llmperf.machine import gpu
from llmperf.machine.description import NVML_WINDOW_S
from llmperf.measure import Condition, measure
from llmperf.measure.records import Store
from llmperf.memory import Sampler

pytestmark = pytest.mark.gpu
MIB = 2**20


@pytest.fixture(scope="module")
def gpt2():
    return models.load("gpt2", dtype="fp32", device="cuda", weights="random")


def run(model, strategy, level=3, loop="cached", **options):
    condition = Condition(
        model, strategy, level, loop, prompt_tokens=(9, 24), new_tokens=24, sampling=GREEDY,
        options=options,
    )  # fmt: skip
    return condition.run()


def test_allocator_and_device_channels_see_the_same_tensor():
    torch.zeros(1, device="cuda")  # the context is there before the window opens
    torch.cuda.empty_cache()
    with Sampler() as sampler, sampler.window() as window:
        tensor = torch.ones(512 * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        time.sleep(NVML_WINDOW_S + 0.5)  # of a shorter run utilisation is not told
    del tensor
    seen = window
    grown = {name: seen[name]["max"] - seen[name]["first"] for name in ("allocated", "device_used")}
    assert grown["allocated"] == 512 * MIB
    assert abs(grown["device_used"] - 512 * MIB) <= 32 * MIB
    assert seen["utilization"]["status"] == "ok"


def test_process_vram_is_a_value_or_says_why_not():
    torch.zeros(64 * MIB, device="cuda")
    with Sampler() as sampler, sampler.window() as window:
        pass
    channel = window["process_vram"]
    assert channel["status"] == "ok" and channel["max"] > 64 * MIB or channel["reason"]


def test_torch_and_nvml_mean_the_same_card():
    (card, *_), reason = machine.ask(gpu.cards)
    assert reason is None
    assert card["name"] == torch.cuda.get_device_name(0)
    total = torch.cuda.get_device_properties(0).total_memory
    assert abs(card["memory_total_bytes"] - total) / total < 0.05


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("batch", {}),
        ("coroutine", {}),
        ("coroutine", {"variant": "to_thread"}),
        ("threads", {"stream": "default"}),
        ("threads", {"stream": "own"}),
        ("processes", {}),
        ("dynamic", {}),
    ],
    ids=str,
)
def test_every_strategy_gives_the_tokens_of_sequential(gpt2, strategy, options):
    found = agreement(run(gpt2, strategy, **options), run(gpt2, "sequential"))
    assert (found["agree"], found["total"]) == (3, 3), found


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_cuda_graphs_give_the_tokens_of_cached(dtype):
    llm = models.load("gpt2", dtype=dtype, device="cuda", weights="random")
    assert decoding.prepare(llm).reason is None
    found = agreement(run(llm, "batch", loop="compiled"), run(llm, "batch"))
    assert found["total"] == 3
    if dtype == "fp32":
        assert found["agree"] == 3, found


def test_graphs_are_refused_in_a_worker_thread_and_the_tokens_stay(gpt2):
    found = agreement(run(gpt2, "threads", loop="compiled"), run(gpt2, "sequential"))
    assert (found["agree"], found["total"]) == (3, 3)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_the_ledger_predicts_the_allocators_peak_within_two_percent(gpt2, batch):
    work = workload.build(gpt2.tokenizer, batch, 64, 64, sampling=GREEDY)
    run(gpt2, "batch", batch)  # workspaces and lazily loaded kernels
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Condition(gpt2, "batch", batch, "cached", prompt_tokens=64, new_tokens=64).run(work)
    measured = torch.cuda.max_memory_allocated()
    spec = predict.RunSpec(
        gpt2.shape, "fp32", rows=batch, prompt_tokens=64, new_tokens=64,
    )  # fmt: skip
    low, high = predict.memory(spec).at("allocated")
    assert low * 0.98 <= measured <= high * 1.02, (low / MIB, measured / MIB, high / MIB)


def test_a_small_batch_does_not_hold_the_memory_of_a_large_one(gpt2, tmp_path):
    small, large = (
        Condition(gpt2, "batch", n, "compiled", prompt_tokens=16, new_tokens=16) for n in (1, 32)
    )
    peaks = {}
    for name, conditions in {"alone": [small], "both": [large, small]}.items():
        found = measure("x", conditions, Store(tmp_path / f"{name}.jsonl"), repeats=2)
        peaks[name] = [
            r.memory["allocated"]["max"]
            for r in found.records
            if r.kind == "measure" and r.condition["level"] == 1
        ]
    assert max(peaks["both"]) <= 1.02 * max(peaks["alone"])


def test_out_of_memory_is_a_record_and_the_next_condition_runs(gpt2, tmp_path):
    """A cap inside torch stands for a full card; nothing of the card itself is changed."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 200 * MIB) / total)
    try:
        sizes = (1, 256)
        conditions = [Condition(gpt2, "batch", n, prompt_tokens=400, new_tokens=4) for n in sizes]
        results = measure("gpu-oom", conditions, Store(tmp_path / "r.jsonl"), repeats=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    by_level = results.frame.groupby("level").status.agg(list).to_dict()
    assert by_level[1] == ["ok", "ok"]
    assert by_level[256] in (["oom"], ["skipped"])


def test_the_mps_daemon_is_noticed_or_ruled_out():
    env = machine.describe()
    assert env["mps_daemon"] in (True, False) or env["reasons"]["mps_daemon"]


def test_a_size_has_one_set_of_buffers_and_freeing_gives_it_back(gpt2):
    decoding.free_graphs()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    decoding.warm_up(gpt2, 8, [72])
    held = torch.cuda.memory_allocated() - before
    one = predict.kv_bytes(gpt2.shape, *decoding.graph_size(8, 72), gpt2.dtype)
    assert one <= held < 1.5 * one, (held / MIB, one / MIB)
    decoding.free_graphs()
    assert torch.cuda.memory_allocated() - before < 0.1 * one


def test_processes_have_all_memory_beyond_what_was_in_use_before_them(gpt2, tmp_path):
    points = [Condition(gpt2, "processes", n, "cached", new_tokens=8) for n in (1, 2)]
    found = measure("x", points, Store(tmp_path / "r.jsonl"), repeats=2).frame
    each = (found.max_device_used_bytes - found.max_device_before_bytes) / found.level
    weights = predict.weights_bytes(gpt2.shape, "fp32")
    assert (each > weights).all() and (each < weights + 2048 * MIB).all(), each / MIB


@pytest.mark.parametrize("variant", ["yielding", "blocking"])
def test_no_graph_is_captured_in_the_clock(gpt2, tmp_path, monkeypatch, variant):
    work = {"level": 3, "loop": "compiled", "prompt_tokens": (9, 24), "new_tokens": 24}
    coroutines = Condition(gpt2, "coroutine", options={"variant": variant}, **work)
    batches = Condition(gpt2, "batch", options={"batch_size": 2}, **work)
    captured, capture = [], graph_step.GraphRows._capture
    note = lambda self, rows: captured.append(running[-1]) or capture(self, rows)  # noqa: E731
    monkeypatch.setattr(graph_step.GraphRows, "_capture", note)
    running, once = [False], Condition.run

    def timed(self, *rest):
        # a warm-up has a workload of its own; the reference, one after another, is not timed
        running.append(not rest and self.strategy != "sequential")
        try:
            return once(self, *rest)
        finally:
            running.pop()

    monkeypatch.setattr(Condition, "run", timed)
    measure("x", [coroutines, batches], Store(tmp_path / "r.jsonl"), repeats=2)
    assert captured and not any(captured)


def test_a_free_graph_leaves_those_of_other_models_alone(gpt2):
    """The cuBLAS workspace of a graph's stream is freed with it."""
    other = models.load("gpt2", dtype="bf16", device="cuda", weights="random")
    for _ in range(20):  # more captures than torch has streams
        for llm, rows in ((gpt2, 16), (other, 4), (gpt2, 1)):
            decoding.warm_up(llm, rows, [48])
    assert agreement(run(gpt2, "batch", loop="compiled"), run(gpt2, "batch"))["agree"] == 3
