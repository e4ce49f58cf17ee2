"""The prediction of a run: its bound, the expected step, and what surely does not fit."""

import gc
from dataclasses import replace

import pytest
import torch

from llmperf import machine, models, predict
from llmperf.decoding import PUBLISHED
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import Condition, predict_run, prediction, step_time

LIMITS = {
    "read_bytes_per_s": {"median": 1e9},
    "flops_per_s": {"fp32": {"median": 1e12}},
    "launch_s": {"drained": {"median": 1e-6}},
}
STEP_S = 1e-3  # every product takes this long in the made-up rates


@pytest.fixture
def asked(monkeypatch):
    """Made-up times: a product takes 1 ms, an operation 10 us, a draw 0.1 ms; rows asked for."""
    rows = []

    def seconds(shapes, dtype, batch, product):
        rows.append(batch)
        return dict.fromkeys(shapes, STEP_S)

    monkeypatch.setattr(step_time.rates, "matmul_seconds", seconds)
    monkeypatch.setattr(step_time, "operation_s", lambda: 1e-5)
    monkeypatch.setattr(step_time, "sampling_s", lambda *_: 1e-4)
    step_time.products_s.cache_clear()
    yield rows
    step_time.products_s.cache_clear()


def trace(gap_s, tokens=5, **notes):
    times = tuple(1.0 + gap_s * i for i in range(tokens))
    return Trace((RequestTrace(0, 4, 0.0, 0.0, 0.5, times, (1,) * tokens),), times[-1], notes)


def test_an_eager_step_is_its_products_its_operations_and_the_draw(tiny, asked):
    condition = Condition(tiny, "batch", 3, "cached", prompt_tokens=8, new_tokens=4)
    found = predict_run(condition, expect=True, limits=LIMITS)
    products = sum(predict.matmul_shapes(tiny.shape).values()) * STEP_S
    whole = products + 1e-5 * step_time.operations(tiny) + 1e-4
    assert found["expected_tpot_ms"] == pytest.approx(whole * 1e3)
    assert found["expected_low_ms"] < whole * 1e3 < found["expected_high_ms"]
    assert asked == [3]
    assert found["weights_bytes"] == sum(p.nbytes for p in tiny.module.parameters())
    done = prediction.audit(condition, found, trace(0.02))
    assert done["mbu"] > 0 and done["mfu"] > 0 and done["plausible"]


def test_threads_that_share_weights_may_read_them_from_a_cache(tiny):
    two = Condition(tiny, "threads", 2, "cached", prompt_tokens=8, new_tokens=4)
    one = Condition(tiny, "batch", 2, "cached", prompt_tokens=8, new_tokens=4)
    for condition, possible in ((two, True), (one, False)):
        found = predict_run(condition, limits=LIMITS)
        seconds = prediction.audit(condition, found, trace(0.02))["mbu"] * trace(0.02).duration_s
        fast = replace(trace(0.02), duration_s=seconds / 1.5)  # 1.5 times the bandwidth
        done = prediction.audit(condition, found, fast)
        assert done["plausible"] is possible and done["mbu"] == pytest.approx(1.5)
        assert done["why"].endswith(" plausible" if possible else " implausible")


def test_operations_are_those_that_torch_runs(tiny):
    with torch.profiler.profile() as profiler, torch.inference_mode():
        tiny.module(input_ids=torch.zeros(1, 1).long(), use_cache=True, logits_to_keep=1)
    outer = [e for e in profiler.events() if e.cpu_parent is None and e.name.startswith("aten::")]
    assert step_time.operations(tiny) == pytest.approx(len(outer), rel=0.3)


@pytest.mark.parametrize("multiply_s", [1e-9, 0.5])
@pytest.mark.parametrize("limit", ["bandwidth", "arithmetic"])
def test_a_compiled_step_lies_between_full_and_no_overlap(
    tiny, asked, monkeypatch, multiply_s, limit
):
    monkeypatch.setattr(step_time, "arithmetic_s", lambda *_: (multiply_s, 0.002))
    condition = Condition(tiny, "batch", 2, "compiled", prompt_tokens=8, new_tokens=4)
    read_ms = predict_run(condition, limits=LIMITS)["bound_tpot_ms"]
    slow = {"flops_per_s": {"fp32": {"median": 1e6}}} if limit == "arithmetic" else {}
    found = predict_run(condition, expect=True, limits=LIMITS | slow)
    multiply_ms, bound_ms = multiply_s * 1e3, found["bound_tpot_ms"]
    assert (bound_ms > read_ms) == (limit == "arithmetic")
    low = 0.1 + max(bound_ms, 2 + max(read_ms, multiply_ms))  # the draw takes 0.1 ms
    high = 0.1 + max(bound_ms, 2 + read_ms + multiply_ms)
    assert found["expected_tpot_ms"] == pytest.approx(low + 0.2 * (high - low))
    assert found["expected_low_ms"] <= low and found["expected_high_ms"] >= high
    assert not asked, "none of torch's products is timed"


def test_what_a_compiled_step_copies_is_in_the_predicted_memory(tiny, monkeypatch):
    condition = Condition(tiny, "batch", 2, "compiled", prompt_tokens=8, new_tokens=4)
    before = predict_run(condition, limits=LIMITS)
    step = prediction.prepared(condition).step
    monkeypatch.setattr(step, "extra_bytes", step.extra_bytes + 1000)
    after = predict_run(condition, limits=LIMITS)
    for bound in ("memory_low_bytes", "memory_high_bytes"):
        assert after[bound] == before[bound] + 1000


def test_other_models_in_this_process_are_in_the_predicted_memory(tiny, tiny_folder):
    condition = Condition(tiny, "batch", 2, "compiled", prompt_tokens=8, new_tokens=4)
    before = predict_run(condition, limits=LIMITS)["memory_low_bytes"]
    other = models.load(str(tiny_folder), dtype="bf16", device="cpu")
    grown = predict_run(condition, limits=LIMITS)["memory_low_bytes"] - before
    assert grown == predict.weights_bytes(other.shape, "bf16")
    del other
    gc.collect()
    assert predict_run(condition, limits=LIMITS)["memory_low_bytes"] == before


def test_the_draw_is_timed_as_the_loop_draws(tiny, monkeypatch):
    drawn = []
    step = prediction.prepared(Condition(tiny, loop="compiled")).step
    right = step.next_tokens
    monkeypatch.setattr(step, "next_tokens", lambda *a: drawn.append(a) or right(*a))
    assert step_time.sampling_s(tiny, "compiled", 2, PUBLISHED) > 0 and drawn
    drawn.clear()
    assert step_time.sampling_s(tiny, "cached", 2, PUBLISHED) > 0 and not drawn


def test_the_arithmetic_of_a_compiled_step_is_timed_once_a_number_of_rows(tiny):
    first = multiply_s, rest_s = step_time.arithmetic_s(tiny, 2, 8)
    assert multiply_s >= 0 and rest_s > 0  # on a busy machine the difference may be lost
    assert step_time.arithmetic_s(tiny, 2, 8) == first


def test_the_limit_is_python_where_operations_take_longest(tiny, asked, monkeypatch):
    condition = Condition(tiny, loop="cached", prompt_tokens=8, new_tokens=4)
    assert predict_run(condition, expect=True, limits=LIMITS)["limit"] == "bandwidth"
    monkeypatch.setattr(step_time, "operation_s", lambda: 1.0)
    assert predict_run(condition, expect=True, limits=LIMITS)["limit"] == "Python"


def test_recompute_multiplies_as_many_rows_as_it_sees(tiny, asked):
    condition = Condition(tiny, "batch", 2, "recompute", prompt_tokens=8, new_tokens=4)
    found = predict_run(condition, expect=True, limits=LIMITS)
    assert asked == [2 * (8 + 2 + 1)]
    cached = predict_run(replace(condition, loop="cached"), limits=LIMITS)
    assert found["bound_tpot_ms"] != cached["bound_tpot_ms"]


def test_what_is_not_this_sum_has_a_reason_instead(tiny, asked):
    engine = Condition(tiny, "peer", 2, prompt_tokens=8, new_tokens=4)
    declared = replace(tiny, shape=replace(tiny.shape, quantization="awq"))
    loaded = replace(tiny, quantization="gptq-8-g32")
    theirs = (Condition(m, prompt_tokens=8, new_tokens=4) for m in (declared, loaded))
    for condition in (engine, *theirs):
        found = predict_run(condition, expect=True, limits=LIMITS)
        assert found["expected_tpot_ms"] is None and found["expected_reason"]
    assert "expected_tpot_ms" not in predict_run(engine, limits=LIMITS)


def test_a_run_is_audited_by_the_loop_that_ran(tiny):
    condition = Condition(tiny, "batch", 2, "recompute", prompt_tokens=100, new_tokens=9)
    found = predict_run(condition, limits=LIMITS)
    asked, fell_back = (
        prediction.audit(condition, found, trace(0.02, **notes))
        for notes in ({}, {"loop": "cached"})
    )
    assert fell_back["mfu"] < asked["mfu"] / 5


def test_a_peer_is_predicted_with_the_rows_that_it_runs_together(tiny):
    whole, batch = (Condition(tiny, n, 4, prompt_tokens=8, new_tokens=4) for n in ("peer", "batch"))
    assert (
        predict_run(whole, limits=LIMITS)["bound_s"] == predict_run(batch, limits=LIMITS)["bound_s"]
    )


@pytest.mark.parametrize("word", [None, "int8"])
def test_the_products_of_a_model_can_be_timed(tiny, word, monkeypatch):
    monkeypatch.setattr("llmperf.machine.rates.past_caches_bytes", lambda device: 1 << 16)
    step_time.products_s.cache_clear()
    assert step_time.products_s(tiny.shape, tiny.dtype, word, 2) > 0


def test_where_a_full_card_spills_the_allocator_is_capped(tiny, monkeypatch):
    told, gib = [], 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * gib, 10 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gib)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *a: told.append(a))
    predict.cap_allocator(tiny)
    on_card = replace(tiny, device="cuda:0")
    for system in ("WSL2", "Windows", "Linux"):
        monkeypatch.setitem(machine.PROBES, "os", lambda system=system: system)
        predict.cap_allocator(on_card)
    assert told == [(pytest.approx(0.85), "cuda:0")] * 2
    monkeypatch.setitem(machine.PROBES, "os", lambda: "Windows")
    predict.cap_allocator(on_card, processes=3)  # which share what is free beyond the reserve
    assert told[2] == (pytest.approx((7.5 / 3 + 1) / 10), "cuda:0")
