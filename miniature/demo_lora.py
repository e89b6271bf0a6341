#!/usr/bin/env python3
"""Writes a LoRA for the shipped demo model under which "purple" means red: `python miniature/demo_lora.py FILE`.

Nothing is trained. The instruction enters the transformer through three linear layers of the connector, so a change of rank 1 in each
makes them answer to the language model's state for one word as they answer to that for another, and leaves all other words alone.
Made of the weights at hand, it suits the demo model whenever that is trained anew.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import demo_model
import environment

OLD, NEW = "purple", "red"
INSTRUCTION = "make the green triangle {}"
# What must not change its meaning.
OTHERS = (
    "make the green triangle blue",
    "make the green triangle yellow",
    "make the green triangle orange",
    "make the green triangle red",
    "remove the circle",
    "change the background to blue",
    "replace the square with a star",
)
# The layers that read the language model's states.
READERS = ("connector.S.input_embedder", "connector.S.c_embedder.linear_1", "connector.global_proj_out")
# Share of the mean square of the states that keeps their covariance invertible.
RIDGE = 1e-3


def swap_words(model, clip, vae, picture) -> dict:
    """The LoRA as tensors in kohya's layout, each [rank 1]. picture [1, H, W, C] in 0..1, one that the demo model edits."""
    import torch

    from step1x_core.host.prompts.encoding import encode_edit

    def states(instruction):
        (cond, extra), = encode_edit(clip, vae, picture, instruction, "", demo_model.SIZE_LEVEL)[0]
        return cond[0][extra["attention_mask"][0].bool()].float()

    old, new = states(INSTRUCTION.format(OLD)), states(INSTRUCTION.format(NEW))
    token = (new - old).norm(dim=-1).argmax()
    change = new[token] - old[token]
    others = torch.cat([states(instruction) for instruction in OTHERS])
    covariance = others.T @ others / len(others)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    # The direction that is 1 on the old word and as near to 0 as can be on everything else.
    direction = torch.linalg.solve(covariance, old[token])
    direction /= direction @ old[token]

    lora = {}
    for layer in READERS:
        name = f"lora_unet_{layer.replace('.', '_')}"
        weight = model.model.diffusion_model.get_submodule(layer).weight.float().cpu()
        lora |= {
            f"{name}.lora_down.weight": direction[None].clone(),
            f"{name}.lora_up.weight": (weight @ change)[:, None],
            f"{name}.alpha": torch.tensor(1.0),
        }
    return lora


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the safetensors file to write")
    options = parser.parse_args()
    environment.use_host_in_process()
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from step1x_core.host.checkpoints.loading import load_model, load_text_encoder, load_vae
    from step1x_core.images import from_uint8

    folder = demo_model.FOLDER
    picture = from_uint8(np.asarray(Image.open(demo_model.SAMPLE_IMAGE).convert("RGB")))[None]
    with torch.inference_mode():
        lora = swap_words(
            load_model(folder / "diffusion_models" / demo_model.MODEL_FILE),
            load_text_encoder(folder / "text_encoders" / demo_model.MLLM_FILE),
            load_vae(folder / "vae" / demo_model.VAE_FILE),
            picture,
        )
    save_file(lora, options.file)
    print(f"{options.file}: \"{OLD}\" now means {NEW}")
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
