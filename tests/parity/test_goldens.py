"""Parity with the official code: the golden files, and the runner itself."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import golden_runner
import pytest
from conftest import PACK
from golden_files import MISMATCH, TOLERANCE
from safetensors import safe_open
from safetensors.torch import save_file

GOLDENS = Path(__file__).parent / "goldens"


def size_table() -> dict:
    """The golden table of sizes with a row in thirteen; `test_golden` has the whole one."""
    table = json.loads((GOLDENS / "resize.json").read_text())
    return table | {"rows": table["rows"][::13]}


@pytest.mark.parametrize("path", sorted(p for p in GOLDENS.rglob("*") if p.is_file()), ids=lambda path: path.name)
def test_golden(path):
    assert golden_runner.check_file(path) <= TOLERANCE


def test_every_kind_of_golden_file_is_there():
    assert {p.name for p in GOLDENS.rglob("*") if p.is_file()} == set(golden_runner.CHECKS)


def parity(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(PACK / "scripts" / "parity.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ,
    )


@pytest.mark.once
def test_parity_runner_prints_a_line_per_file_and_fails_on_wrong_and_unknown_files(tmp_path):
    (tmp_path / "resize.json").write_text(json.dumps(size_table()))
    good = parity(tmp_path)
    assert good.returncode == 0 and good.stdout.strip() == "PASS resize.json max_err=0.00e+00 tol=1e-05"

    table = json.loads((GOLDENS / "schedule.json").read_text())
    table["schedules"][1]["timesteps"][1] += 1e-4
    (tmp_path / "schedule.json").write_text(json.dumps(table))
    (tmp_path / "something_new.json").write_text("{}")
    (tmp_path / "tensors.bin").write_bytes(b"?")
    (tmp_path / "README.md").write_text("not a golden file")
    (tmp_path / "folder").mkdir()
    bad = parity(tmp_path)
    assert bad.returncode == 1
    lines = bad.stdout.strip().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["PASS", "resize.json"],
        ["FAIL", "schedule.json"],
        ["FAIL", "something_new.json"],
        ["FAIL", "tensors.bin"],
    ]
    assert all(re.fullmatch(r"(PASS|FAIL) \S+ max_err=(inf|[\d.e+-]+) tol=1e-05( \(.+\))?", line) for line in lines)
    assert "max_err=inf" in lines[2] and "max_err=inf" in lines[3]


@pytest.mark.parametrize("column, value", [("output_size", [1, 1]), ("resized", [16, 16])])
def test_wrong_columns_of_the_size_table_are_found(tmp_path, column, value):
    table = size_table()
    table["rows"][0][column] = value
    (tmp_path / "resize.json").write_text(json.dumps(table))
    assert golden_runner.check_file(tmp_path / "resize.json") == MISMATCH


@pytest.mark.parametrize(
    "file, tensor, change",
    [
        ("ids.safetensors", "outputs.a.v1.1.img_ids", 1e-6),
        ("ids.safetensors", "outputs.rope_pe", math.nan),
        ("cfg.safetensors", "outputs.divisor", math.nan),
        ("time_embedding.safetensors", "outputs.dit.fp32", 3e-4),
        ("time_embedding.safetensors", "outputs.connector_fp8_weights.bf16", 2**-3),
    ],
)
def test_ids_are_compared_exactly_times_nearly_and_nan_never_passes(tmp_path, file, tensor, change):
    with safe_open(GOLDENS / file, framework="pt") as golden:
        metadata, tensors = golden.metadata(), {k: golden.get_tensor(k) for k in golden.keys()}
    tensors[tensor].view(-1)[0] += change
    save_file(tensors, tmp_path / file, metadata=metadata)
    assert not golden_runner.check_file(tmp_path / file) <= TOLERANCE


@pytest.mark.once
def test_parity_runner_fails_on_a_folder_without_goldens(tmp_path):
    empty = parity(tmp_path)
    assert empty.returncode == 1 and empty.stdout.startswith("FAIL ") and "max_err=inf" in empty.stdout
    assert parity().returncode == 2
