"""Sentences turn with the numbers they are printed from."""

import pandas as pd
import pytest

from llmperf.measure import Record
from llmperf.show import sentences


def frame(**levels):
    """A row a round: `frame(a=[1, 2], b=[3, 4])`."""
    rows = [
        {"label": label, "repeat": i, "status": "ok", "output_tokens_per_s": float(v)}
        for label, values in levels.items()
        for i, v in enumerate(values)
    ]
    return pd.DataFrame(rows)


def ratio(rows, **how):
    return sentences.ratio_sentence(rows, "output_tokens_per_s", "a", "b", **how)


FAST, SLOW, MIXED = [40, 42, 41, 43, 40], [10, 10, 11, 10, 10], [9, 12, 10, 11, 9]


def test_the_ratio_sentence_turns_with_the_numbers():
    assert ratio(frame(a=FAST, b=SLOW)).startswith("a: 4 (3.")
    assert ratio(frame(a=FAST, b=SLOW)).endswith("times the tokens/s of b, more.")
    assert ratio(frame(a=SLOW, b=FAST)).endswith(", less.")
    assert ratio(frame(a=SLOW, b=MIXED)).endswith(", cannot tell whether more or less.")


def test_the_ratio_may_be_held_against_another_number():
    words = {"more": "over", "less": "under", "unclear": "about that"}
    assert ratio(frame(a=FAST, b=SLOW), than=2, **words).endswith(", over.")
    assert ratio(frame(a=FAST, b=SLOW), than=10, **words).endswith(", under.")
    assert ratio(frame(a=FAST, b=SLOW), than=4, **words).endswith(", about that.")


def test_rounds_are_paired_so_that_what_slows_both_cancels():
    noise = [1, 3, 0.5, 2, 1.4, 0.7]
    rows = frame(a=[11 * x for x in noise], b=[10 * x for x in noise])
    assert ratio(rows).endswith(", more.")
    shuffled = rows.sample(frac=1, random_state=1)
    assert ratio(shuffled) == ratio(rows)


def test_too_few_rounds_and_missing_runs_say_so():
    assert "cannot tell: 2 sample(s)" in ratio(frame(a=[4, 4], b=[1, 1]))
    assert ratio(frame(a=FAST)) == "not measured: the tokens/s of b."
    assert ratio(frame(a=FAST, b=SLOW).assign(status="oom")).startswith("not measured")
    assert ratio(pd.DataFrame()).startswith("not measured")
    unknown = sentences.ratio_sentence(frame(a=FAST, b=SLOW), "ttft_ms", "a", "b")
    assert unknown.startswith("not measured")


def test_sides_are_chosen_by_columns_too():
    rows = frame(a=FAST, b=SLOW).assign(
        loop=lambda t: t.label.map({"a": "compiled", "b": "cached"})
    )
    how = {"names": ("compiled", "cached")}
    said = sentences.ratio_sentence(
        rows, "output_tokens_per_s", {"loop": "compiled"}, {"loop": "cached"}, **how
    )
    assert said.startswith("compiled: 4 (") and "of cached, more" in said
    other = sentences.ratio_sentence(rows, "output_tokens_per_s", {"none": 1}, "b")
    assert other.startswith("not measured: the tokens/s of {'none': 1}")


@pytest.mark.parametrize(
    ("samples", "end"),
    [
        (0.9, "0.9, high."),
        (0.1, "0.1, low."),
        ([0.8, 0.9, 0.85, 0.87, 0.86], "high."),
        ([0.1, 0.2, 0.15, 0.17, 0.16], "low."),
        ([0.1, 0.9, 0.5, 0.4, 0.7], "cannot tell which side of 0.5."),
        ([0.9], "an interval at 95% needs 5."),
        ([0.8, 0.9], "an interval at 95% needs 5."),
        (None, "not measured."),
        ([], "not measured."),
        (float("nan"), "not measured."),
    ],
)
def test_a_value_sentence_turns_with_the_numbers(samples, end):
    said = sentences.value_sentence("x", samples, 0.5, above="high", below="low")
    assert said.startswith("x: ") and said.endswith(end)


def test_the_agreement_sentence_names_who_differs():
    rows = pd.DataFrame({"label": ["a", "b"], "agree": [4, 4], "compared": [4, 4]})
    assert "in all 8 requests" in sentences.agreement_sentence(rows)
    said = sentences.agreement_sentence(rows.assign(agree=[4, 3]))
    assert "7 of 8" in said and said.endswith("not in b.")
    assert "not compared" in sentences.agreement_sentence(rows[["label"]])


def test_the_loops_sentence_says_what_ran_instead():
    def record(asked, **notes):
        return Record("x", {"loop": asked}, 0, trace={"notes": notes})

    both = [record(loop, loop=loop) for loop in ("compiled", "cached")]
    assert sentences.loops_sentence(both) == "Loops: compiled ran as asked; cached ran as asked."
    fell = record("compiled", loop="cached", fallback="no compiler")
    assert sentences.loops_sentence([fell]) == "Loops: compiled ran as cached (no compiler)."
    assert "not noted" in sentences.loops_sentence([])


@pytest.mark.parametrize(
    ("guess", "end"),
    [
        (6.5, "Your guess, 6.5 times, was right."),
        (8, "Your guess, 8 times, was too high."),
        (4, "Your guess, 4 times, was too low."),
        (2, "Your guess, 2 times, was much too low."),
        (16, "Your guess, 16 times, was much too high."),
        (None, "No guess was written down above."),
        ("ten", "Your guess 'ten' is no number: write it without its unit."),
        ([1, 2], "Your guess [1, 2] is no number: write it without its unit."),
        (True, "Your guess True is no number: write it without its unit."),
    ],
)
def test_a_guess_is_compared_in_words(guess, end):
    said = sentences.guess_sentence("Batch of 16", guess, 6.25, " times")
    assert said == f"Batch of 16: 6.25 times. {end}"


@pytest.mark.parametrize("measured", [None, float("nan")])
def test_a_guess_of_what_was_not_measured(measured):
    assert sentences.guess_sentence("Threads", 2, measured) == "Threads: not measured."


def test_a_rate_that_held_in_a_short_run_is_judged_by_a_longer_one():
    lower = sentences.longer_load_sentence(10, 41, 301, 0.5)
    holds = sentences.longer_load_sentence(10, 41, 301, 0.95)
    assert "held for 41 requests (4.0 s" in lower and "301 requests (30.0 s" in lower
    assert "50% are in time" in lower and lower.endswith("that holds there is lower.")
    assert "95% are in time" in holds and holds.endswith("holds in the longer run too.")
