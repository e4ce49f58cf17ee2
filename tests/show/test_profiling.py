"""Profiled steps as rows, their kinds, and the two pictures drawn from made-up data."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from llmperf.show import plots, profiling


def test_profiled_steps_hold_their_operations(tiny, capfd):
    rows = profiling.profile_steps(tiny, steps=2, prompt_tokens=5)
    assert "profiler_start" not in capfd.readouterr().err  # written by native code
    assert list(rows[rows.kind == profiling.STEP].step) == [0, 1]
    products = rows[(rows.kind == "matrix products") & (rows.step == 0)]
    assert len(products) == 7 * 2 + 1  # of two layers, and the head
    found = profiling.shares(rows)
    assert found.sum() == pytest.approx(1) and (found >= 0).all()
    assert found["matrix products"] > 0 and found["attention"] > 0


def test_the_outermost_operations_of_a_step_count():
    def event(name, ms, device="DeviceType.CPU", children=()):
        span = SimpleNamespace(elapsed_us=lambda: ms * 1e3)
        return SimpleNamespace(
            name=name, time_range=span, device_type=device, cpu_children=list(children)
        )

    linear = event("aten::linear", 0.1, children=[event("aten::addmm", 0.08)])
    attention = event("aten::scaled_dot_product_attention", 0.2)
    step = event("decode step 0", 4.0, children=[linear, attention])
    above_the_kernels = event("decode step 0", 2.0, device="DeviceType.CUDA")
    rows = profiling.rows_of([step, linear, attention, above_the_kernels])
    assert rows[["kind", "ms"]].values.tolist() == [
        [profiling.STEP, 4.0],
        ["matrix products", 0.1],
        ["attention", 0.2],
    ]
    assert profiling.shares(rows)["between operations"] == pytest.approx(1 - 0.3 / 4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::linear", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::scaled_dot_product_attention", "attention"),
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
