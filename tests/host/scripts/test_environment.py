"""The environment for a ComfyUI tree that is named: which packages, which Python, and what is said where there is none."""

import os
import subprocess
import sys

import environment
import pytest
import yaml
from conftest import PACK

pytestmark = pytest.mark.once

REQUIREMENTS = """comfyui-frontend-package==9.9.9
comfyui_workflow_templates==8.8.8
torch
torchaudio>=2
TorchVision
torchsde
numpy>=1.25.0  # a comment
comfy-kitchen[cuda]==7.7.7

#non essential dependencies:
kornia>=0.7.1
-r more.txt
"""


@pytest.fixture
def tree(tmp_path):
    """Enough of a ComfyUI to be named."""
    folder = tmp_path / "comfyui"
    folder.mkdir()
    (folder / "main.py").touch()
    (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    return folder


def ours() -> dict[str, str]:
    lines = (PACK / "scripts" / "support" / "requirements-host.txt").read_text(encoding="utf-8").splitlines()
    return {environment.package_name(line): line for line in lines}


def test_a_trees_pins_are_its_own_but_for_torch(tree):
    packages, templates = environment.tree_requirements(tree)
    assert templates == ["comfyui_workflow_templates==8.8.8"]
    assert packages == [
        ours()["torch"],
        ours()["torchvision"],
        ours()["torchaudio"],
        "comfyui-frontend-package==9.9.9",
        "torchsde",
        "numpy>=1.25.0",
        "comfy-kitchen[cuda]==7.7.7",
        "kornia>=0.7.1",
    ]


def test_the_tree_of_this_run_can_be_read():
    if not os.path.isfile(os.path.join(os.environ["STEP1X_COMFYUI"], "requirements.txt")):
        pytest.skip("this ComfyUI has no requirements.txt")
    packages, _ = environment.tree_requirements(environment.Path(os.environ["STEP1X_COMFYUI"]))
    names = [environment.package_name(line) for line in packages]
    assert len(names) == len(set(names)) and {"torch", "comfyui-frontend-package", "transformers", "aiohttp"} <= {*names}


def test_a_tree_without_requirements_is_refused(tree):
    (tree / "requirements.txt").unlink()
    with pytest.raises(SystemExit, match=r"has no requirements\.txt"):
        environment.tree_requirements(tree)


@pytest.fixture
def built(monkeypatch, tmp_path):
    """The virtual environments that are built, in place of building them: their Python is a file without packages."""
    made = []

    def build(tree):
        made.append(tree)
        return tmp_path / "built" / "bin" / "python"

    monkeypatch.setattr(environment, "build_tree_venv", build)
    return made


def test_a_checkout_gets_an_environment_of_its_own(tree, built, monkeypatch, tmp_path):
    monkeypatch.setenv("STEP1X_COMFYUI", str(tmp_path / "nothing"))  # --comfyui comes first
    host = environment.tree_host(str(tree))
    assert (host.tree, host.python, host.installed) == (tree, tmp_path / "built" / "bin" / "python", False) and built == [tree]


def test_the_variable_takes_this_python_where_it_can_run_a_comfyui(tree, built, monkeypatch, tmp_path):
    monkeypatch.setenv("STEP1X_COMFYUI", str(tree))
    host = environment.tree_host(None)
    assert str(host.python) == sys.executable and host.installed and not built
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python without torch"))
    assert not environment.tree_host(None).installed and built == [tree]


@pytest.mark.skipif(sys.platform == "win32", reason="the Python of the tree is a shell script here")
def test_an_installed_comfyui_keeps_its_python(tree, built):
    python = environment.venv_python(tree / "venv")
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    host = environment.tree_host(str(tree))
    assert (host.python, host.installed) == (python, True) and not built


def test_without_a_name_there_is_no_tree(monkeypatch):
    monkeypatch.delenv("STEP1X_COMFYUI")
    assert environment.tree_host(None) is None


@pytest.mark.parametrize("arguments, variable, name", [(["--comfyui", "nowhere"], None, "--comfyui"), ([], "nowhere", "STEP1X_COMFYUI")])
def test_a_folder_without_a_comfyui_is_named(tmp_path, arguments, variable, name):
    variables = {k: v for k, v in os.environ.items() if k != "STEP1X_COMFYUI"} | ({"STEP1X_COMFYUI": variable} if variable else {})
    done = subprocess.run(
        [sys.executable, str(PACK / "scripts" / "test.py"), *arguments, "-q"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and f"{name} names {tmp_path / 'nowhere'}, but there is no ComfyUI" in done.stderr


def test_the_weekly_job_runs_the_suite_in_the_newest_release():
    job = yaml.safe_load((PACK / ".github" / "workflows" / "newest.yml").read_text(encoding="utf-8"))
    steps = job["jobs"]["test"]["steps"]
    assert job[True]["schedule"]  # YAML 1.1 reads the key `on` as a boolean
    trees = {step["with"]["path"]: step["with"] for step in steps if "path" in step.get("with", {})}
    assert trees["comfyui"]["repository"] == "comfyanonymous/ComfyUI" and "newest" in trees["comfyui"]["ref"]
    assert any("scripts/test.py --comfyui ../comfyui" in step.get("run", "") and step["working-directory"] == "pack" for step in steps)
