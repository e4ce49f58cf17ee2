"""The scenarios at a reduced count; `run.py` does them at the full one."""

import shutil
import sys

import pytest
import scenarios

POSIX = {"killed_studies", "interrupted_studies", "full_disks", "long_run"}
REDUCED = {"killed_studies": 2, "interrupted_studies": 2, "full_disks": 1, "random_requests": 400,
           "random_inputs": 500, "hostile_models": 12, "hostile_archives": 14,
           "hostile_reports": 1, "long_run": 0.2}  # fmt: skip


def test_every_scenario_runs_here():
    assert set(REDUCED) == set(scenarios.SCENARIOS)


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_nothing_is_lost_doubled_or_let_in(name, tmp_path):
    if name in POSIX and sys.platform == "win32":
        pytest.skip("it sends POSIX signals and sets POSIX limits")
    if name == "hostile_reports" and not shutil.which("chromium"):
        pytest.skip("there is no Chromium to open a report with")
    assert scenarios.SCENARIOS[name](REDUCED[name], 1, tmp_path)
