"""Many edits in one host process, also of several versions in its queue: memory stays where it is, and equal seeds give equal pictures to the end.

Two cycles of all versions, sizes and seeds; `STEP1X_SOAK=200 python scripts/test.py -k soak` makes 200 edits.
"""

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tiny_models
from comfy_server import Client, ComfyServer, install_pack
from conftest import PACK
from PIL import Image

# Every edit comes again after 36 others.
CYCLE = 36
EDITS = int(os.environ.get("STEP1X_SOAK", 2 * CYCLE))
# Relative to the resident memory after the first cycle.
GROWTH = 0.05
SIZES = {"wide.png": (96, 64), "tall.png": (60, 130), "square.png": (100, 100)}
MODELS = {"v1.0": tiny_models.V10_FILE, "v1.1": tiny_models.V11_FILE, "v1.2": tiny_models.V12_FILE}
# So often everything is unloaded and forgotten, as 'Unload Models' and 'Free model and node cache' in the menu do.
FREE_EVERY = CYCLE // 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("soak")
    tiny_models.write_all(base / "models")
    install_pack(base)
    with ComfyServer(Path(os.environ["STEP1X_COMFYUI"]), base) as running, Image.open(PACK / "assets" / "coffee.jpg") as photo:
        for name, size in SIZES.items():
            photo.resize(size).save(base / name)
            Client(running.url).upload_image(base / name, name)
        yield running


def edit_prompt(version: str, picture: str, seed: int, size_level: int) -> dict:
    """An edit with one of the models. The loaders of all of them are in every prompt, so that the host keeps what they loaded."""
    layout = "v1.2" if version == "v1.2" else "v1.1"
    nodes = {
        f"model {name}": ("Step1XEditLoader", {"unet_name": file, "version": name, "weight_dtype": "default"})
        for name, file in MODELS.items()
    }
    nodes |= {
        f"mllm {name}": ("Step1XEditMLLM", {"clip_name": tiny_models.MLLM_FILE, "device": "default", "version": name})
        for name in ("v1.1", "v1.2")
    }
    nodes |= {
        "vae": ("VAELoader", {"vae_name": tiny_models.VAE_FILE}),
        "image": ("LoadImage", {"image": picture}),
        "encode": (
            "Step1XEditEncode",
            {
                "clip": [f"mllm {layout}", 0],
                "vae": ["vae", 0],
                "image": ["image", 0],
                "prompt": "make it red",
                "negative_prompt": "",
                "size_level": size_level,
            },
        ),
        "sampler": (
            "Step1XEditSampler",
            {
                "model": [f"model {version}", 0],
                "positive": ["encode", 0],
                "negative": ["encode", 1],
                "latent_image": ["encode", 2],
                "seed": seed,
                "steps": 1,
                "cfg": 2.0,
                "sampler_name": "euler",
                "denoise": 1.0,
            },
        ),
        "decode": ("Step1XEditDecode", {"samples": ["sampler", 0], "vae": ["vae", 0], "source": ["image", 0]}),
        "save": ("PreviewImage", {"images": ["decode", 0]}),
    }
    return {name: {"class_type": class_type, "inputs": inputs} for name, (class_type, inputs) in nodes.items()}


def digest(run) -> str:
    with Image.open(io.BytesIO(run.images[0])) as picture:
        return hashlib.sha256(picture.tobytes()).hexdigest()


def test_prompts_of_different_versions_in_the_queue_get_each_its_own_result(server):
    prompts = [edit_prompt(version, "wide.png", 5, size_level=64) for version in ("v1.1", "v1.2", "v1.0", "v1.2")]
    client = Client(server.url, server.log)
    alone = [digest(client.run(prompt)) for prompt in prompts[:3]]
    client.free()
    # The first has to load its models, so the others wait for it.
    with ThreadPoolExecutor(len(prompts)) as clients:
        together = [digest(run) for run in clients.map(lambda prompt: Client(server.url, server.log).run(prompt), prompts)]
    assert len(set(alone)) == 3 and together == [*alone, alone[1]]


@pytest.mark.once
def test_many_edits_cost_no_memory_and_equal_seeds_stay_equal(server):
    client = Client(server.url, server.log)
    process = psutil.Process(server.process.pid)
    resident, pictures = {}, {}
    for number in range(1, EDITS + 1):
        # The three cycles are of different lengths: every version meets every size.
        version, picture, seed = [*MODELS][number % 3], [*SIZES][number // 3 % 3], number % 4
        run = client.run(edit_prompt(version, picture, seed, size_level=64 + 32 * (number % 2)))
        assert "sampler" in run.executed
        pictures.setdefault((version, picture, seed), set()).add(digest(run))
        resident[number] = process.memory_info().rss
        if number % FREE_EVERY == FREE_EVERY // 2:
            client.free()
    assert all(len(found) == 1 for found in pictures.values()) and len(set.union(*pictures.values())) == len(pictures)
    assert resident[EDITS] < (1 + GROWTH) * resident[CYCLE], resident
