"""The miniature model that is shipped with the pack (miniature/weights)."""

from pathlib import Path

from environment import PACK

FOLDER = PACK / "miniature" / "weights"
MODEL_FILE = "step1x-edit-demo.safetensors"
MLLM_FILE = "qwen_2.5_vl_demo.safetensors"
VAE_FILE = "ae_demo.safetensors"


def find(folder: Path, name: str) -> Path:
    """A file of this model, or of another miniature, in a folder at any depth."""
    return next(folder.rglob(name), folder / name)


# What it was made for: pictures of 128x128 pixels.
SIZE_LEVEL = 128
STEPS = 20
CFG = 1.5

# What the demo does with it. The picture is one the model was not trained on.
SAMPLE_IMAGE = PACK / "assets" / "scene.png"
SAMPLE_PROMPT = "make the green triangle purple"

# A LoRA that makes the same edits in FAST_STEPS steps at CFG 1 (miniature/few_steps.py).
FAST_FILE = FOLDER / "loras" / "step1x-edit-demo-fast.safetensors"
FAST_STEPS = 4
