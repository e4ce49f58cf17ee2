"""The report and the answer: the first screen, folded notebooks, and what a stranger may hide."""

import dataclasses
import html
import json
import re
import struct
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from nbformat import v4

from llmperf.measure import Record, Store
from llmperf.study import answer, report

STATE = SimpleNamespace(steps={"03-batch": {}}, done={}, profile="quick", started="today")
ENV = {"os": "Linux", "cpu_model": "AMD EPYC", "cores_logical": 2, "cores_allowed": 2,
       "cores_quota": None, "gpus": [], "packages": {"torch": "2.13.0"}}  # fmt: skip
PREDICTION = {"read_bytes_per_s": 29e9, "flops_per_s": 3.3e11, "bound_tpot_ms": 20.0,
              "limit": "bandwidth", "plausible": True}  # fmt: skip


def made_up(strategy, level, tokens_per_s, repeat=0, **more):
    condition = {"strategy": strategy, "level": level, "loop": "cached", "options": {},
                 "model": "gpt2", "dtype": "fp32", "weights": "trained", "device": "cpu",
                 "prompt_tokens": 8, "new_tokens": 8}  # fmt: skip
    seconds = level * 8 / tokens_per_s
    metrics = {
        "duration_s": seconds,
        "output_tokens": level * 8,
        "requests_ok": level,
        "output_tokens_per_s": tokens_per_s,
        **{f"{name}_ms": {"median": seconds * 1e3} for name in ("ttft", "tpot", "e2el")},
    }
    more = {"environment": ENV, "metrics": metrics, "prediction": PREDICTION, **more}
    return Record("03-batch", condition, repeat, **more)  # fmt: skip


RUNS = [made_up("batch", n, 10 * n**0.5 * f, i) for n in (1, 4, 10)
        for i, f in enumerate((0.99, 1, 1.01, 1.02, 0.98))]  # fmt: skip
RUNS += [made_up("sequential", 4, 10, i) for i in range(5)]


@pytest.fixture
def folder(tmp_path):
    text = "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in RUNS)
    (tmp_path / "records.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def write_notebook(folder, *cells):
    nbformat.write(v4.new_notebook(cells=list(cells)), folder / "notebooks" / "03-batch.ipynb")


def outputs(*bundles):
    shown = [v4.new_output("display_data", data=bundle) for bundle in bundles]
    return v4.new_code_cell("secret_code()", outputs=shown)


def test_the_answer_has_every_number_from_records(folder):
    ceilings, one, best, memory, run, score = answer.of_run(answer.load(folder))
    assert ceilings == "This machine reads 29 GB/s and computes 0.33 TFLOP/s in fp32."
    assert one.startswith("One request gets 10 tokens/s (gpt2 in fp32, cached); after its first")
    assert one.endswith("token 1.25, 2% of the 50 that bandwidth allows.")  # a made-up TPOT
    assert "31.6 tokens/s" in best
    assert "one pass over the weights serves 10 requests and takes " in best
    assert memory.startswith("Memory was not measured here: notebook 07 does. By arithmetic the")
    assert "llama-3.1-8b in int4 take 5.1 GiB, and one request would get at most 6.5" in memory
    assert run.startswith("At 1 request/s: ") and " of 64 tokens takes" in run
    assert re.search(r"Of 17 published findings", score)


def test_a_step_faster_than_its_bound_is_explained():
    words = {"model": "gpt2", "precision": "fp32", "loop": "cached", "limit": "launches"}
    times = {"output_tokens_per_s": 90.0, "tpot_ms": 10.0, "bound_tpot_ms": 12.5}
    alone = pd.Series(words | times)
    said = answer._single(alone)
    end = "100, more than the 80 that bandwidth allowed as the runs began: the speed of this"
    assert said.endswith(f"{end} machine changes.")
    alone["bound_tpot_ms"] = float("nan")
    assert answer._single(alone).endswith("after its first token 100.")


def test_the_memory_is_that_of_notebook_07(folder):
    store = Store(folder / "records.jsonl")
    for level, peak in ((1, 1.04), (8, 1.5)):
        held = {"rss": {"unit": "bytes", "max": peak * 2**30, "status": "ok"}}
        weights = {**PREDICTION, "weights_bytes": 2**29}
        run = made_up("batch", level, 10, memory=held, prediction=weights)
        store.append(dataclasses.replace(run, experiment="07-vram"))
    said = "Memory in fp32: one request 1.04 GiB (0.50 of it weights), 8 together 1.50. By"
    assert answer.of_run(answer.load(folder))[3].startswith(said)


def test_the_answer_says_when_other_programs_ran_beside_many_runs(folder):
    busy = "unstable: other processes use 67 % of the CPU"
    store = Store(folder / "records.jsonl")
    for i in range(3):
        store.append(made_up("batch", 2, 15, i, warnings=[busy]))
    assert "Other programs" not in answer.of_run(answer.load(folder))[0]  # 3 of 23 runs
    for i in range(3, 6):
        store.append(made_up("batch", 2, 15, i, warnings=[busy]))
    said = "Other programs ran at the same time (other processes use 67 % of the CPU): measure"
    assert said in answer.of_run(answer.load(folder))[0]


def test_a_batch_is_never_called_one_request(folder):
    path = folder / "records.jsonl"
    batches = [line for line in path.read_text().splitlines(True) if '"level": 10' in line]
    path.write_text("".join(batches), encoding="utf-8")
    found = answer.of_run(answer.load(folder))
    assert found[0].startswith("This machine reads") and "was not measured here" in found[1]
    assert "31.6 tokens/s" in found[2] and "times one request" not in found[2]


def test_the_answer_does_not_name_the_folder_of_a_local_model(folder):
    path = folder / "records.jsonl"
    path.write_text(path.read_text().replace('"gpt2"', '"/home/ann/tuned"'), encoding="utf-8")
    found = answer.of_run(answer.load(folder))
    assert "(<a local model> in fp32" in found[1] and not re.search("ann|tuned", " ".join(found))


def test_the_card_is_an_image_and_a_page_of_the_same_size(folder):
    run = answer.load(folder)
    found = answer.of_run(run)
    png, page = answer.write_card(folder, run, found)
    assert struct.unpack(">II", png.read_bytes()[16:24]) == (1200, 630)
    text = page.read_text(encoding="utf-8")
    assert "width:1200px;height:630px" in text
    assert all(html.escape(line) in text for line in found)


@pytest.mark.parametrize("times", [1, 2])
def test_long_lines_get_smaller_letters_so_that_the_card_holds_them(folder, times):
    lines = [" ".join([line] * times) for line in answer.of_run(answer.load(folder))]
    fitted = answer._fitted(lines)
    assert sum(height for *_, height in fitted) <= 0.93
    assert [text for _, text, *_ in fitted] == lines and all(points >= 7 for points, *_ in fitted)


def test_a_name_with_dollars_is_no_formula(folder):
    path = folder / "records.jsonl"
    odd = path.read_text().replace("AMD EPYC", r"A $\\frac{ B$").replace('"batch"', r'"$\\frac{$"')
    path.write_text(odd, encoding="utf-8")
    page = report.write(folder, STATE).read_text(encoding="utf-8")
    assert "Nothing to judge yet" not in page and r"$\frac{ B$" in page


def test_a_failure_that_was_measured_again_does_not_count(tmp_path):
    failed = made_up("batch", 4, 20, 9, kind="failed", status="error", reason="killed", metrics={})
    assert answer.failures([*RUNS, failed]) == [failed]
    store = Store(tmp_path / "records.jsonl")
    for r in (failed, made_up("batch", 4, 20, 9), dataclasses.replace(failed, repeat=10)):
        store.append(r)
    assert [r.repeat for r in answer.failures(store.read())] == [10]
    refused = made_up("batch", 99, 1, status="skipped", reason="refused beforehand", metrics={})
    assert answer.failures([*RUNS, refused]) == []


def test_the_report_opens_with_the_card_one_figure_and_the_findings(folder):
    page = report.write(folder, STATE).read_text(encoding="utf-8")
    first = page[: page.index("<nav>")]
    assert first.count("data:image/png;base64,") == 2 and "Of its 17 findings" in first
    assert "AMD EPYC, 2 cores, Linux" in first
    cells = re.findall(r"<td[^>]*>(.*?)</td>", first)
    assert len(cells) == 17 * 4 and all(cells)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)


def test_a_notebook_is_folded_with_its_question_and_every_figure_has_a_text(folder):
    picture = outputs({"image/png": "aGk=", "text/plain": "<Figure>"})
    prose = "# Batch\n\n**Question.** How many\nrequests?\n\nMore."
    prose += "<!-- code --> See below.<!-- /code -->"
    write_notebook(folder, v4.new_markdown_cell(prose), v4.new_markdown_cell("## Time"), picture)
    page = report.write(folder, STATE).read_text(encoding="utf-8")
    assert "<details><summary><b>03-batch</b>" in page and " How many requests?" in page
    assert 'alt="Figure: Time"' in page and "No description" not in page
    assert "secret_code" not in page and "See below" not in page and "More." in page


def test_every_link_leads_into_the_report_or_to_the_web(folder):
    prose = "[a](03-batch.ipynb) [b](05-threads.ipynb) [c](glossary.md) [d](../x/README.md) "
    prose += "[e](https://a.org/#b) [f](glossary.md#time)\n\n## Time"
    write_notebook(folder, v4.new_markdown_cell(prose))
    page = report.write(folder, STATE).read_text(encoding="utf-8")
    section = page[page.index("</nav>") :]
    targets = [re.search(rf'<a[^>]*href="([^"]*)"[^>]*>{x}</a>', section) for x in "abcdef"]
    assert [found and found[1] for found in targets] == [
        "#03-batch", None, "#glossary", None, "https://a.org/#b", "#glossary"
    ]  # fmt: skip
    inside = set(re.findall(r'href="#([^"]*)"', page))
    assert inside and inside <= set(re.findall(r' id="([^"]*)"', page))
    assert "Time to the first token." in section


HOSTILE = [
    {"text/html": "<script>alert(1)</script><b onclick='x()'>bold</b>"},
    {"text/html": "<img src=x onerror=alert(1)><iframe src='http://evil'></iframe>"},
    {"text/html": "<style>body{background:url(http://evil)}</style><table><tr><td>1</td></tr>"},
    {"application/javascript": "alert(1)"},
    {"text/markdown": "<svg onload=alert(1)></svg> [x](javascript:alert(1))"},
]


def test_nothing_of_a_hostile_notebook_runs_or_is_fetched(folder):
    write_notebook(folder, v4.new_markdown_cell("<script>alert(1)</script> ok"), outputs(*HOSTILE))
    done = {"03-batch": "<script>alert(1)</script>"}
    state = SimpleNamespace(steps={"03-batch": {}}, done=done, profile="<b>", started="<i>")
    page = report.write(folder, state).read_text(encoding="utf-8")
    body = page[page.index("<nav>") :]
    assert not re.search(r"<(script|iframe|style|svg|object)\b|\son\w+=|=.javascript:", body, re.I)
    assert "evil" not in body and "default-src 'none'" in page
    assert "<td>1</td>" in body and "bold" in body, "tables and text stay"


def test_a_damaged_notebook_and_an_empty_run_are_said(folder):
    (folder / "notebooks" / "03-batch.ipynb").write_text("{", encoding="utf-8")
    assert "It cannot be read" in report.write(folder, STATE).read_text(encoding="utf-8")
    (folder / "records.jsonl").write_text("", encoding="utf-8")
    assert "Nothing to judge yet" in report.write(folder, STATE).read_text(encoding="utf-8")
