#!/usr/bin/env python3
"""How often the shipped demo model edits right: `python benchmarks/demo_quality.py`.

Runs held-out edits (scenes the training never saw) through the pack's loaders, encoder, the host's sampler and VAE, and prints success
per kind and language. Success: the asked change is there, checked on the pixels of the known region, and the rest is untouched (mean
absolute error outside at most 0.04). The column "vae" is the same check on the true target after a round trip through the VAE: the ceiling.

With --format the model is converted first. In fp8 and int8 the layers' inputs are rounded, too, as on a GPU. In nvfp4 they are not: a GPU with tensor cores
for it will do worse.
"""

import argparse
import itertools
import platform
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

SCRIPTS = Path(__file__).absolute().parent.parent / "scripts"
sys.path[:0] = [str(SCRIPTS / "support"), str(SCRIPTS)]
import convert
import demo_model
import environment


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=demo_model.FOLDER)
    parser.add_argument(
        "--format",
        choices=convert.CHOICES,
        help="measure a copy that scripts/convert.py makes (default: the file as it is)",
    )
    parser.add_argument("--modulation", nargs="?", const="fp8", help="as for scripts/convert.py")
    parser.add_argument("--region", action="store_true", help="with region denoising at its defaults")
    parser.add_argument("--edits", type=int, default=500, help="number of held-out edits")
    parser.add_argument(
        "--skip", type=int, default=0, help="leave out so many edits at the start, to go on with an earlier run"
    )
    parser.add_argument("--controls", type=int, default=60, help="number of edits with an empty instruction")
    parser.add_argument("--steps", type=int, default=demo_model.STEPS)
    parser.add_argument("--cfg", type=float, default=demo_model.CFG)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of source, result and target to this file")
    return parser.parse_args()


class Demo:
    """The demo model through the product's own code."""

    def __init__(self, models: Path, steps: int, cfg: float, model: Path):
        import comfy.sd
        import comfy.utils

        from step1x_core.host.checkpoints.loading import load_model, load_text_encoder

        self.model = load_model(model)
        self.clip = load_text_encoder(demo_model.find(models, demo_model.MLLM_FILE))
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(demo_model.find(models, demo_model.VAE_FILE))))
        self.steps, self.cfg = steps, cfg

    def edit(self, pixels, instruction: str, seed: int):
        """uint8 [H, W, 3] and an instruction -> uint8 [H, W, 3]."""
        from step1x_core.host.prompts.encoding import decode_edit
        from step1x_core.images import from_uint8, truncate_uint8

        out = self.latent(pixels, instruction, seed)
        return truncate_uint8(decode_edit(self.vae, out, from_uint8(pixels)[None])[0]).numpy()

    def latent(self, pixels, instruction: str, seed: int) -> dict:
        """uint8 [H, W, 3] and an instruction -> the sampled latent."""
        from step1x_core.host.prompts.encoding import encode_edit
        from step1x_core.host.sampling.sampler import flow_sigmas, sample
        from step1x_core.images import from_uint8

        image = from_uint8(pixels)[None]
        level = round((pixels.shape[0] * pixels.shape[1]) ** 0.5)
        positive, negative, latent = encode_edit(self.clip, self.vae, image, instruction, "", level)
        return sample(
            self.model,
            positive,
            negative,
            latent,
            flow_sigmas(self.steps, latent["samples"]),
            self.cfg,
            seed,
            callback=lambda *args: None,
        )

    def round_trip(self, pixels):
        """uint8 [H, W, 3] through the VAE and back."""
        from step1x_core.images import from_uint8, truncate_uint8

        return truncate_uint8(self.vae.decode(self.vae.encode(from_uint8(pixels)[None]))[0]).numpy()


def row(name: str, results: list) -> str:
    def share(values):
        return f"{100 * sum(values) / len(values):6.1f}"

    success, changed, untouched, vae = (
        share([r[key] for r in results]) for key in ("success", "changed", "untouched", "vae")
    )
    outside = sum(r["outside"] for r in results) / len(results)
    return f"{name:<14}{len(results):>6}{success}{changed}{untouched}{vae}{outside:9.4f}"


def main() -> int:
    options = arguments()
    environment.use_host_in_process()
    import comfy.model_management
    import comfy.utils
    import numpy as np
    import torch
    from PIL import Image

    from miniature.scenes import judge, pair_at

    comfy.utils.set_progress_bar_enabled(False)
    model = options.models / "diffusion_models" / demo_model.MODEL_FILE
    # The host loads models in inference mode, too; quantised ones must not be loaded outside of it and used inside.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, torch.inference_mode():
        if options.format:
            # What --supports-fp8-compute sets: without it the CPU would multiply unrounded inputs.
            comfy.model_management.SUPPORT_FP8_OPS = True
            converted = Path(folder) / model.name
            convert.convert(model, converted, options.format, modulation=options.modulation)
            model = converted
        demo = Demo(options.models, options.steps, options.cfg, model)
    if options.region:
        from step1x_core.host.speed.region import apply_region, region_denoiser
        from step1x_core.speed.region import RegionSettings

        demo.model = apply_region(demo.model, RegionSettings())
    groups, errors, strips, shares = defaultdict(list), [], [], []
    started = time.monotonic()
    # The shares of kinds are those of the training data; the controls are drawn apart.
    drawn = ((index, pair_at(options.seed, index, "heldout")) for index in itertools.count())
    edits = itertools.islice(
        ((index, pair) for index, pair in drawn if pair.kind != "none"), options.skip, options.skip + options.edits
    )
    controls = ((index, pair_at(options.seed, index, "heldout", kind="none")) for index in range(options.controls))
    with torch.inference_mode():
        for done, (index, pair) in enumerate(itertools.chain(edits, controls)):
            result, vae = demo.edit(pair.source, pair.instruction, seed=index), demo.round_trip(pair.target)
            verdict = judge(pair, result)
            entry = {
                "success": verdict.success,
                "changed": verdict.changed,
                "untouched": verdict.untouched,
                "outside": verdict.outside_error,
                "vae": judge(pair, vae).success,
            }
            errors.append(np.abs(vae.astype(float) - pair.target).mean() / 255)
            for group in [pair.kind] if pair.kind == "none" else [pair.kind, pair.language, "all edits"]:
                groups[group].append(entry)
            if options.region:
                shares.append(region_denoiser(demo.model).share)
            if len(strips) < 48:
                strips.append(np.concatenate((pair.source, result, pair.target), axis=1))
            print(f"\r{done + 1}/{options.edits + options.controls}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if options.sheet:
        rows = [np.concatenate(strips[i:i + 4], axis=1) for i in range(0, len(strips) - len(strips) % 4, 4)]
        Image.fromarray(np.concatenate(rows)).save(options.sheet)

    print(
        f"{options.edits} held-out edits and {options.controls} controls, 128x128, {options.steps} steps, CFG {options.cfg}, seed {options.seed}, "
        f"{options.format or 'as shipped'}; "
        f"torch {torch.__version__}, {platform.machine()} CPU, {time.monotonic() - started:.0f} s"
    )
    print(f"VAE round trip of the targets: mean absolute error {sum(errors) / len(errors):.4f}")
    if options.region:
        print(
            f"Region denoising: {100 * sum(shares) / len(shares):.1f} % of the picture and reference tokens computed, median {100 * sorted(shares)[len(shares) // 2]:.1f} %"
        )
    print(
        f"{'':<14}{'edits':>6}{'succ.':>6}{'chang':>6}{'untch':>6}{'vae':>6}{'outside':>9}   (percent; outside: mean absolute error)"
    )
    order = ["all edits", "en", "zh", *sorted(set(groups) - {"all edits", "en", "zh", "none"}), "none"]
    for name in order:
        if name in groups:
            print(row(name, groups[name]))
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
