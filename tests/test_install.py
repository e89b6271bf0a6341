"""install.py checks and advises, whatever it finds."""

import importlib.util
import subprocess
import sys

from conftest import PACK

spec = importlib.util.spec_from_file_location("install", PACK / "install.py")
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


def comfyui(folder, version):
    (folder / "models").mkdir(parents=True)
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def test_missing_files_are_named_with_their_folder(tmp_path):
    lines = install.advise(comfyui(tmp_path / "ComfyUI", "0.30.0"))
    assert [line for line in lines if "models/diffusion_models" in line and "v1p1" in line]
    assert sum("not found" in line for line in lines) == 3


def test_present_files_and_old_hosts_are_reported(tmp_path):
    root = comfyui(tmp_path / "ComfyUI", "0.9.1")
    for name in ("unet/Step1X-Edit-FP8.safetensors", "clip/qwen_2.5_vl_7b_fp8_scaled.safetensors", "vae/ae.safetensors"):
        (root / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "models" / name).touch()
    lines = install.advise(root)
    assert lines[0].startswith("ComfyUI 0.9.1 is too old") and not any("not found" in line for line in lines)


def test_the_script_succeeds_outside_a_host():
    result = subprocess.run([sys.executable, str(PACK / "install.py")], capture_output=True, text=True)
    assert result.returncode == 0 and "[Step1X-Edit]" in result.stdout
