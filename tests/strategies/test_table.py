"""The table of strategies: no other file knows one by name, and one file adds one."""

import ast
from pathlib import Path

import pytest

import llmperf
from llmperf import strategies
from llmperf.decoding import requests as workload
from llmperf.measure import Condition, measure
from llmperf.measure.records import Store
from llmperf.strategies import STRATEGIES

PACKAGE = Path(llmperf.__file__).parent


def named(node: ast.AST) -> bool:
    """Whether a side of a comparison is the name of a strategy, or holds one."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(named, node.elts))
    return isinstance(node, ast.Constant) and node.value in STRATEGIES


def comparisons(source: str) -> int:
    """How many comparisons name a strategy."""
    tree = ast.parse(source)
    found = [[n.left, *n.comparators] for n in ast.walk(tree) if isinstance(n, ast.Compare)]
    found += [[n.value] for n in ast.walk(tree) if isinstance(n, ast.MatchValue)]
    return sum(any(map(named, sides)) for sides in found)


def test_only_a_strategys_own_file_names_it_in_a_comparison():
    own = {PACKAGE / "strategies" / f"{name}.py" for name in STRATEGIES}
    files = [f for f in sorted(PACKAGE.rglob("*.py")) if f not in own]
    names = {f: f.relative_to(PACKAGE).as_posix() for f in files}
    found = {names[f]: comparisons(f.read_text(encoding="utf-8")) for f in files}
    assert not {f: n for f, n in found.items() if n}


@pytest.mark.parametrize(
    "source",
    ['x == "threads"', 'x in ("batch", "other")', 'match x:\n    case "peer":\n        pass'],
)
def test_the_check_sees_a_comparison(source):
    assert comparisons(source) == 1


def test_every_strategy_can_be_described():
    for name, strategy in STRATEGIES.items():
        assert strategy.name == name and len(strategy.words(4, {})) > 5
        assert strategy.rows_per_step(4, {}) in (1, 4)
        assert strategy.processes(4, {}) in (0, 1, 4) and strategy.threads(4, {}) in (1, 4)
        assert all(strategy.options[k][0](value) for k, value in strategy.defaults.items())


@pytest.mark.parametrize(
    ("name", "level", "options", "words"),
    [
        ("batch", 16, {}, "batches of 16"),
        ("batch", 16, {"batch_size": 4}, "batches of 4 (16 requests)"),
        ("threads", 40, {"workers": 2, "intra_op": 1}, "2 threads (40 requests, intra_op 1)"),
        ("threads", 1, {}, "1 thread"),
        ("processes", 3, {"workers": 1, "weights": "own"}, "1 process (3 requests, weights own)"),
        ("coroutine", 5, {"variant": "yielding"}, "5 coroutines (variant yielding)"),
        ("dynamic", 40, {"max_batch": 8}, "dynamic batching (max_batch 8)"),
    ],
)
def test_the_words_say_how_many_run_together(name, level, options, words):
    assert STRATEGIES[name].words(level, options) == words


ADDED = '''
"""Requests in reverse order of arrival."""

from llmperf import decoding
from llmperf.decoding.trace import Recorder
from llmperf.strategies.strategy import Strategy, in_words


def run(model, workload, options):
    recorder = Recorder(workload.requests)
    for request in reversed(workload.requests):
        decoding.run(model, [request], recorder, sampling=workload.sampling)
    return recorder.trace()


STRATEGY = Strategy("reverse", run, in_words("the last request first"), style=5)
'''


def test_a_strategy_is_added_in_one_file_of_under_25_lines(tiny, tmp_path, monkeypatch):
    assert ADDED.count("\n") < 25
    file: dict = {}
    exec(ADDED, file)
    monkeypatch.setitem(STRATEGIES, "reverse", file["STRATEGY"])
    points = [Condition(tiny, name, 2, prompt_tokens=4, new_tokens=3) for name in ("reverse",)]
    results = measure("x", points, Store(tmp_path / "r.jsonl"), repeats=1)
    (row,) = results.frame.to_dict("records")
    assert row["status"] == "ok" and row["agree"] == row["compared"] == 2
    with pytest.raises(ValueError, match="reverse has no option 'workers': its options are none"):
        Condition(tiny, "reverse", 2, options={"workers": 2})


def test_an_unknown_strategy_is_one_sentence(tiny):
    with pytest.raises(ValueError, match="unknown strategy 'fast': choose sequential, batch"):
        strategies.check("fast", tiny)


def test_requests_are_the_same_for_every_strategy(tiny):
    work = workload.build(tiny.tokenizer, 3, 5, 4)
    assert Condition(tiny, "batch", 3, prompt_tokens=5, new_tokens=4).workload.requests == (
        work.requests
    )
