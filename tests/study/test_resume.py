"""A study that is killed in the middle ends, after `--resume`, with the records of a whole one."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from llmperf.measure import records


@pytest.fixture(scope="module")
def profile(tiny_folder, tmp_path_factory):
    """Notebook 03 on the tiny model: a few seconds of measuring."""
    path = tmp_path_factory.mktemp("profile") / "tiny.yaml"
    parameters = {"model": str(tiny_folder), "dtype": "fp32", "device": "cpu", "repeats": 3}
    batch = {"batch_sizes": [1, 2, 3], "prompt_tokens": 8, "new_tokens": 64}
    text = yaml.safe_dump({"parameters": parameters, "notebooks": {"03-batch": batch}})
    path.write_text(text, encoding="utf-8")
    return path


def command(*arguments):
    return [sys.executable, "-m", "llmperf", "run", *map(str, arguments)]


def counted(folder):
    """The lines of the store that are whole, without reading them as records."""
    path = folder / "records.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the study did not get that far"
        time.sleep(0.02)


def keys(folder):
    return sorted(r.key for r in records.read(folder / "records.jsonl"))


@pytest.mark.slow
def test_a_killed_study_resumes_to_exactly_the_same_records(profile, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    asked = ("--profile", profile, "--only", "03", "--out")
    subprocess.run(command(*asked, whole), check=True, capture_output=True)

    study = subprocess.Popen(command(*asked, broken), stdout=subprocess.DEVNULL)
    wait_for(lambda: sum(row["kind"] == "measure" for row in counted(broken)) >= 2)
    study.kill()  # SIGKILL: nothing can tidy up
    study.wait()
    time.sleep(3)  # the orphaned kernel notices that its parent is gone, and ends
    before = counted(broken)
    assert len(before) < len(counted(whole))

    with (broken / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"experiment": "03-batch", "torn')  # as a power cut would leave it
    done = subprocess.run(command("--resume", broken), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout.splitlines()[-1]
    assert keys(broken) == keys(whole)
    assert counted(broken)[: len(before)] == before  # what was measured is kept as it was
