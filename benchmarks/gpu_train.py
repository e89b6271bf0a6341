#!/usr/bin/env python3
"""Memory and speed of LoRA training with the full-size model: `python benchmarks/gpu_train.py`.

Weights, latents and conditionings are random, which costs the same as real ones; pairs, training and loading are the pack's own. The memory is the most that all
tensors on the card take together while training, weights included, once the model is read. `--tiny` runs the same code with a miniature model, on a CPU too.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment
from gpu_edit import Clock, made_up_conditioning, models_folder, write_models

WEIGHT_DTYPES = ("default", "float8_e4m3fn", "fp8_scaled")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", choices=("v1.1", "v1.2"), default="v1.1")
    parser.add_argument("--weight-dtype", choices=WEIGHT_DTYPES, default="float8_e4m3fn")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 768, 1024], help="size levels of square pictures")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="the first one is not timed")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also with the blocks' tokens left on the card, as before they were moved to main memory",
    )
    parser.add_argument("--tiny", action="store_true", help="a miniature model")
    parser.add_argument(
        "--models", type=Path, help="keep the checkpoint in this folder, or take the one that an earlier run kept there"
    )
    return parser.parse_args()


def made_up_dataset(folder: Path, version: str, size: int, width: int):
    """Two cached pairs of random numbers, as an EditDataset. width: channels of the language model's states."""
    import torch

    from step1x_core.training.cache import Cache, CachedPair, EditDataset, pack_conditioning
    from step1x_core.training.dataset import EditPair

    cache = Cache(folder)
    conditioning, _, latent = made_up_conditioning(version, size, width)
    cache.store("text", pack_conditioning(conditioning))
    for number in range(3):
        cache.store(
            f"latent{number}",
            {"latent": torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(number))},
        )
    pairs = [
        CachedPair(
            EditPair(folder, folder, ""), "text", "latent0", f"latent{number}", tuple(latent["samples"].shape[-2:])
        )
        for number in (1, 2)
    ]
    return EditDataset(cache, pairs)


def measure(model, options, settings, size: int, folder: Path) -> dict[str, float]:
    """Seconds of a step and the peaks of the card's memory in GB of 10^9 bytes."""
    import torch

    from step1x_core.host.training.train import train

    width = model.model.diffusion_model.connector.S.c_embedder.linear_1.in_features
    dataset = made_up_dataset(folder / f"cache{size}", options.version, size, width)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    Clock.wait()
    moments = []

    def note(run) -> None:
        Clock.wait()
        moments.append(time.perf_counter())

    losses = train(model, dataset, settings, folder / "run", resume=False, report=note).losses
    if not all(loss == loss for loss in losses):
        raise FloatingPointError(f"A loss of size {size} is no number.")
    out = {"step": statistics.median(later - earlier for earlier, later in zip(moments, moments[1:]))}
    if torch.cuda.is_available():
        out |= {
            "allocated": torch.cuda.max_memory_allocated() / 1e9,
            "reserved": torch.cuda.max_memory_reserved() / 1e9,
        }
    return out


def main() -> int:
    options = arguments()
    import torch

    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    import comfy.model_management
    from comfyui_version import __version__ as host_version

    from step1x_core.host.checkpoints.loading import load_model
    from step1x_core.training.objective import Settings

    device = comfy.model_management.get_torch_device()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    settings = Settings(max(2, options.steps), rank=options.rank, batch=options.batch)
    save_on_cpu = torch.autograd.graph.save_on_cpu
    places = {"main memory": save_on_cpu} | ({"card": lambda **kwargs: nullcontext()} if options.compare else {})
    print(
        f"{card}, torch {torch.__version__}, ComfyUI {host_version}, Step1X-Edit {options.version}{' (miniature)' if options.tiny else ''}, "
        f"weights {options.weight_dtype}, rank {options.rank}, batch {options.batch}, {settings.steps} steps"
    )
    print(f"{'size':>5}  {'tokens wait in':<14}{'s a step':>9}{'allocated':>22}{'reserved':>22}")
    with models_folder(options.models) as folder, tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        path = write_models(
            folder, options.version, options.tiny, device, only_sampling=True
        )["transformer"]
        dtype = {"dtype": torch.float8_e4m3fn} if options.weight_dtype == "float8_e4m3fn" else {}
        quantise = "fp8" if options.weight_dtype == "fp8_scaled" else None
        model = load_model(path, options.version, dtype, quantise=quantise)
        for size in options.sizes:
            for place, context in places.items():
                torch.autograd.graph.save_on_cpu = context
                result = measure(model, options, settings, size, Path(temporary))
                peaks = "".join(
                    f"{f'{result[name]:.2f} GB = {result[name] * 1e9 / 2**30:.2f} GiB':>22}"
                    if name in result
                    else f"{'-':>22}"
                    for name in ("allocated", "reserved")
                )
                print(f"{size:>5}  {place:<14}{result['step']:9.2f}{peaks}", flush=True)
    torch.autograd.graph.save_on_cpu = save_on_cpu
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
