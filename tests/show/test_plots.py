"""What a figure says of itself: which band, which machine, what was unstable."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from llmperf.measure import Record
from llmperf.show import plots, side_by_side


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def frame(repeats, **fields):
    rows = []
    for level in (1, 2, 4):
        for repeat in range(repeats):
            row = {"status": "ok", "level": level, "y": level * (10 + repeat), "repeat": repeat}
            row |= {"model": "gpt2", "precision": "fp32", "weights": "trained"}
            rows.append(row | {"warnings": "", "machine": "a card"} | fields)
    return pd.DataFrame(rows)


def drawn(rows):
    """The caption's text, and the lowest and highest of the band at level 1 (None without one)."""
    fig, ax = plots.figure()
    plots.curve(ax, rows, "level", "y", "here")
    plots.caption(fig, rows)
    edges = [y for band in ax.collections for x, y in band.get_paths()[0].vertices if x == 1]
    return fig.get_supxlabel(), (min(edges), max(edges)) if edges else None


def test_few_repeats_are_drawn_from_lowest_to_highest_and_called_so():
    text, band = drawn(frame(3))
    assert "band: lowest to highest of 3" in text and "interval" not in text
    assert band == (10, 12)


def test_enough_repeats_are_drawn_with_their_interval():
    text, band = drawn(frame(12))
    assert "band: 95 % interval" in text and "lowest" not in text
    assert "band: 94 % interval" in drawn(frame(5))[0], "the whole range of five"
    assert 10 < band[0] < 15.5 < band[1] < 21, "narrower than all the runs"


def test_bands_of_five_and_of_more_runs_are_named_once():
    fig, ax = plots.figure()
    both = [frame(5), frame(12)]
    for rows in both:
        plots.curve(ax, rows, "level", "y", "here")
    plots.caption(fig, pd.concat(both))
    text = fig.get_supxlabel()
    assert "; bands: 94 to 95 % intervals; points" in text and "band:" not in text


def speed(dtype, level, tokens_per_s, strategy="batch"):
    condition = {
        "strategy": strategy,
        "level": level,
        "model": "gpt2",
        "dtype": dtype,
        "loop": "cached",
        "device": "cpu",
        "prompt_tokens": 8,
        "new_tokens": 8,
    }
    metrics = {"output_tokens_per_s": tokens_per_s, "output_tokens": 8, "requests_ok": 1,
               "e2el_ms": {"median": 8.0}}  # fmt: skip
    return Record("03-batch", condition, 0, metrics=metrics)


@pytest.mark.parametrize("fastest", ["fp32", "bf16"])
def test_the_fastest_option_is_drawn_where_the_curves_are_of_another_dtype(fastest):
    records = [speed("fp32", n, 10 * n) for n in (1, 2, 4)]
    records += [speed("fp32", 1, 11, "sequential")]
    records += [speed("bf16", 4, 50 if fastest == "bf16" else 30)]
    ax = side_by_side.strategies_figure(records).axes[0]
    names = [text.get_text() for text in ax.get_figure().axes[1].get_legend().get_texts()]
    found = ["batch", "sequential"]
    if fastest == "bf16":
        found.append("the most: batches of 4, bf16, cached")
        line = next(x for x in ax.lines if x.get_label() == found[-1])
        assert line.get_xydata().tolist() == [[4, 50]] and line.get_markerfacecolor() == "white"
    assert names == found


def test_one_kind_of_band_a_curve_when_a_level_has_fewer_runs():
    rows = frame(6)
    text, band = drawn(rows[(rows.level < 4) | (rows.repeat < 3)])
    assert "band: lowest to highest of 3" in text and band == (10, 15)


def test_ticks_are_levels_and_have_room():
    _, ax = plots.figure()
    plots.levels(ax, [1, 2, 3, 7, 8, 9, 10, 16])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["16", "10", "8", "3", "2", "1"]


def test_one_run_has_no_band():
    text, band = drawn(frame(1))
    assert "band" not in text and band is None
    assert "points are single runs" in text and "median" not in text


def test_the_caption_names_model_machine_and_a_warning():
    rows = frame(3)
    rows.loc[0, "warnings"] = "unstable: others use 50 % of the CPU; unstable: drift: -7.1%"
    rows.loc[1, "warnings"] = "unstable: others use 61 % of the CPU"
    rows.loc[8, ["status", "warnings"]] = ["oom", "unstable: a failed run's own"]
    text, _ = drawn(rows)
    assert text.startswith("a card\ngpt2 fp32; band: lowest to highest of 2; points are runs")
    assert "warning on 2 of 8 runs: unstable: others use 50 % of the CPU" in text
    assert "failed run's own" not in text and "left out: 1 runs, oom" in text


def test_long_captions_are_wrapped():
    text, _ = drawn(frame(3, warnings="unstable: " + "why and " * 40))
    assert max(map(len, text.splitlines())) <= plots.CAPTION_COLUMNS


def test_a_simulated_figure_names_no_machine():
    fig, _ = plots.figure()
    plots.caption(fig, note="made up", origin="simulated, on no machine")
    assert fig.get_supxlabel() == "simulated, on no machine\nmade up"


def test_a_caption_says_only_what_was_drawn():
    fig, ax = plots.figure()
    plots.bars(ax, ["a"], [[1.0, 2.0]], "s")
    plots.caption(fig, frame(3))
    assert "bars are medians, ticks the runs" in fig.get_supxlabel()
    assert "points" not in fig.get_supxlabel()


def test_bars_of_runs_may_have_the_requests_as_ticks():
    fig, ax = plots.figure()
    plots.bars(ax, ["a"], [[1.0, 3.0]], "s", [[1.0, 1.0, 1.0, 9.0]], "the requests")
    plots.caption(fig, frame(3))
    assert ax.patches[0].get_width() == 2 and list(ax.lines[0].get_xdata()) == [1, 1, 1, 9]
    assert "bars are medians, ticks the requests" in fig.get_supxlabel()


def test_impossible_published_rows_are_crossed_and_rows_without_a_value_left_out():
    drawn = {}
    for y in ("output_tokens_per_s", "times_one"):
        _, ax = plots.figure()
        plots.published_groups(ax, "batch", y)
        drawn[y] = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    yi, wrong = "published: RTX 4090, Yi-6B-Chat, WSL2", "impossible: too fast for its tokens"
    assert drawn["output_tokens_per_s"][wrong] == [1, 2, 3, 4, 5, 6, 10, 10]  # once Yi-34B
    assert yi in drawn["output_tokens_per_s"] and yi not in drawn["times_one"]
    assert drawn["times_one"][wrong] == [10]
    _, ax = plots.figure()
    plots.published_groups(ax, "coroutine", "times_one")
    assert wrong not in [line.get_label() for line in ax.lines]


def test_a_strategy_has_its_colour_and_marker_in_every_figure():
    looks = set()
    for name in ("batch", "threads", "batch"):
        _, ax = plots.figure()
        plots.curve(ax, frame(3, strategy=name), "level", "y", "here")
        looks.add((name, ax.lines[-1].get_color(), ax.lines[-1].get_marker()))
    assert len(looks) == 2 and len({color for _, color, _ in looks}) == 2
    _, ax = plots.figure()
    for nth in (0, 1):
        plots.curve(ax, frame(3, strategy="threads"), "level", "y", str(nth), nth=nth)
    usual, other = (line for line in ax.lines if line.get_label() in "01")
    assert usual.get_color() == other.get_color()
    assert usual.get_linestyle() != other.get_linestyle()
