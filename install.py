"""Run by ComfyUI-Manager after an installation: looks around and advises. Installs nothing, downloads nothing, always succeeds.

It looks into ComfyUI's own models folder only; folders named in extra_model_paths.yaml are not read.
"""

import importlib.util
import re
from pathlib import Path

PACK = Path(__file__).absolute().parent
OLDEST_COMFYUI = (0, 18, 2)

# What an edit needs: the models folder, names that fit, and where a file comes from.
NEEDED = (
    ("Step1X-Edit model", ("diffusion_models", "unet", "diffusers"), r"step1x", "step1x-edit-v1p1-official.safetensors, from the Hugging Face repository stepfun-ai/Step1X-Edit"),
    ("Qwen2.5-VL-7B", ("text_encoders", "clip"), r"qwen.?2\.5.?vl.?7b", "qwen_2.5_vl_7b.safetensors (or the fp8_scaled one), from Comfy-Org/Qwen-Image_ComfyUI"),
    ("FLUX VAE", ("vae",), r"^ae\.|flux|step1x", "ae.safetensors, the FLUX VAE"),
)


def comfyui_version(root: Path) -> tuple[int, ...] | None:
    """The version in a ComfyUI folder's comfyui_version.py; None where there is none."""
    file = root / "comfyui_version.py"
    match = re.search(r'"(\d+(?:\.\d+)*)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return tuple(map(int, match[1].split("."))) if match else None


def find_model(models: Path, folders: tuple[str, ...], pattern: str) -> Path | None:
    for folder in folders:
        for path in sorted((models / folder).glob("*")):
            if re.search(pattern, path.name, re.IGNORECASE) and (path.is_dir() or path.suffix == ".safetensors"):
                return path
    return None


def advise(root: Path) -> list[str]:
    """What a user should know about the ComfyUI in `root`, line by line."""
    lines = []
    version = comfyui_version(root)
    if version is None:
        lines.append(f"{root} is not a ComfyUI folder. Put this pack into ComfyUI/custom_nodes.")
    elif version < OLDEST_COMFYUI:
        lines.append(f"ComfyUI {'.'.join(map(str, version))} is too old: update it to {'.'.join(map(str, OLDEST_COMFYUI))} or newer.")
    if importlib.util.find_spec("torch") is None:
        lines.append("torch is not installed for this Python. Run install.py with the Python that starts ComfyUI.")
    for name, folders, pattern, source in NEEDED:
        found = find_model(root / "models", folders, pattern)
        if found is not None:
            lines.append(f"{name}: {found.relative_to(root)}")
        else:
            lines.append(f"{name}: not found in models/ (folders of extra_model_paths.yaml are not searched). Where you lack it, put it into models/{folders[0]}: {source}.")
    return lines


if __name__ == "__main__":
    for line in advise(PACK.parent.parent):
        print(f"[Step1X-Edit] {line}")
