"""Profiled steps as rows, their kinds, and the two pictures drawn from made-up data."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from llmperf.show import plots, profiling


def test_profiled_steps_hold_their_operations(tiny):
    rows = profiling.profile_steps(tiny, steps=2, prompt_tokens=5)
    steps = rows[rows.kind == profiling.STEP]
    assert list(steps.step) == [0, 1]
    first, second = steps.start_ms
    assert first == 0 and second >= steps.ms.iloc[0]
    products = rows[(rows.kind == "matrix products") & (rows.step == 0)]
    assert len(products) == 7 * 2 + 1  # of two layers, and the head
    inside = rows[(rows.kind != profiling.STEP) & (rows.step == 1)]
    assert (inside.start_ms >= second).all()
    found = profiling.shares(rows)
    assert found.sum() == pytest.approx(1) and (found >= 0).all()
    assert found["matrix products"] > 0 and found["attention"] > 0


def test_events_of_a_gpu_get_a_lane_of_their_own():
    def event(name, start, end, device="DeviceType.CPU", children=()):
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name, time_range=span, device_type=device, cpu_children=list(children)
        )

    linear = event("aten::linear", 1500, 1600, children=[event("aten::addmm", 1510, 1590)])
    inner = event("llmperf::attend", 2100, 2300)
    wrapper = event("## Call CompiledFxGraph x ##", 2000, 3000, children=[inner])
    step = event("decode step 0", 1000, 5000, children=[linear, wrapper])
    kernel = event("ampere_bf16_gemm", 2000, 4000, device="DeviceType.CUDA")
    span = event("decode step 0", 2000, 4000, device="DeviceType.CUDA")
    rows = profiling.rows_of([step, linear, wrapper, inner, kernel, span])
    assert rows[["where", "kind", "start_ms", "ms"]].values.tolist() == [
        ["processor", profiling.STEP, 0.0, 4.0],
        ["processor", "matrix products", 0.5, 0.1],
        ["processor", "attention", 1.1, 0.2],
        ["GPU", "matrix products", 1.0, 2.0],
    ]
    assert profiling.shares(rows)["between operations"] == pytest.approx(1 - 0.3 / 4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::linear", "matrix products"),
        ("llmperf::linear", "matrix products"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("llmperf::attend", "attention"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("aten::mul", profiling.OTHER),
    ],
)
def test_operations_are_told_apart_by_name(name, kind):
    assert profiling.kind_of(name) == kind


def test_a_roofline_has_a_slope_a_flat_and_the_points_where_they_were_measured():
    limits = {
        "read_bytes_per_s": {"median": 10e9},
        "flops_per_s": {"fp32": {"median": 100e9}, "bf16": {"median": 400e9}},
    }
    points = pd.DataFrame(
        {
            "name": ["a", "b"],
            "dtype": ["fp32", "bf16"],
            "flops": [5e8, 5e8],
            "bytes": [1e9, 5e8],
            "seconds": [0.2, 0.1],
        }
    )
    fig, ax = plots.figure()
    plots.roofline(ax, limits, points)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["a"].get_xydata()[0]) == [0.5, 2.5]
    assert list(lines["b"].get_xydata()[0]) == [1.0, 5.0]
    x, y = lines["roof, fp32"].get_data()
    assert (x[1], y[1]) == (10.0, 100.0) and y[2] == 100.0  # the ridge, then flat
    assert y[0] == pytest.approx(x[0] * 10)
    plt.close(fig)


def test_a_timeline_has_a_lane_for_each_loop_and_device(tiny):
    rows = profiling.profile_steps(tiny, steps=1, prompt_tokens=5)
    both = pd.concat([rows, rows.assign(where="GPU", kind="attention")])
    fig, ax = plots.figure()
    profiling.timeline(ax, {"cached": both, "compiled": rows})
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["cached\nprocessor", "cached\nGPU", "compiled\nprocessor"]
    plt.close(fig)
