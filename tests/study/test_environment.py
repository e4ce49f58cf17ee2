"""The conda environment asks for what pyproject.toml asks for, and says why, line by line."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "environment.yml").read_text(encoding="utf-8")
ENVIRONMENT = yaml.safe_load(TEXT)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def ranges(lines: list[str]) -> dict[str, tuple]:
    """Requirement lines as {canonical name: (extras, version range, marker)}."""
    parsed = [Requirement(line) for line in lines]
    return {
        canonicalize_name(r.name): (frozenset(r.extras), r.specifier, str(r.marker)) for r in parsed
    }


def conda_lines() -> list[str]:
    return [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]


def pip_lines() -> list[str]:
    (pip,) = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    assert list(pip) == ["pip"]
    return pip["pip"]


def test_pip_part_asks_for_what_the_project_and_its_tests_ask_for():
    listed = [line for line in pip_lines() if line != "-e ."]
    declared = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert ranges(listed) == ranges(declared)
    assert len(listed) == len(ranges(listed)), "a requirement stands twice"


def test_the_kit_itself_is_installed_in_place():
    assert pip_lines().count("-e .") == 1


def test_conda_part_is_python_in_the_same_range_and_pip():
    assert ranges(conda_lines()) == ranges([f"python{PROJECT['requires-python']}", "pip"])


def test_name_is_the_one_that_the_first_line_activates():
    assert ENVIRONMENT["name"] == "llmperf"
    assert TEXT.splitlines()[0].endswith(f"conda activate {ENVIRONMENT['name']}")


@pytest.mark.parametrize("line", [s for s in TEXT.splitlines() if re.match(r"\s*- (?!pip:)", s)])
def test_each_entry_says_why_it_is_there(line):
    reason = line.partition(" # ")[2]
    assert len(reason.split()) >= 2, f"{line.strip()}: add a comment that says why"
