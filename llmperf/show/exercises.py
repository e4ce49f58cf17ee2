"""Exercises: the answers are in `exercises.yaml`, the solutions in `notebooks/solutions.md`."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import yaml
from transformers import DynamicCache

from llmperf import decoding
from llmperf.decoding import GREEDY, LOOPS, Request
from llmperf.machine.rates import seconds_of, waiter
from llmperf.models import Model, with_cache

REL = 0.02  # how far a number may be off, unless the exercise says


@cache
def exercises() -> Mapping[str, Mapping]:
    """Name → its `answer` or `cases`, `hint` and `rel`, as `exercises.yaml` has them."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def check(name: str, answer: object) -> None:
    """Print whether `answer`, a value or a function, is right; after a wrong one a hint.

    A function is called with the arguments of each case. Raises ValueError for an unknown name.
    """
    if name not in exercises():
        raise ValueError(f"there is no exercise {name!r}: choose {', '.join(exercises())}")
    exercise = exercises()[name]
    if answer is None:
        said = "write your answer above, then run this cell again."
    elif callable(answer) and "cases" in exercise:
        said = _check_function(exercise, answer)
    elif "cases" in exercise:
        said = "give the function itself, without calling it"
    elif callable(answer):
        said = "give the value itself"
    else:
        wrong = _wrong(answer, exercise["answer"], exercise.get("rel", REL))
        said = f"{wrong}. Hint: {exercise['hint']}" if wrong else "right."
    print(f"{name}: {said}")


def _check_function(exercise: Mapping, function: Callable) -> str:
    name = getattr(function, "__name__", "your function")
    for i, case in enumerate(exercise["cases"]):
        call = f"{name}({', '.join(map(repr, case['of']))})"
        try:
            found = function(*deepcopy(case["of"]))  # it may change a list that it is given
        except Exception as error:  # of the reader's code, of any kind
            return f"{call} raises {type(error).__name__}: {error}. Hint: {exercise['hint']}"
        if found is None and not i:
            return "write your code above, then run this cell again."
        if wrong := _wrong(found, case["gives"], exercise.get("rel", REL)):
            text = f"{call} gives {found!r:.60}, {wrong}; right is {case['gives']}"
            return f"{text}. Hint: {exercise['hint']}"
    return f"right, in all {len(exercise['cases'])} cases."


def _wrong(found: object, right: object, rel: float) -> str:
    """In which way `found` is wrong; empty where it is right."""
    if isinstance(right, str):
        return "" if str(found).strip().lower() == right else "not the right word"
    if isinstance(right, Sequence):
        with suppress(TypeError):  # no sequence, or one number in the form of a tensor
            if not isinstance(found, str) and len(found) == len(right):
                return next(
                    filter(None, (_wrong(found[i], x, rel) for i, x in enumerate(right))), ""
                )
        return f"no list of {len(right)} numbers"
    try:
        value = math.nan if isinstance(found, str) else float(found)
    except (TypeError, ValueError, RuntimeError):  # the last is torch's, for several numbers
        value = math.nan
    if math.isnan(value):
        return "no single number: give one, without its unit"
    if math.isclose(value, right, rel_tol=rel):
        return ""
    side = "high" if value > right else "low"
    return f"{'a little' if right and 0.5 < value / right < 2 else 'much'} too {side}"


def race(name: str, generate: Callable, model: Model, prompt: Sequence[int], new: int) -> None:
    """Print whether the reader's `generate(step, ids, new)` lists the `new` greedy tokens of the
    loop `recompute` or `cached`, and the tokens/s of all three. ids: (1, tokens).
    `step(ids, cache)` gives logits (1, tokens, vocabulary) and the cache; it is None at first."""
    ids = torch.tensor([prompt], device=model.torch_device)
    asked = [Request(0, tuple(prompt), new)]

    def step(ids: torch.Tensor, cache: DynamicCache | None):
        if cache is None:
            cache = DynamicCache(config=model.module.config)
        return model.module(input_ids=ids, **with_cache(model.module, cache)).logits, cache

    def loop(name: str) -> list[int]:
        return [row[0] for row in decoding.decode(model, asked, loop=name, sampling=GREEDY)]

    ways = {"yours": lambda: generate(step, ids, new)}
    ways |= {word: lambda word=word: loop(word) for word in LOOPS[:2]}
    with torch.no_grad():
        if (found := generate(step, ids, new)) is None:
            said = "write your code above, then run this cell again."
        elif (tokens := [int(x) for x in found]) not in (right := [*map(loop, LOOPS[:2])]):
            said = f"the tokens differ: {tokens!r:.60} instead of {right[1]!r:.60}"
        else:
            took = {way: min(seconds_of(run, waiter(model.device), 3)) for way, run in ways.items()}
            speeds = [f"{way} {new / seconds:.0f}" for way, seconds in took.items()]
            said = f"right. Tokens/s: {', '.join(speeds)}."
    print(f"{name}: {said}")
