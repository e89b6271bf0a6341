"""The shipped demo model in this process and in a server, for tests on what edits mean."""

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.utils
import demo_model
import numpy as np
import torch
from comfy_server import Client, ComfyServer, install_pack
from shipped import shipped_prompt

from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.sampling.sampler import flow_sigmas, sample

# Enough for this model, and a third of the time.
STEPS = 6


def load_demo() -> SimpleNamespace:
    folder = demo_model.FOLDER
    return SimpleNamespace(
        model=load_model(folder / "diffusion_models" / demo_model.MODEL_FILE),
        clip=load_text_encoder(folder / "text_encoders" / demo_model.MLLM_FILE),
        vae=comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / "vae" / demo_model.VAE_FILE))),
    )


def edit(demo, image, prompt, seed=42, latent=None, mask=None, denoise=1.0):
    """Picture [1, H, W, 3] -> the edited picture and its latent dict. latent: of the turn before; mask: noise mask [1, 1, h, w]."""
    positive, negative, start = encode_edit(demo.clip, demo.vae, image, prompt, "", demo_model.SIZE_LEVEL, latent)
    if mask is not None:
        start["noise_mask"] = mask
    out = sample(
        demo.model,
        positive,
        negative,
        start,
        flow_sigmas(STEPS, start["samples"], denoise),
        demo_model.CFG,
        seed,
        callback=lambda *args: None,
    )
    return decode_edit(demo.vae, out, image), out


def to_image(pixels) -> torch.Tensor:
    """uint8 [H, W, 3] -> the host's IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.array(pixels)).float()[None] / 255


def to_pixels(image) -> np.ndarray:
    """IMAGE of one picture -> uint8 [H, W, 3], as the host saves it."""
    return (image[0] * 255).clamp(0, 255).to(torch.uint8).numpy()


@contextmanager
def demo_client(base: Path):
    install_pack(base)
    with ComfyServer(Path(os.environ["STEP1X_COMFYUI"]), base, demo_model.FOLDER) as server:
        yield Client(server.url)


def demo_prompt(client, workflow: str, **changes) -> dict:
    """A shipped workflow in API form, set to the demo model."""
    sampling = {"steps": STEPS, "cfg": demo_model.CFG}
    settings = {
        "Step1XEditLoader": {"unet_name": demo_model.MODEL_FILE},
        "Step1XEditMLLM": {"clip_name": demo_model.MLLM_FILE},
        "VAELoader": {"vae_name": demo_model.VAE_FILE},
        "Step1XEditEncode": {"size_level": demo_model.SIZE_LEVEL},
        "Step1XEditSampler": sampling,
        "Step1XEditBatchImages": {"size_level": demo_model.SIZE_LEVEL, **sampling},
    }
    return shipped_prompt(client, workflow, settings, changes)
