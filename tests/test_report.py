"""The report's first screen: the answer, the machine, one figure, the scorecard."""

import dataclasses
import html
import json
import re
from types import SimpleNamespace

import pytest

from llmperf import findings
from llmperf.measure.records import Record
from llmperf.show import overview
from llmperf.study import report

STATE = SimpleNamespace(steps={"03-batch": {}}, done={}, profile="quick", started="today")
ENV = {"os": "Linux", "cpu_model": "AMD EPYC", "cores_logical": 2, "cores_allowed": 2,
       "cores_quota": None, "gpus": [], "packages": {"torch": "2.13.0"}}  # fmt: skip


def made_up(strategy, level, tokens_per_s, repeat=0, **more):
    condition = {"strategy": strategy, "level": level, "loop": "cached", "options": {},
                 "model": "gpt2", "dtype": "fp32", "weights": "trained", "device": "cpu",
                 "prompt_tokens": 8, "new_tokens": 8}  # fmt: skip
    seconds = level * 8 / tokens_per_s
    metrics = {"duration_s": seconds, "output_tokens": level * 8, "requests_ok": level,
               "output_tokens_per_s": tokens_per_s,
               "e2el_ms": {"median": seconds * 1e3}}  # fmt: skip
    return Record("03-batch", condition, repeat, environment=ENV, metrics=metrics, **more)


@pytest.fixture
def page(tmp_path):
    rows = [made_up("batch", n, 10 * n**0.5 * f, i) for n in (1, 4, 10)
            for i, f in enumerate((0.99, 1, 1.01, 1.02, 0.98))]  # fmt: skip
    rows += [made_up("sequential", 4, 10, i) for i in range(5)]
    text = "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in rows)
    (tmp_path / "records.jsonl").write_text(text, encoding="utf-8")
    return report.write(tmp_path, STATE).read_text(encoding="utf-8")


def test_it_opens_with_the_answer(page):
    first = page[: page.index("<nav>")]
    assert "Batches of 10, fp32: the most tokens here, 31.6 tokens/s, 3.2 times one" in first
    assert "AMD EPYC, 2 cores, Linux" in first and "data:image/png;base64," in first
    assert first.count("<tr><td>") == 17 and "Of its 17 findings" in first
    for finding in findings.claims():
        assert html.escape(finding.claim) in first


def test_no_row_of_the_scorecard_is_empty_and_nothing_is_fetched(page):
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert len(cells) == 68 and all(cells)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)


def test_an_empty_run_says_so(tmp_path):
    page = report.write(tmp_path, STATE).read_text(encoding="utf-8")
    assert "Nothing to judge yet" in page


def test_the_figure_takes_one_variant_of_one_model():
    rows = [made_up("batch", n, 10 * n, i) for n in (1, 2) for i in range(3)]
    other = made_up("batch", 4, 99)
    other.condition.update(model="yi-6b-chat")
    varied = made_up("batch", 2, 77)
    varied.condition.update(options={"batch_size": 1})
    frame = overview.strategies_frame([*rows, other, varied])
    assert len(frame) == 6 and set(frame.output_tokens_per_s) == {10, 20}
    assert overview.figure([]) is None
