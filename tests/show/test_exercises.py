"""Exercises: right and wrong answers, hidden cases, and the solutions that come with the kit."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch

from llmperf import ROOT, models
from llmperf.decoding.sampling import Sampling, filtered_logits
from llmperf.predict import kv_bytes
from llmperf.show import check, race
from llmperf.show.exercises import exercises

SOLUTION = re.compile(r"<summary>(.*?)</summary>.*?```python\n(.*?)```", re.S)
SOLUTIONS = dict(SOLUTION.findall((ROOT / "notebooks" / "solutions.md").read_text("utf-8")))


def asked() -> dict[str, str]:
    """Exercise → the cell of the notebook that asks for it."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            for name in re.findall(r'^(?:check|race)\("(.*?)", \w+', source, re.M):
                assert name not in found, f"{name} is asked twice"
                found[name] = source
    return found


def test_every_exercise_is_asked_once_and_has_a_solution():
    race_alone = {"loop with a KV cache"}
    assert set(asked()) == set(SOLUTIONS) == set(exercises()) | race_alone


@pytest.mark.parametrize("name", list(exercises()))
def test_the_solution_passes_and_nothing_in_the_cell_tells_it(name, capsys):
    cell = asked()[name]
    answers = re.findall(rf'^check\("{re.escape(name)}", (\w+)\)$', cell, re.M)
    known: dict = {}
    exec(SOLUTIONS[name], known)  # noqa: S102 - a solution of the kit
    check(name, known[answers[0]])
    assert f"{name}: right" in capsys.readouterr().out
    empty: dict = {"check": check}
    exec(cell, empty)  # noqa: S102 - the cell as it is shipped: nothing is answered
    assert f"{name}: write your " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (49, "right."),
        (60, "a little too high"),
        (lambda: 50, "give the value itself"),
        (5, "much too low"),
        ("50 ms", "no single number"),
        ([], "no single number"),
        (pd.Series([3.0, 4.0]), "no single number"),
        (torch.ones(2), "no single number"),
        (np.float32(50), "right."),
    ],
)
def test_a_value_is_right_or_gets_a_hint_in_one_line(answer, said, capsys):
    check("TPOT", answer)
    out = capsys.readouterr().out
    hinted = "right." not in out and "itself" not in out
    assert said in out and out.count("\n") == 1 and ("Hint: " in out) == hinted


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda n: 1 - 2 * 0.5**n, "right, in all 3 cases"),
        (lambda n: 0.9375, "(8) gives 0.9375, a little too low; right is 0.99219. Hint:"),
        (lambda n: 1 / 0, "(5) raises ZeroDivisionError: division by zero. Hint:"),
        (lambda n: "x", "gives 'x', no single number"),
        (lambda n: None, "write your code above"),
        (lambda n: 0.9375 if n == 5 else None, "(8) gives None, no single number"),
        (0.9375, "give the function itself, without calling it"),
    ],
)
def test_a_function_is_tried_with_hidden_cases(function, said, capsys):
    check("coverage of the range", function)
    assert said in capsys.readouterr().out


def test_a_list_is_checked_number_by_number(capsys):
    check("ends when they take turns", lambda n, tokens, s: [9.925, 9.95, 9.975, 99.0])
    check("ends when they take turns", lambda n, tokens, s: 9.9625)
    check("scheduler", lambda *_: " Start ")
    high, none, word = capsys.readouterr().out.splitlines()
    assert "too high" in high and "no list of 4 numbers" in none
    assert "gives ' Start ', not the right word; right is wait" in word


def test_a_function_may_change_the_list_that_it_is_given(capsys):
    def top_p_count(probabilities, p):
        probabilities.sort()
        kept = 0
        while p > 0:
            p -= probabilities.pop()
            kept += 1
        return kept

    check("tokens that top-p keeps", top_p_count)
    check("tokens that top-p keeps", top_p_count)
    assert capsys.readouterr().out.count("right, in all 4 cases") == 2


def test_an_unknown_exercise_names_the_known_ones():
    with pytest.raises(ValueError, match="there is no exercise 'x': choose available, "):
        check("x", 1)


def test_hidden_cases_agree_with_the_package():
    for case in exercises()["tokens that top-p keeps"]["cases"]:
        probabilities, p = case["of"]
        logits = torch.tensor([probabilities], dtype=torch.float64).log()
        assert filtered_logits(logits, Sampling(top_p=p)).isfinite().sum() == case["gives"]
    (_, _, _, *yi), gives = exercises()["cache bytes"]["cases"][0].values()
    assert kv_bytes(models.shape_of("yi-6b-chat"), *yi[:2], "fp16") == gives


def test_the_race_compares_tokens_and_speed(tmp_path, capsys):
    model, solution = models.load(str(tiny_models.save_llama(tmp_path))), {}
    exec(SOLUTIONS["loop with a KV cache"], solution)  # noqa: S102
    race("loop", solution["generate"], model, (1, 2, 3), 4)
    race("loop", lambda step, ids, new: [0] * new, model, (1, 2, 3), 4)
    race("loop", lambda step, ids, new: None, model, (1, 2, 3), 4)
    right, wrong, none = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"loop: right. Tokens/s: yours \d+, recompute \d+, cached \d+\.", right)
    assert wrong.startswith("loop: the tokens differ: [0, 0, 0, 0] instead of [")
    assert none == "loop: write your code above, then run this cell again."
