"""Checks for the notebooks' exercises."""

import math


def check(
    question: str, answer: float | str | None, expected: float | str, rel: float = 0.05
) -> None:
    """Print whether `answer` is right: a number within `rel` of `expected`, or the same word.

    None is an answer not yet given, so that a notebook runs through unanswered.
    """
    if answer is None:
        print(f"{question}: write your answer above, then run this cell again.")
    elif isinstance(expected, str):
        right = str(answer).strip().lower() == expected.lower()
        print(f"{question}: {'right.' if right else 'not yet. Think again.'}")
    elif math.isclose(float(answer), expected, rel_tol=rel):
        print(f"{question}: right, {expected:.4g}.")
    else:
        near = expected and 0.5 < float(answer) / expected < 2
        word = "a little" if near else "much"
        side = "high" if float(answer) > expected else "low"
        print(f"{question}: {word} too {side}. Think again.")
