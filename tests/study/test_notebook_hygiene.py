"""Every notebook keeps the house rules, and every rule finds its fault in a made-up notebook."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import clean_notebooks
import commit_run
import nbformat
import notebook_rules as rules
import pytest
from nbformat import v4

from llmperf import REFERENCE, findings
from llmperf.findings.runs import shipped_runs
from llmperf.measure import Record
from llmperf.study import profile

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
PNG = {"image/png": "aGk/tmp/+/home/", "text/plain": "<Figure>"}


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook as it stands in the file: nbformat.read would mend some of the faults."""
    return v4.reads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_every_notebook_keeps_the_rule(rule):
    assert [f"{path.name}: {fault}" for path in NOTEBOOKS for fault in rule(read(path))] == []


def test_names_are_numbered_words_without_doubles():
    assert rules.misnamed([path.name for path in NOTEBOOKS]) == []


def test_every_notebook_is_clean():
    dirty = [path.name for path in NOTEBOOKS if not clean_notebooks.clean(path, check=True)]
    assert dirty == [], "run: python tests/clean_notebooks.py FILES"


def test_notebooks_and_shipped_records_come_from_one_run():
    marks = [dict(read(path).metadata.get("llmperf", {})) for path in NOTEBOOKS]
    assert all(mark == marks[0] for mark in marks), "run: python tests/commit_run.py RUN"
    shipped = [p / "records.jsonl.gz" for p in shipped_runs()]
    assert marks[0] in [commit_run.stamp(p, marks[0].get("run")) for p in shipped]


def test_the_replay_of_the_readme_is_that_of_its_notebook():
    path = next(path for path in NOTEBOOKS if path.stem == commit_run.REPLAYED)
    assert (REFERENCE / "replay.svg").read_bytes() == commit_run.replay_of(read(path))


@pytest.mark.parametrize(("busy", "refused"), [(0, False), (1, False), (2, True)])
def test_a_study_of_a_busy_machine_is_no_reference(busy, refused):
    record = Record("03-batch", {"strategy": "batch"}, 0, metrics={"duration_s": 1.0})
    loud = replace(record, warnings=["unstable: other processes use 50 % of the CPU"])
    run = findings.Run("here", (loud,) * busy + (record,) * (20 - busy))
    with pytest.raises(ValueError, match="on a busy machine") if refused else nullcontext():
        commit_run.check_quiet(run)


def test_the_quick_profile_is_what_the_notebooks_do_by_themselves():
    plan = profile.plan(profile.load_profile("quick"), profile.notebooks())
    assert {stem: changed for stem, changed in plan.items() if changed} == {}


def executed() -> nbformat.NotebookNode:
    """As papermill leaves a notebook: with a cell of its own, and metadata of the run."""
    nb = made_up()
    nb.cells[2].outputs = [v4.new_output("execute_result", {"text/plain": "7"}, execution_count=2)]
    given = v4.new_code_cell("records = 'run/records.jsonl'")
    given.metadata.tags = ["injected-parameters"]
    nb.cells.insert(2, given)
    nb.metadata["papermill"] = {"duration": 3.0}
    return nb


def test_a_committed_notebook_has_the_outputs_and_the_mark_of_the_run():
    nb = commit_run.committed(executed(), made_up(), {"run": "2026-01-31 09:00"})
    assert [c.id for c in nb.cells] == [c.id for c in made_up().cells]
    assert nb.cells[2].outputs[0].data["text/plain"] == "7"
    assert dict(nb.metadata) == {**made_up().metadata, "llmperf": {"run": "2026-01-31 09:00"}}


def test_a_notebook_that_has_changed_since_the_run_is_refused():
    changed = made_up()
    changed.cells[2].source = "n + 2"
    with pytest.raises(ValueError, match="has changed since the run"):
        commit_run.committed(executed(), changed, {})


def made_up() -> nbformat.NotebookNode:
    """A notebook without a fault: prose, parameters, a checked result and a figure."""
    spec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    settings = 'n: int = -4\nlevels: list = [1, 2]\nmodel: str = "gpt2"  # a name or None'
    cells = [
        v4.new_markdown_cell("See https://example.org/home/x and data/tmp/y.", id="prose"),
        v4.new_code_cell(settings, id="settings", execution_count=1),
        v4.new_code_cell('check_parameters("03-batch", globals())\nn + 1', id="result"),
        v4.new_code_cell("plot()", id="figure", execution_count=3),
    ]
    cells[1].metadata.tags = ["parameters"]
    cells[2].metadata.tags = ["nbval-check-output"]
    cells[2].execution_count = 2
    cells[2].outputs = [v4.new_output("execute_result", {"text/plain": "-3"}, execution_count=2)]
    cells[3].outputs = [v4.new_output("display_data", PNG)]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": spec})


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_a_notebook_without_fault_passes(rule):
    assert list(rule(made_up())) == []


def source(text):
    return lambda nb: nb.cells[3].update(source=text)


def parameters(text):
    return lambda nb: nb.cells[1].update(source=text)


def shown(data):
    return lambda nb: nb.cells[3].outputs.append(v4.new_output("display_data", data))


def printed(text):
    return lambda nb: nb.cells[3].outputs.append(v4.new_output("stream", text=text))


ERROR = v4.new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
VIEW = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Bar()"}
BROKEN = [
    (rules.one_parameters_cell, lambda nb: nb.cells[1].metadata.pop("tags")),
    (rules.one_parameters_cell, lambda nb: nb.cells[3].metadata.update(tags=["parameters"])),
    (rules.one_parameters_cell, parameters("n: int = 2 * 3")),
    (rules.one_parameters_cell, parameters("n = 2")),
    (rules.one_parameters_cell, parameters("n: int")),
    (rules.one_parameters_cell, parameters("n: int = 1\nn += 1")),
    (rules.one_parameters_cell, parameters("n: int = 1\nprint(n)")),
    (rules.one_parameters_cell, parameters("%matplotlib inline")),
    (rules.one_parameters_cell, parameters("# nothing yet")),
    (rules.parameters_are_checked, lambda nb: nb.cells[2].update(source="n + 1")),
    (rules.parameters_are_checked, lambda nb: nb.cells.pop(2)),
    (rules.kernel_is_python3, lambda nb: nb.metadata.kernelspec.update(name="env311")),
    (rules.kernel_is_python3, lambda nb: nb.metadata.pop("kernelspec")),
    (rules.format_is_4_5_with_unique_ids, lambda nb: nb.update(nbformat_minor=4)),
    (rules.format_is_4_5_with_unique_ids, lambda nb: nb.cells[1].update(id="prose")),
    (rules.format_is_4_5_with_unique_ids, lambda nb: nb.cells[1].pop("id")),
    (rules.schema_holds, lambda nb: nb.cells[3].outputs[0].pop("data")),
    (
        rules.measure_cells_need_no_others,
        lambda nb: nb.cells[3].update(source="other + 1", metadata={"tags": ["measure"]}),
    ),
    (rules.every_code_cell_was_run, lambda nb: nb.cells[3].update(execution_count=None)),
    (rules.checked_cells_have_outputs, lambda nb: nb.cells[2].update(outputs=[])),
    (rules.no_widget_state, lambda nb: nb.metadata.update(widgets={})),
    (rules.no_widget_state, shown(VIEW)),
    (rules.no_machine_path, source('open("/home/me/x")')),
    (rules.no_machine_path, source('open("C:\\\\Users\\\\me")')),
    *[(rules.no_machine_path, printed(f"/{root}/3.py:1: Warning")) for root in rules.ROOTS],
    (rules.no_machine_path, printed("File \x1b[32m/home/me/x.py\x1b[39m")),
    (rules.no_machine_path, printed("saved in C:\\Users\\me")),
    (rules.no_machine_path, shown({"text/plain": "PosixPath('/home/me/.cache')"})),
    (rules.no_machine_path, lambda nb: nb.cells[0].update(source="Look in `/home/me/x`.")),
    (rules.errors_are_meant, lambda nb: nb.cells[3].outputs.append(ERROR)),
    (rules.code_cells_are_short, source("\n\n".join("a" * 16))),
    (rules.code_cells_are_short, lambda nb: [c.update(source="a\n" * 7) for c in nb.cells[2:]]),
    (rules.answers_hide_no_import, source("from x import a, b as c\nc = None  # your answer")),
    (rules.nothing_is_installed, source("import os\n!pip install x")),
    (rules.nothing_is_installed, source("%pip install x")),
    (rules.nothing_is_installed, source("!{sys.executable} -m pip install x")),
    (rules.images_are_png, shown({"image/svg+xml": "<svg/>"})),
    (rules.images_are_png, shown({"image/jpeg": "aGk="})),
    (rules.images_are_png, shown({"text/html": "<div><svg></svg></div>"})),
    (rules.images_are_png, lambda nb: nb.cells[0].update(attachments={"a": {"image/gif": ""}})),
]


@pytest.mark.parametrize(("rule", "breaks"), BROKEN, ids=lambda case: case.__name__)
def test_a_rule_finds_its_fault(rule, breaks):
    notebook = made_up()
    breaks(notebook)
    assert list(rule(notebook)) != []


def test_every_rule_has_a_broken_notebook():
    assert {rule for rule, _ in BROKEN} == set(rules.RULES)


def test_a_meant_error_and_fifteen_lines_with_gaps_are_fine():
    notebook = made_up()
    notebook.cells[3].outputs.append(ERROR)
    notebook.cells[3].metadata.tags = ["raises-exception"]
    notebook.cells[3].source = "\n\n".join("a" * 15)
    assert [fault for rule in rules.RULES for fault in rule(notebook)] == []


def test_misnamed_finds_doubles_and_odd_names():
    names = ["00-a-b.ipynb", "01-c.ipynb", "01-d.ipynb", "2-e.ipynb", "03_f.ipynb", "04-G.ipynb"]
    assert rules.misnamed(names) == names[1:]
