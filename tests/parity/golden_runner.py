"""Runs golden files through the checks of their kinds. Runs where ComfyUI's modules can be imported."""

import json
import math
import sys
from pathlib import Path

import golden_checks
import golden_checks_conditioning
import golden_checks_reflection
import golden_checks_v12
import torch
from golden_files import TOLERANCE, Errors, Golden

CHECKS = {**golden_checks.CHECKS, **golden_checks_v12.CHECKS, **golden_checks_conditioning.CHECKS, **golden_checks_reflection.CHECKS}


def check_file(path: Path) -> float:
    """Largest error of one golden file. Raises KeyError for a kind that is not known."""
    compare = CHECKS[path.name]
    errors = Errors()
    with torch.inference_mode():
        compare(Golden(path) if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8")), errors)
    return errors.max


def check(path: Path) -> tuple[float, str]:
    """Largest error of one file, and a note where it could not be compared."""
    if path.name not in CHECKS:
        return math.inf, "unknown kind of golden file"
    try:
        return check_file(path), ""
    except Exception as problem:  # one broken file must not hide the others
        return math.inf, f"{type(problem).__name__}: {problem}"


def main(folders: list[str]) -> int:
    if not folders:
        print("usage: parity.py DIR...", file=sys.stderr)
        return 2
    failed = False

    def report(name, error, note=""):
        nonlocal failed
        passed = error <= TOLERANCE
        failed |= not passed
        print(f"{'PASS' if passed else 'FAIL'} {name} max_err={error:.2e} tol={TOLERANCE:g}{f' ({note})' if note else ''}", flush=True)

    for folder in map(Path, folders):
        files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix != ".md") if folder.is_dir() else []
        if not files:
            report(folder, math.inf, "has no golden files")
        for path in files:
            report(path.name, *check(path))
    return int(failed)
