#!/usr/bin/env python3
"""Speed and memory of region denoising with the full-size model: `python benchmarks/gpu_region.py`.

The weights are random, so they edit everywhere; an inpainting mask says which part of the picture the edit has, a square in its middle. "reuse 0" computes the
region in every step; at the node's default some steps may be left out, and how many has to do with the weights: with random ones it tells nothing about real ones.
Every time is the median of repeated runs after a warm-up. `--tiny` runs the same code with a miniature model, on a CPU too.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment
from gpu_edit import Clock, made_up_conditioning, models_folder, write_models


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", choices=("v1.1", "v1.2"), default="v1.1")
    parser.add_argument("--fp8", action="store_true", help="weight_dtype fp8_scaled in place of bf16")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 768, 1024], help="size levels of square pictures")
    parser.add_argument(
        "--parts", nargs="+", type=float, default=[0.05, 0.1, 0.25, 0.5], help="edited parts of the picture"
    )
    parser.add_argument("--reuse", nargs="+", type=float, default=[0.0], help="values of the node's input")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a miniature model")
    parser.add_argument(
        "--models", type=Path, help="keep the checkpoint in this folder, or take the one that an earlier run kept there"
    )
    return parser.parse_args()


def square(size: int, part: float):
    """A mask [1, 1, size, size] of ones in a square of this part of the area, in the middle."""
    import torch

    mask, side = torch.zeros(1, 1, size, size), round(size * part**0.5)
    start = (size - side) // 2
    mask[..., start:start + side, start:start + side] = 1
    return mask


def measure(model, options, size: int, mask) -> dict[str, float]:
    """Seconds of sampling and the peak of the card's memory in GiB."""
    import torch

    from step1x_core.host.sampling.sampler import flow_sigmas, sample

    width = model.model.diffusion_model.connector.S.c_embedder.linear_1.in_features
    positive, negative, latent = made_up_conditioning(options.version, size, width)
    if mask is not None:
        latent["noise_mask"] = mask
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.repeats + 1):
        times = {}
        with Clock(times, "sample"):
            sample(
                model,
                positive,
                negative,
                latent,
                flow_sigmas(options.steps, latent["samples"]),
                options.cfg,
                0,
                callback=lambda *args: None,
            )
        seconds.append(times["sample"])
    return {"seconds": statistics.median(seconds[1:] or seconds),
            "memory": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")}


def main() -> int:
    options = arguments()
    import torch

    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    import comfy.model_management
    import comfy.utils
    from comfyui_version import __version__ as host_version

    from step1x_core.host.checkpoints.loading import load_model
    from step1x_core.host.speed.region import apply_region, region_denoiser
    from step1x_core.speed.region import RegionSettings

    comfy.utils.set_progress_bar_enabled(False)
    device = comfy.model_management.get_torch_device()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{card}, torch {torch.__version__}, ComfyUI {host_version}, Step1X-Edit {options.version}{' (miniature)' if options.tiny else ''}, "
        f"{'fp8_scaled' if options.fp8 else 'bf16'}, {options.steps} steps, CFG {options.cfg}, {options.repeats} runs after a warm-up"
    )
    print(f"{'size':>5}{'edited':>8}{'reuse':>7}{'tokens':>8}{'seconds':>9}{'faster':>8}{'GiB':>7}")
    with models_folder(options.models) as folder, torch.inference_mode():
        path = write_models(
            folder, options.version, options.tiny, device, only_sampling=True
        )["transformer"]
        model = load_model(path, options.version, quantise="fp8" if options.fp8 else None)
        for size in options.sizes:
            plain = measure(model, options, size, None)
            print(
                f"{size:>5}{'exact':>8}{'-':>7}{1:8.1%}{plain['seconds']:9.2f}{1:8.2f}{plain['memory']:7.1f}",
                flush=True,
            )
            for part in options.parts:
                for reuse in options.reuse:
                    patched = apply_region(model, RegionSettings(similarity=1.0, reuse=reuse))
                    result = measure(patched, options, size, square(size, part))
                    print(
                        f"{size:>5}{part:8.0%}{reuse:7.2f}{region_denoiser(patched).share:8.1%}{result['seconds']:9.2f}{plain['seconds'] / result['seconds']:8.2f}"
                        f"{result['memory']:7.1f}",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
