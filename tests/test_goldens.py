"""Parity with the official code: the golden files, and the runner itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import golden_checks
import pytest
from conftest import PACK

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("name", sorted(golden_checks.CHECKS))
def test_golden(name):
    assert golden_checks.check_file(GOLDENS / name) <= golden_checks.TOLERANCE


def parity(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(PACK / "scripts" / "parity.py"), *map(str, arguments)], capture_output=True, text=True, env=os.environ)


def test_parity_runner_prints_a_line_per_file_and_fails_on_wrong_and_unknown_files(tmp_path):
    shutil.copy(GOLDENS / "resize.json", tmp_path / "resize.json")
    good = parity(tmp_path)
    assert good.returncode == 0 and good.stdout.strip() == "PASS resize.json max_err=0.00e+00 tol=1e-05"

    table = json.loads((GOLDENS / "schedule.json").read_text())
    table["schedules"][1]["timesteps"][1] += 1e-4
    (tmp_path / "schedule.json").write_text(json.dumps(table))
    (tmp_path / "something_new.json").write_text("{}")
    bad = parity(tmp_path)
    assert bad.returncode == 1
    lines = bad.stdout.strip().splitlines()
    assert lines[0].startswith("PASS resize.json") and lines[1].startswith("FAIL schedule.json") and lines[2].startswith("FAIL something_new.json")


def test_parity_runner_fails_on_a_folder_without_goldens(tmp_path):
    assert parity(tmp_path).returncode == 1
    assert parity().returncode == 2
