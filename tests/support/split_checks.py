#!/usr/bin/env python3
"""Edits split over two devices against plain ones, with each node of the pack: `python tests/support/split_checks.py` on a machine with two graphics cards.

test_multigpu.py does the same with two names of the CPU, which cannot show a tensor on the wrong card.
"""

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).absolute().parents[2] / "scripts" / "support")]
    import environment

    environment.reexecute_in_host(__file__)
    import torch

    if torch.cuda.device_count() < 2:
        sys.exit("These checks need two graphics cards.")
    environment.use_host_in_process(cpu=False)

import comfy.model_management
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.sampling.sampler import flow_sigmas, sample, set_guidance_interval, set_norm_limiter
from step1x_core.host.speed.region import apply_region
from step1x_core.host.speed.teacache import apply_teacache
from step1x_core.sampling.guidance import NormLimiter
from step1x_core.speed.region import RegionSettings

STEPS = 8
PATCHES = {
    "nothing": lambda model: model,
    "limiter": lambda model: set_norm_limiter(model, NormLimiter(0.5, 0.8)),
    "interval": lambda model: set_guidance_interval(model, 0.2, 0.7),
    "teacache": lambda model: apply_teacache(model, 0.2),
    "region": lambda model: apply_region(model, RegionSettings(similarity=-0.15, reuse=0.0)),
    "interval and teacache": lambda model: apply_teacache(set_guidance_interval(model, 0.0, 0.5), 0.2),
}


def split(model):
    """The model behind the stock MultiGPU CFG Split, on two devices."""
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    return MultiGPUCFGSplitNode.execute(model, 2).args[0]


def loud_model(folder: Path, version: str, **options):
    """A tiny model whose guidance differences are large enough for the norm limiter to act."""
    path = folder / f"{version.replace('.', 'p')}.safetensors"
    tiny_models.write_transformer(path, version)
    weights = load_file(path)
    weights["final_layer.linear.weight"] *= 5
    save_file(weights, path)
    return load_model(path, version, **options)


def run(model, steps=STEPS, cfg=6.0, seed=7):
    positive, negative, latent = tiny_models.made_up_edit(
        model.model.diffusion_model.version, 24, (300, 200), tiny_models.TINY_TRANSFORMER.text
    )
    return sample(
        model, positive, negative, latent, flow_sigmas(steps, latent["samples"]), cfg, seed, callback=lambda *args: None
    )["samples"]


def difference(a, b) -> float:
    """Largest difference, as a part of the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def main() -> int:
    wrong = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for version in ("v1.1", "v1.2"):
            for dtype, allowed in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
                model = loud_model(Path(folder), version, model_options={"dtype": dtype})
                both = split(model)
                print(version, dtype, [str(part.load_device) for part in (model, *both.get_additional_models_with_key("multigpu"))])
                # In bfloat16 a last bit can change what TeaCache and region denoising decide.
                for name in PATCHES if dtype == torch.float32 else ("nothing", "limiter", "interval"):
                    found = difference(run(PATCHES[name](both)), run(PATCHES[name](model)))
                    print(f"  {name}: {found:.1e}")
                    wrong += [(version, dtype, name)] if not found < allowed else []
                # The host looks for an earlier copy among its loaded models, and stumbles over those that are gone.
                del model, both
                comfy.model_management.unload_all_models()
                comfy.model_management.cleanup_models()
    print("attention kernels in this order:", torch._C._get_sdp_priority_order())
    print(f"wrong: {wrong}" if wrong else "all edits agree")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
