"""Diagrams: the numbers that they draw."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.text import Annotation

from llmperf.decoding import Request, Workload
from llmperf.measure import capacity
from llmperf.show import lock_lanes, made_up, named_times, plots, positions, slots


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def bars(ax):
    """Lane → its bars as (begin, end), in order of time."""
    found: dict = {}
    for patch in ax.patches:
        if patch.get_width():
            lane = round(patch.get_y() + patch.get_height() / 2)
            begin = patch.get_x()
            found.setdefault(lane, []).append((begin, begin + patch.get_width()))
    return {lane: sorted(spans) for lane, spans in found.items()}


@pytest.mark.parametrize(
    ("loop", "computed"), [("recompute", sum(range(7, 19))), ("cached", 7 + 11)]
)
def test_positions_computed(ax, loop, computed):
    assert positions(ax, 7, 12, loop) == computed


@pytest.mark.parametrize(
    ("threads", "ms"),
    [
        (1, 3 * 30),  # nobody waits
        (5, 3 * 30 + 4 * 6),  # the lock is just never idle
        (10, 3 * 10 * 6 + 24),  # the lock is the limit
    ],
)
def test_lock_lanes_are_limited_by_the_lock(ax, threads, ms):
    assert lock_lanes(ax, threads, lock_ms=6, operator_ms=24) == pytest.approx(ms)
    lanes = bars(ax)
    assert sorted(lanes) == list(range(threads))
    for spans in lanes.values():
        assert all(a[1] == pytest.approx(b[0]) for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("joins", [False, True])
def test_no_slot_has_two_requests_at_a_time(ax, joins):
    lengths = (4, 12, 8, 16, 6, 10)
    work = Workload(tuple(Request(i, (0,), n, 0, i / 50) for i, n in enumerate(lengths)))
    curve = capacity.Curve((1, 3), (0.05, 0.09), (0.02, 0.03))
    slots(ax, capacity.simulate(work, curve, max_batch=3, joins=joins))
    lanes = bars(ax)
    assert sorted(lanes) == [0, 1, 2]
    assert sum(map(len, lanes.values())) == len(lengths)
    for spans in lanes.values():
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(spans, spans[1:], strict=False))


def test_the_arrows_of_the_named_times_span_them(ax):
    trace = made_up.three_requests()
    plots.gantt(ax, trace)
    named_times(ax, trace, row=2)
    words = {text.get_text() for text in ax.texts}
    spans = [(a.xyann[0], a.xy[0]) for a in ax.texts if isinstance(a, Annotation)]
    assert {"TTFT", "ITL", "e2el"} <= words
    assert spans == [(0.1, 1.5), (1.5, 1.6), (0.1, 1.6)]
    assert ax.get_ylim()[0] > 3, "there is room for the arrows"
