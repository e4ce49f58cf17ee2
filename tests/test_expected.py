"""The expectation beside a measurement: what it adds up, what limits, when there is none."""

from dataclasses import replace

import pytest
import torch

from llmperf import decoding, predict
from llmperf.decoding import static_cache as compiled
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.machine import ceilings
from llmperf.measure import Condition, beside, expected, measure
from llmperf.measure.records import Store

LIMITS = {
    "read_bytes_per_s": {"median": 1e12},
    "flops_per_s": {"fp32": {"median": 1e15}},
    "launch_s": {"drained": {"median": 1e-6}},
}
STEP_S = 1e-3  # every product takes this long in the made-up rates


@pytest.fixture
def made_up(monkeypatch):
    """Rates where each product takes a millisecond; what was asked for is kept."""
    asked = []

    def rates(shapes, dtype, device, batches, repeats, product):
        asked.append((sorted(shapes), dtype, tuple(batches)))
        return [
            {"n": n, "k": k, "batch": b, "dtype": dtype, "seconds": {"median": STEP_S}}
            for n, k in shapes
            for b in batches
        ]

    monkeypatch.setattr(ceilings, "matmul_rates", rates)
    monkeypatch.setattr(expected.between, "eager_s", lambda *a: 2e-4)
    monkeypatch.setattr(expected.between, "drawing_s", lambda *a: 1e-4)
    monkeypatch.setattr(ceilings, "cached", lambda device: LIMITS)
    return asked


def trace(gap_s, tokens=5):
    times = tuple(1.0 + gap_s * i for i in range(tokens))
    return Trace((RequestTrace(0, 4, 0.0, 0.0, 0.5, times, (1,) * tokens),), times[-1])


def test_a_step_is_its_products_and_what_its_layers_do_between(tiny, made_up):
    condition = Condition(tiny, "batch", 3, prompt_tokens=8, new_tokens=4)
    found = beside.predict_beside(condition, trace(0.02), expect=True)
    products = sum(predict.matmul_shapes(tiny.shape).values())
    whole = products * STEP_S + 3e-4
    assert found["expected_tpot_ms"] == pytest.approx(whole * 1e3, rel=1e-3)
    assert found["explained"] == pytest.approx(found["expected_tpot_ms"] / 20)
    assert {batches for _, _, batches in made_up} == {(3,)}
    assert found["mbu"] > 0 and found["mfu"] > 0


def test_the_limit_is_python_when_most_of_a_step_is_nothing_else(tiny, made_up):
    condition = Condition(tiny, "sequential", 1, prompt_tokens=8, new_tokens=4)
    at_once = beside.predict_beside(condition, trace(0.02), expect=True)
    slow = beside.predict_beside(condition, trace(0.2), expect=True)
    assert at_once["limit"] in ("bandwidth", "launches")
    assert slow["limit"] == "Python"


def test_recompute_multiplies_as_many_rows_as_it_sees(tiny, made_up):
    condition = Condition(tiny, "batch", 2, "recompute", prompt_tokens=8, new_tokens=4)
    found = beside.predict_beside(condition, trace(0.02), expect=True)
    assert {batches for _, _, batches in made_up} == {(2 * (8 + 2 + 1),)}
    cached = beside.predict_beside(replace(condition, loop="cached"), trace(0.02))
    spec = predict.RunSpec(tiny.shape, "fp32", rows=2, prompt_tokens=8)
    least = predict.latency(spec, LIMITS | {"launch_s": None}, context=10)
    assert cached["bound_tpot_ms"] == least.decode.seconds * 1e3
    assert found["bound_tpot_ms"] != cached["bound_tpot_ms"]


def test_what_cannot_be_timed_has_no_expectation(tiny, made_up):
    condition = Condition(tiny, "continuous", 2, prompt_tokens=8, new_tokens=4)
    assert beside.predict_beside(condition, trace(0.02), expect=True)["expected_tpot_ms"] is None
    one = Condition(tiny, prompt_tokens=8, new_tokens=1)
    assert beside.predict_beside(one, trace(0.02, 1), expect=True)["expected_tpot_ms"] is None
    declared = replace(tiny, shape=replace(tiny.shape, quantization="awq"))
    assert expected.rates(Condition(declared, prompt_tokens=8, new_tokens=4), 1) is None


def test_only_those_who_ask_wait_for_it(tiny, made_up, tmp_path):
    conditions = [Condition(tiny, prompt_tokens=4, new_tokens=3)]
    plain = measure("x", conditions, Store(tmp_path / "a.jsonl"), repeats=1, progress=False)
    assert not made_up and "expected_tpot_ms" not in plain.frame
    asked = measure(
        "x", conditions, Store(tmp_path / "b.jsonl"), repeats=1, expect=True, progress=False
    )
    assert asked.frame.expected_tpot_ms.notna().all()


def test_a_peer_is_predicted_with_the_rows_that_it_runs_together(tiny, made_up):
    whole = Condition(tiny, "peer", 4, prompt_tokens=8, new_tokens=4)
    batch = Condition(tiny, "batch", 4, prompt_tokens=8, new_tokens=4)
    ours, theirs = (beside.predict_beside(c, trace(0.02)) for c in (batch, whole))
    assert ours["bound_s"] == theirs["bound_s"]


@pytest.mark.parametrize("word", [None, "int8"])
def test_the_real_rates_name_every_product_of_the_model(tiny, word, monkeypatch):
    monkeypatch.setattr("llmperf.machine.rates.past_caches_bytes", lambda device: 1 << 16)
    model = replace(tiny, quantization=word)
    rates = expected.rates(Condition(model, prompt_tokens=8, new_tokens=4), 2)
    assert {(r["n"], r["k"]) for r in rates} == set(predict.matmul_shapes(tiny.shape))
    assert all(r["seconds"]["median"] > 0 and r["batch"] == 2 for r in rates)


def test_every_loop_has_a_name_that_the_prediction_knows(tiny):
    for loop in decoding.LOOPS:
        assert expected.loop_of(Condition(tiny, loop=loop, prompt_tokens=8, new_tokens=4)) == loop


@pytest.mark.parametrize(("rows", "new", "seen"), [(1, 1, 8), (64, 1, 512), (1, 8, 8)])
def test_what_an_eager_step_does_between_its_products_is_run_and_timed(
    tiny, rows, new, seen, monkeypatch
):
    monkeypatch.setattr(expected.between, "seconds_of", lambda run, *_: [run() or 3.0, 7.0, 5.0])
    expected.between.eager_s.cache_clear()
    assert expected.between.eager_s(tiny.shape, "fp32", rows, new, seen) == 5.0
    expected.between.eager_s.cache_clear()


def test_a_compiled_step_is_expected_from_its_joined_products_and_its_own_rest(
    tiny, made_up, monkeypatch
):
    """The clock is made up: the step takes 9 ms on one layer's weights, its products 7."""
    clock = iter([9e-3, 7e-3])
    monkeypatch.setattr(expected.between, "seconds_of", lambda run, *_: [(run(), next(clock))[1]])
    condition = Condition(tiny, "batch", 2, "compiled", prompt_tokens=8, new_tokens=4)
    condition.run()
    found = beside.predict_beside(condition, trace(0.02), expect=True)
    joined = predict.matmul_shapes(tiny.shape, joined=True)
    assert {size for sizes, *_ in made_up for size in sizes} == set(joined)
    whole = sum(joined.values()) * STEP_S + 2e-3 + 1e-4
    assert found["expected_tpot_ms"] == pytest.approx(whole * 1e3)


def test_where_this_size_fell_back_the_step_is_expected_as_an_eager_one(tiny, made_up, monkeypatch):
    """Another size was compiled, so the loop counts as compiled: no record may be lost."""
    condition = Condition(tiny, "batch", 2, "compiled", prompt_tokens=8, new_tokens=4)
    condition.run()
    fallen = compiled.Plan(2, 256, reason="no kernel for this size")
    monkeypatch.setattr(expected.compiled, "prepare", lambda *a: fallen)
    found = beside.predict_beside(condition, trace(0.02), expect=True)
    assert found["expected_tpot_ms"] is not None


def test_a_step_in_cache_runs_on_the_first_layers_weights(tiny):
    condition = Condition(tiny, "batch", 2, "compiled", prompt_tokens=8, new_tokens=4)
    condition.run()
    (plan,) = [p for p in compiled.plans(tiny) if p.rows == 2]
    inputs = (torch.ones(2, 1).long(), torch.tensor([8]), torch.zeros(2).long(), *plan.buffers[-1])
    with torch.no_grad():
        real, _ = plan.decoder(*inputs)
        other, _ = plan.decoder.in_cache()(*inputs)
        again, _ = plan.decoder(*inputs)
    assert torch.equal(real, again) and not torch.equal(real, other)


def test_joined_shapes_hold_as_many_weights(tiny):
    apart, joined = (predict.matmul_shapes(tiny.shape, way) for way in (False, True))
    sizes = [sum(n * k * times for (n, k), times in way.items()) for way in (apart, joined)]
    assert sizes[0] == sizes[1]
    assert sum(apart.values()) - sum(joined.values()) == 3 * tiny.shape.layers
