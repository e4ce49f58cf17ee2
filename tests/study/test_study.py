"""Profiles, the plan, runs of made-up notebooks through papermill, resume, and the command line."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat import v4

from llmperf import study
from llmperf.__main__ import main
from llmperf.measure import records
from llmperf.study import Profile

MEASURE = """
from llmperf.records import Record, Store
store = Store(records)
for repeat in range(repeats):
    store.append(Record("{stem}", {{"level": level}}, repeat))
"""


def notebook(
    stem, *, parameters="level: int = 1\nrepeats: int = 2\nrecords: str = ''", body=MEASURE
):
    cells = [
        v4.new_markdown_cell(f"# {stem}"),
        v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        v4.new_code_cell(body.format(stem=stem), metadata={"tags": ["measure"]}),
        v4.new_code_cell("print('level', level)"),
    ]
    spec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": spec})


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder with two small notebooks in place of the kit's own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for stem in ("00-first", "03-third"):
        nbformat.write(notebook(stem), folder / f"{stem}.ipynb")
    monkeypatch.setattr(study, "NOTEBOOKS", folder)
    return folder


def test_every_shipped_profile_fits_every_notebook():
    for name in study.profiles():
        profile = study.load_profile(name)
        assert profile.description
        study.plan(profile, study.notebooks())


def test_a_plan_gives_each_notebook_what_it_has(shelf):
    profile = Profile("p", parameters={"level": 4}, notebooks={"03-third": {"repeats": 5}})
    assert study.plan(profile, study.notebooks(), {"level": 9}) == {
        "00-first": {"level": 9},
        "03-third": {"level": 9, "repeats": 5},
    }


@pytest.mark.parametrize(
    ("profile", "sentence"),
    [
        (Profile("p", parameters={"levl": 1}), "unknown parameter 'levl' for any notebook"),
        (Profile("p", notebooks={"03-third": {"x": 1}}), "unknown parameter 'x' for notebook 03-"),
        (Profile("p", notebooks={"07-none": {}}), "there is no notebook '07-none'"),
        (Profile("p", parameters={"level": "4"}), "'4', a str: it must be a int"),
        (Profile("p", parameters={"level": True}), "True, a bool: it must be a int"),
        (Profile("p", parameters={"records": "x"}), "set by the study itself"),
    ],
)
def test_bad_profiles_are_refused_before_anything_runs(shelf, profile, sentence):
    with pytest.raises(ValueError, match=sentence):
        study.plan(profile, study.notebooks())


def test_notebooks_are_picked_by_number_or_name(shelf):
    assert [p.stem for p in study.notebooks(["3"])] == ["03-third"]
    assert [p.stem for p in study.notebooks(["00-first", "03"])] == ["00-first", "03-third"]
    with pytest.raises(ValueError, match="no notebook '42': choose 00-first, 03-third"):
        study.notebooks(["42"])


def test_a_run_executes_notebooks_and_writes_one_self_contained_report(shelf, tmp_path):
    folder = study.start(Profile("p", parameters={"level": 7}), out=tmp_path / "run")
    state = study.run(folder)
    assert state.done == {"00-first": "ok", "03-third": "ok"}
    kept = records.read(folder / "records.jsonl")
    assert [(r.experiment, r.condition["level"], r.repeat) for r in kept] == [
        (stem, 7, repeat) for stem in ("00-first", "03-third") for repeat in (0, 1)
    ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "level 7" in page
    assert "<script" not in page and 'src="http' not in page and "<link" not in page


def test_a_notebook_that_fails_is_named_and_the_others_go_on(shelf, tmp_path):
    nbformat.write(
        notebook("00-first", body="raise RuntimeError('broke')"), shelf / "00-first.ipynb"
    )
    folder = study.start(Profile("p"), out=tmp_path / "run")
    state = study.run(folder)
    assert state.done == {
        "00-first": "PapermillExecutionError: RuntimeError: broke",
        "03-third": "ok",
    }
    assert "RuntimeError: broke" in (folder / "report.html").read_text(encoding="utf-8")


def test_resume_runs_only_what_is_left(shelf, tmp_path):
    folder = study.start(Profile("p"), out=tmp_path / "run")
    state = study.load_state(folder)
    state.done["00-first"] = "ok"
    state.save(folder)
    study.run(folder, use_notebooks=False)
    assert {r.experiment for r in records.read(folder / "records.jsonl")} == {"03-third"}


def test_without_jupyter_the_same_records_come(shelf, tmp_path):
    with_it = study.start(Profile("p"), out=tmp_path / "a")
    without = study.start(Profile("p"), out=tmp_path / "b")
    study.run(with_it)
    study.run(without, use_notebooks=False)
    keys = [[r.key for r in records.read(f / "records.jsonl")] for f in (with_it, without)]
    assert keys[0] == keys[1] != []
    assert not list((without / "notebooks").iterdir())


def test_a_folder_that_holds_a_run_or_cannot_be_written_is_refused(shelf, tmp_path):
    folder = study.start(Profile("p"), out=tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run: use --resume"):
        study.start(Profile("p"), out=folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the output folder"):
        study.start(Profile("p"), out=tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="holds no run"):
        study.load_state(tmp_path)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["run", "--profile", "fast"], "unknown profile 'fast': choose "),
        (["run", "--only", "42"], "there is no notebook '42'"),
        (["run", "--set", "no_such=4"], "unknown parameter 'no_such' for any notebook: choose"),
        (["run", "--set", "repeats"], "write NAME=VALUE"),
        (["run", "--set", "repeats=many"], "'many', a str: it must be a int"),
        (["run", "--resume", "nowhere"], "holds no run"),
        (["run", "--resume", "x", "--out", "y"], "--resume takes everything from the run's folder"),
        (["report", "nowhere"], "holds no run"),
    ],
)
def test_bad_command_lines_end_with_one_sentence(argv, sentence, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("llmperf: ") and error.count("\n") == 1


def test_the_command_line_lists_models(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m" in out and "135 M parameters" in out


def test_the_machine_command_prints_json():
    done = subprocess.run(
        [sys.executable, "-m", "llmperf", "machine"], capture_output=True, text=True
    )
    assert json.loads(done.stdout)["os"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports a closed pipe differently")
def test_a_reader_that_has_read_enough_is_no_error():
    command = [sys.executable, "-m", "llmperf", "models"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1 and said == ""
