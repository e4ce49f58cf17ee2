"""Runs of made-up notebooks through papermill, resume, and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import webbrowser

import pytest
import yaml
from filelock import FileLock
from made_up_notebooks import write_notebook

from llmperf import REFERENCE, machine, models, study
from llmperf.machine import description, rates
from llmperf.measure import Store
from llmperf.show import static_calculator
from llmperf.study import Profile, cli, profile
from llmperf.study.cli import main


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder with two small notebooks in place of the kit's own."""
    folder = tmp_path / "notebooks"
    for stem in ("00-first", "03-third"):
        write_notebook(folder, stem)
    monkeypatch.setattr(profile, "NOTEBOOKS", folder)
    return folder


def records(folder):
    return Store(folder / "records.jsonl").read()


def test_a_run_executes_notebooks_and_writes_one_self_contained_report(shelf, tmp_path):
    folder = study.start(Profile("p", parameters={"level": 7}), out=tmp_path / "run")
    state = study.run(folder)
    assert state.done == {"00-first": "ok", "03-third": "ok"}
    assert [(r.experiment, r.condition["level"], r.repeat) for r in records(folder)] == [
        (stem, 7, repeat) for stem in ("00-first", "03-third") for repeat in (0, 1)
    ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "level 7" in page
    assert "<script" not in page and 'src="http' not in page and "<link" not in page


def test_a_notebook_that_fails_is_named_and_the_others_go_on(shelf, tmp_path):
    write_notebook(shelf, "00-first", body="raise RuntimeError('broke')")
    folder = study.start(Profile("p"), out=tmp_path / "run")
    state = study.run(folder)
    assert state.done == {
        "00-first": "PapermillExecutionError: RuntimeError: broke",
        "03-third": "ok",
    }
    assert "RuntimeError: broke" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_notebook_whose_runs_do_not_fit_is_skipped_and_no_failure(shelf, tmp_path, capsys):
    body = "from llmperf.measure import DoesNotFit\nraise DoesNotFit('2 GiB do not fit in 1')"
    write_notebook(shelf, "00-first", body=body)
    folder = study.start(Profile("p"), out=tmp_path / "run")
    state = study.run(folder)
    assert state.done == {"00-first": "skipped: 2 GiB do not fit in 1", "03-third": "ok"}
    assert cli._ending(folder, state, records_only=False) == 0
    assert "\n00-first: skipped: 2 GiB do not fit in 1\n" in "\n" + capsys.readouterr().err


def test_a_kernel_is_killed_at_the_end_without_waiting_for_its_clean_up(shelf, tmp_path):
    left = tmp_path / "cleaned-up"
    cleans_up = f"import atexit, pathlib\natexit.register(pathlib.Path({str(left)!r}).touch)"
    write_notebook(shelf, "00-first", body=cleans_up)
    folder = study.start(Profile("p"), only=["00"], out=tmp_path / "run")
    assert study.run(folder).done == {"00-first": "ok"}
    assert not left.exists()  # to free torch takes seconds, in each of twelve notebooks


def test_resume_runs_only_what_is_left(shelf, tmp_path):
    folder = study.start(Profile("p"), out=tmp_path / "run")
    state = study.load_state(folder)
    state.done["00-first"] = "ok"
    state.save(folder)
    study.run(folder, use_notebooks=False)
    assert {r.experiment for r in records(folder)} == {"03-third"}


def test_a_run_is_read_when_its_model_has_moved_and_runs_on_only_with_it(tmp_path):
    asked = Profile("p", parameters={"model": "gpt2"})
    folder = study.start(asked, ["03"], out=tmp_path / "run")
    state = study.load_state(folder)
    state.steps["03-batch"]["model"] = str(tmp_path / "moved")
    state.save(folder)
    assert study.write_report(folder).exists()
    with pytest.raises(ValueError, match="moved"):
        study.run(folder)


def test_the_report_of_a_shipped_run_reads_its_packed_records_and_stays_out_of_its_folder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("llmperf.study.study.RUNS", tmp_path)
    folder = REFERENCE / "runs" / "linux-2core-epyc"
    before = sorted(folder.iterdir())
    assert main(["report", str(folder)]) == 0
    page = tmp_path / folder.name / "report.html"
    assert capsys.readouterr().out == f"Report: {page}\n"
    assert "Of its 17 findings" in page.read_text(encoding="utf-8")
    assert sorted(folder.iterdir()) == before


def test_a_file_that_cannot_be_written_is_one_sentence(shelf, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr("llmperf.study.cli.study.run", full)
    assert main(["run", "--out", str(tmp_path / "run")]) == 1
    assert "llmperf: No space left on device: report.html" in capsys.readouterr().err


def test_resume_measures_again_what_failed_in_a_notebook_that_ended(shelf, tmp_path):
    body = """
from pathlib import Path
from llmperf.measure import Record, Store
repaired = Path(records).with_name("repaired").exists()
how = {} if repaired else {"kind": "failed", "status": "error", "reason": "a process died"}
condition = {"strategy": "batch", "level": 1}  # a record may name its notebook by the first words
Store(records).append(Record("00-f", condition, 0, metrics={"output_tokens_per_s": 3.0}, **how))
"""
    write_notebook(shelf, "00-first", body=body)
    folder, said = study.start(Profile("p"), out=tmp_path / "run"), []
    study.run(folder, use_notebooks=False)
    (folder / "repaired").touch()
    study.run(folder, use_notebooks=False, say=said.append)
    study.run(folder, use_notebooks=False, say=said.append)
    assert [line for line in said if line.startswith("[")] == ["[1/1] 00-first"]
    assert [r.status for r in records(folder) if r.experiment == "00-f"] == ["ok"]


def test_without_jupyter_the_same_records_come(shelf, tmp_path):
    with_it = study.start(Profile("p"), out=tmp_path / "a")
    without = study.start(Profile("p"), out=tmp_path / "b")
    study.run(with_it)
    study.run(without, use_notebooks=False)
    keys = [[r.key for r in records(f)] for f in (with_it, without)]
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


DAMAGED = {
    "no YAML": ("{", "is not plain YAML"),
    "no mapping": ("[1]", "is a mapping of"),
    "another field": ("profile: p\nsteps: {}\ntimeout_s: 1\nx: 1", "is a mapping of"),
    "a wrong type": ("profile: p\nsteps: 4\ntimeout_s: 1", "it must be of type dict"),
    "no notebook of ours": (
        "profile: p\nsteps: {'../../evil': {}}\ntimeout_s: 1",
        "there is no notebook '../../evil'",
    ),
    "code": (
        "profile: p\nsteps: {00-first: {level: !!binary aGk=}}\ntimeout_s: 1",
        "b'hi'",
    ),
    "seconds": (
        "profile: p\nsteps: {}\ntimeout_s: 1\nseconds: {00-first: abc}",
        "run.yaml is damaged: remove the folder",
    ),
    "done": ("profile: p\nsteps: {}\ntimeout_s: 1\ndone: {00-first: 5}", "is damaged"),
}


def test_a_folder_whose_name_is_no_text_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="is not UTF-8 text: name another"):
        study.start(Profile("p"), out=f"{tmp_path}/x\udcff")


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_state_is_one_sentence(shelf, tmp_path, kind):
    text, sentence = DAMAGED[kind]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        study.load_state(tmp_path)


def test_one_process_runs_a_study(shelf, tmp_path):
    folder = study.start(Profile("p"), out=tmp_path / "run")
    with FileLock(folder / "run.lock"), pytest.raises(ValueError, match="another process runs"):
        study.run(folder, use_notebooks=False)
    study.run(folder, use_notebooks=False)
    assert len(records(folder)) == 4


def test_a_line_a_notebook_with_the_time_left_by_past_runs(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr("llmperf.study.study.RUNS", tmp_path)
    said = []
    study.run(study.start(Profile("p"), out=tmp_path / "a"), use_notebooks=False, say=said.append)
    assert said[0] == "[1/2] 00-first" and said[1].endswith(" s, ok.")
    state = study.load_state(tmp_path / "a")
    state.seconds = {"00-first": 100, "03-third": 30}
    state.save(tmp_path / "a")
    said.clear()
    folder = study.start(Profile("p"), out=tmp_path / "elsewhere" / "b")
    study.run(folder, use_notebooks=False, say=said.append)
    assert said[0] == "[1/2] 00-first, about 2.2 min left"
    assert said[2] == "[2/2] 03-third, about 0.5 min left"  # what 00 keeps is no measure of pace
    state = study.load_state(folder)
    state.done, state.seconds = {}, {"00-first": 1, "03-third": 15}  # half of the past run's
    state.save(folder)
    said.clear()
    study.run(folder, use_notebooks=False, say=said.append)
    assert said[0] == "[1/2] 00-first, about 1.1 min left"


def test_the_first_study_knows_the_time_left_by_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setattr("llmperf.study.study.RUNS", tmp_path)
    said = []
    monkeypatch.setattr("llmperf.study.study._run_one", lambda *_: "ok")
    folder = study.start(study.load_profile("quick"), out=tmp_path / "run")
    study.run(folder, use_notebooks=False, say=said.append)
    assert all(line.endswith(" min left") for line in said[::2])


# Within `exec` of a string, as where a dataclass is made: once a plain KeyboardInterrupt has passed
# there, `python -m` ends with SIGINT, whatever the exit status.
WAIT = """exec("import time; open(records + '.began', 'w').close(); time.sleep(60)")"""
START = """
import sys
from pathlib import Path
from llmperf.study import profile
profile.NOTEBOOKS = Path(sys.argv.pop(1))
from llmperf.__main__ import entry
sys.exit(entry())
"""
LATE = """
import os, runpy, signal, sys
class Late:  # Python frees it when it closes
    def __del__(self, kill=os.kill, pid=os.getpid(), stop=getattr(signal, sys.argv.pop(1))):
        kill(pid, stop)
late = Late()
runpy.run_module("llmperf", run_name="__main__", alter_sys=True)
"""


CUT_OFF = """
import asyncio, gc, os, signal
from llmperf.study import cli

async def cut_off():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10):
        pass

async def other():
    task = asyncio.create_task(cut_off())
    await asyncio.sleep(5)

cli._models = lambda arguments: asyncio.run(other())
print(cli.main(["models"]))
gc.collect()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")
def test_an_interrupt_inside_a_task_prints_no_traceback():
    done = subprocess.run([sys.executable, "-c", CUT_OFF], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("130\n", "llmperf: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("how", [[], ["--no-notebooks"]])
def test_a_signal_ends_a_study_with_130_and_how_to_go_on(shelf, tmp_path, stop, how):
    write_notebook(shelf, "00-first", body=WAIT)
    folder = tmp_path / "run"
    (tmp_path / "p.yaml").write_text("description: nothing", encoding="utf-8")
    asked = ["run", "--profile", tmp_path / "p.yaml", "--out", folder, "--only", "0", *how]
    (tmp_path / "start.py").write_text(START, encoding="utf-8")
    command = [sys.executable, "-m", "start", shelf, *asked]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    end = time.monotonic() + 60
    while not (folder / "records.jsonl.began").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, getattr(signal, stop))
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    assert f"python -m llmperf run --resume {folder}" in said and "Traceback" not in said, said
    assert yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["done"] == {}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent differently there")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_end_does_not_change_the_exit_status(stop):
    command = [sys.executable, "-c", LATE, stop, "models", "gpt2"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0


def test_records_that_are_not_ok_end_with_a_count_and_status_1(shelf, tmp_path, capsys):
    body = """
from llmperf.measure import Record, Store
condition = {"strategy": "batch", "level": 1}
Store(records).append(Record("00-first", condition, 0, status="error", reason="gone\x1b[2J"))
Store(records).append(Record("00-first", condition, 1, metrics={"output_tokens_per_s": 3.0}))
"""
    write_notebook(shelf, "00-first", body=body)
    (tmp_path / "p.yaml").write_text("description: nothing", encoding="utf-8")
    asked = ["run", "--profile", tmp_path / "p.yaml", "--out", tmp_path / "run", "--only", "0"]
    assert main([*map(str, asked), "--no-notebooks"]) == 1
    said = capsys.readouterr()
    assert "runs without a result: 1 error; the first: 00-first: gone" in said.err
    assert "\x1b" not in said.err + said.out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["run", "--profile", "fast"], "unknown profile 'fast': choose "),
        (["run", "--only", "42"], "there is no notebook '42'"),
        (["run", "--set", "no_such=4"], "unknown parameter 'no_such' for any notebook: choose"),
        (["run", "--set", "repeats"], "write NAME=VALUE"),
        (["run", "--set", "repeats=[!!binary aGk=]"], "b'hi'"),
        (["run", "--set", "repeats=many"], "'many', of type str: it must be of type int"),
        (["run", "--resume", "nowhere"], "holds no run"),
        (["run", "--resume", "x", "--profile", "full"], "leave out --profile"),
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


def test_the_calculator_is_a_page_of_the_models_named_and_of_this_card(
    tmp_path, monkeypatch, capsys
):
    card = {"name": "NVIDIA GeForce RTX 4090", "memory_total_bytes": 25757220864}
    monkeypatch.setattr(models, "PRESETS", ("gpt2",))
    monkeypatch.setitem(machine.PROBES, "gpus", lambda: [card])
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path))
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(rates, "read_bandwidth", lambda *_, **__: {"median": 3e10})
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", "n_layer": 3, "vocab_size": 99}))
    assert main(["calculator", str(config)]) == 0
    page = tmp_path / "calculator.html"
    said = capsys.readouterr().out
    assert opened == [page.as_uri()] and str(page) in said and "then they are kept" in said
    numbers = re.search("const data = (.*), GIB", page.read_text(encoding="utf-8"))[1]
    found = json.loads(numbers)
    assert list(found["models"]) == [str(config), "gpt2"]
    assert found["models"][str(config)]["vocab"] == 99
    assert found["first"]["model"] == str(config)
    assert found["first"]["card"] == "NVIDIA GeForce RTX 4090 (this machine)"
    assert found["cards"]["NVIDIA GeForce RTX 4090 (this machine)"] == [25757220864 / 2**30, 1008e9]
    assert found["cards"]["this computer (free memory)"][1] == 3e10
    ceilings = {"read_bytes_per_s": {"median": 4e10}, "warning": None}
    description.store_measurement("ceilings", "cpu", ceilings)
    monkeypatch.setitem(machine.PROBES, "gpus", lambda: [])
    monkeypatch.setitem(machine.PROBES, "ram_available_bytes", lambda: 2**34)
    numbers = static_calculator._numbers([])
    assert numbers["cards"][numbers["first"]["card"]] == [16, 4e10]
    assert main(["calculator", "no-such-model"]) == 2
    assert main(["calculator", "--out", str(tmp_path)]) == 2, "a folder, refused before any work"


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
