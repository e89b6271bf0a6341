"""install.py checks and advises, whatever it finds."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
from conftest import PACK
from diffusers_layout import diffusers_repository, to_diffusers
from safetensors.torch import load_file

pytestmark = pytest.mark.once

spec = importlib.util.spec_from_file_location("install", PACK / "install.py")
install = importlib.util.module_from_spec(spec)
sys.modules["install"] = install
spec.loader.exec_module(install)

HOST = Path(os.environ["STEP1X_COMFYUI"])
# The script must not open a connection; the disk has 100 GB free, whatever others write to it meanwhile.
OFFLINE = """
import runpy, shutil, socket, sys
def refuse(*args, **kwargs):
    sys.exit("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=100 * 10**9)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def comfyui(tmp_path):
    """What of the real host tells its version and its folders, in a folder of its own."""
    root = tmp_path / "ComfyUI"
    (root / "comfy").mkdir(parents=True)
    (root / "models").mkdir()
    for name in ("comfyui_version.py", "folder_paths.py", "comfy/cli_args.py", "comfy/options.py"):
        shutil.copy(HOST / name, root / name)
    shutil.copytree(HOST / "utils", root / "utils")
    return root


def advice(root, *python, **variables) -> str:
    """Printed by the script when the Manager runs it, without the mark in front of each line."""
    environment = {k: v for k, v in os.environ.items() if k not in ("STEP1X_COMFYUI", "COMFYUI_FOLDERS_BASE_PATH")}
    command = [sys.executable, *python, "-c", OFFLINE, str(PACK / "install.py")]
    result = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        env={**environment, "COMFYUI_PATH": str(root), "PYTHONIOENCODING": "utf-8", **variables},
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = result.stdout.splitlines()
    assert lines and all(line.startswith("[Step1X-Edit] ") for line in lines)
    return "\n".join(line.removeprefix("[Step1X-Edit] ") for line in lines)


# Without site-packages: no torch, and quick.
BARE = ("-S", "-I")


def snapshot(root):
    return sorted(path.relative_to(root) for path in root.rglob("*") if "__pycache__" not in path.parts)


def test_missing_files_come_with_the_one_command_that_gets_them(comfyui):
    (comfyui / "input").mkdir()  # the host makes it
    before = snapshot(comfyui)
    text = advice(comfyui)
    assert f"in {comfyui}\n" in text and "torch 2." in text and ": 100 GB (v1.1, mllm and vae take about 42 GB)" in text
    for title, folder in (("Step1X-Edit model", "diffusion_models"), ("Qwen2.5-VL-7B", "text_encoders"), ("FLUX VAE", "vae")):
        assert f"{title}: not found in " in text and str(comfyui / "models" / folder) in text
    assert text.splitlines()[-1].endswith("install.py --download v1.1 mllm vae") and sys.executable in text
    assert snapshot(comfyui) == before


def test_found_files_are_named_with_their_folders(comfyui, models, tmp_path):
    """In the host's folders, in an earlier pack's folder and in one that extra_model_paths.yaml adds."""
    shared = tmp_path / "shared"
    sources = models / "diffusion_models" / tiny_models.V11_FILE, models / "text_encoders" / tiny_models.MLLM_FILE
    places = comfyui / "models" / "Step1x-Edit" / "step1x-edit-i1258.safetensors", shared / "encoders" / "Qwen2.5-VL-7B.safetensors"
    for source, place in zip(sources, places):
        place.parent.mkdir(parents=True)
        shutil.copy(source, place)
    (comfyui / "extra_model_paths.yaml").write_text(f"shared:\n  base_path: {shared.as_posix()}\n  clip: encoders\n")
    text = advice(comfyui)
    assert f"Step1X-Edit model: {places[0]}" in text and f"Qwen2.5-VL-7B: {places[1]}" in text
    assert text.splitlines()[-1].endswith("--download vae")


def test_a_diffusers_repository_is_all_three(comfyui, models):
    folder = comfyui / "models" / "diffusers" / "Step1X-Edit-v1p2"
    diffusers_repository(folder, to_diffusers(load_file(models / "diffusion_models" / tiny_models.V12_FILE)), "Step1XEditPipelineV1P2")
    for name, source in (
        ("text_encoder", models / "text_encoders" / tiny_models.MLLM_FILE),
        ("vae", models / "vae" / tiny_models.VAE_FILE),
    ):
        (folder / name).mkdir()
        shutil.copy(source, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    text = advice(comfyui)
    assert all(f"{title}: {folder}" in text for title in ("Step1X-Edit model", "Qwen2.5-VL-7B", "FLUX VAE")) and "--download" not in text
    assert text.splitlines()[-1] == "Nothing is missing for an edit." and advice(comfyui) == text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_folder_that_the_console_cannot_write_never_fails_the_installation(comfyui, encoding):
    root = comfyui.rename(comfyui.with_name("模型"))
    text = advice(root, PYTHONIOENCODING=encoding)
    assert r"\u6a21\u578b" in text and text.splitlines()[-1].endswith("--download v1.1 mllm vae")


def test_an_old_host_is_named(comfyui):
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.9.1"\n')
    assert "ComfyUI 0.9.1 is too old: update it to 0.18.2 or newer." in advice(comfyui, *BARE)


def test_a_python_without_packages_is_advised(comfyui):
    text = advice(comfyui, *BARE)
    assert f"torch cannot be used by {sys.executable}" in text and "The models folders were not checked" in text


@pytest.mark.parametrize("name, content, python", [
    ("extra_model_paths.yaml", b"a: [\n", ()), ("comfyui_version.py", b"\xff", BARE), ("folder_paths.py", b"1/0", BARE),
])
def test_a_broken_host_never_fails_the_installation(comfyui, name, content, python):
    (comfyui / name).write_bytes(content)
    assert "The setup advice failed" in advice(comfyui, *python).splitlines()[-1]


def test_outside_a_host_the_place_is_named(tmp_path):
    assert f"{tmp_path} is not a ComfyUI folder. Put this pack into ComfyUI/custom_nodes" in advice(tmp_path, *BARE)


@pytest.mark.parametrize("version, cuda, abi, middle", [
    ("2.7.1+cu128", "12.8", True, "cu12torch2.7cxx11abiTRUE"), ("2.4.0", "11.8", False, "cu11torch2.4cxx11abiFALSE"),
])
def test_the_flash_attn_wheel_is_named_as_its_makers_do(monkeypatch, version, cuda, abi, middle):
    torch = SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda), compiled_with_cxx11_abi=lambda: abi)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for system, end in (("linux", "linux_x86_64"), ("win32", "win_amd64")):
        monkeypatch.setattr(install.sys, "platform", system)
        monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
        assert install.flash_attn_wheel(torch) == f"flash_attn-{install.FLASH_ATTN}+{middle}-{python}-{python}-{end}.whl"
    torch.version.cuda = None
    assert install.flash_attn_wheel(torch) is None
