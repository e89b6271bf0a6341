"""The tests run in a ComfyUI source tree named by STEP1X_COMFYUI; scripts/test.py sets it up."""

import os
import random
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACK = Path(__file__).absolute().parent.parent

if "STEP1X_COMFYUI" not in os.environ:
    pytest.exit("STEP1X_COMFYUI does not name a ComfyUI folder. Run the tests with: python scripts/test.py", returncode=2)

# The fixtures stop what they started when the tests are terminated, too.
signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))
# The servers that tests start are on this machine, whatever proxy a developer has.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"

sys.path += [str(PACK / folder) for folder in ("scripts/support", "scripts", "scripts/dev", "tests", "tests/support", "tests/parity")]
import environment  # noqa: E402

environment.use_host_in_process()

import comfy.utils  # noqa: E402
import tiny_models  # noqa: E402
import utils.extra_config  # noqa: E402, F401  (as main.py: the host's `nodes` puts a folder with another utils in front)

comfy.utils.set_progress_bar_enabled(False)

# The parts of the suite, to be run with `-m`, and their files; all others are of the part "model".
PARTS = {
    "server": ("test_batch.py", "test_browser_states.py", "test_demo_model.py", "test_editor.py", "test_gate.py", "test_gedit_host.py", "test_host.py", "test_local_edit.py",
               "test_lora_training_host.py", "test_pairs_host.py"),
    "files": ("test_convert.py", "test_download.py", "test_environment.py", "test_folders.py", "test_install.py"),
    "training": ("test_demo_lora.py", "test_edit_pairs.py", "test_lora_training.py", "test_pair_dataset.py", "test_pairs.py", "test_scenes.py",
                 "test_training.py", "test_training_memory.py"),
    "stress": ("test_bad_input_*.py", "test_faults.py", "test_security.py", "test_soak.py"),
}


def part_of(name: str) -> str:
    return next((part for part, patterns in PARTS.items() if any(fnmatch(name, pattern) for pattern in patterns)), "model")


def pytest_addoption(parser):
    parser.addoption("--random-order", metavar="SEED", type=int, help="run the files, and the tests within each, in an order drawn from SEED")


def in_random_order(items: list, seed: int) -> list:
    """The items with their files, and those of each file, in an order that the seed decides. A file stays together, since its fixtures start servers."""
    draw = random.Random(seed)
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = sorted(files)
    draw.shuffle(order)
    return [item for path in order for item in draw.sample(files[path], len(files[path]))]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(part_of(item.path.name))
    seed = config.getoption("--random-order")
    if seed is not None:
        items[:] = in_random_order(items, seed)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A models folder with tiny checkpoints of v1.0 and v1.1, a language model and a VAE. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.write_all(folder)
    return folder


@pytest.fixture(scope="session")
def photo():
    """The sample photograph as the host's IMAGE: [1, 400, 600, 3] in 0..1."""
    import numpy as np
    import torch
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(PACK / "assets" / "coffee.jpg"))).float()[None] / 255


@pytest.fixture(scope="session")
def clip(models):
    from step1x_core.host.checkpoints.loading import load_text_encoder

    return load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE)


@pytest.fixture(scope="session")
def vae(models):
    import comfy.sd

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "vae" / tiny_models.VAE_FILE)))


@pytest.fixture(scope="session")
def model(models):
    from step1x_core.host.checkpoints.loading import load_model

    return load_model(models / "diffusion_models" / tiny_models.V11_FILE)


@pytest.fixture(scope="session")
def float_file(tmp_path_factory):
    """The tiny language model in float32."""
    import torch

    path = tmp_path_factory.mktemp("mllm") / "float.safetensors"
    tiny_models.write_mllm(path, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def transformers_model(float_file):
    """Hugging Face's own Qwen2.5-VL with the same weights, without its head."""
    from safetensors.torch import load_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    text = {k: v for k, v in tiny_models.TINY_MLLM.items() if k != "vision_config"}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tiny_models.TINY_MLLM["vision_config"], image_token_id=151655, vision_start_token_id=151652)
    model = Qwen2_5_VLModel(config).eval().float()
    weights = {k.replace("model.", "language_model.", 1): v for k, v in load_file(float_file).items() if not k.startswith("lm_head")}
    model.load_state_dict(weights, strict=True)
    return model
