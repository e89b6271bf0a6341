#!/usr/bin/env python3
"""What skipping work costs in quality: `python benchmarks/step_savings.py`.

Edits held-out pictures of the demo model (see demo_quality.py for what counts as success) with TeaCache, EasyCache, LazyCache and guidance intervals, and
prints beside the success how much of the blocks' work was done. On a graphics card where there is one, else on the CPU.
"""

import argparse
import itertools
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import demo_model
import demo_quality
import environment


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=40, help="number of held-out edits for each setting")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=demo_model.CFG)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--teacache", nargs="*", type=float, default=[0.2, 0.3, 0.4, 0.6], help="thresholds")
    parser.add_argument(
        "--easycache", nargs="*", type=float, default=[0.1, 0.2, 0.3], help="thresholds of the stock EasyCache"
    )
    parser.add_argument("--lazycache", nargs="*", type=float, default=[0.2], help="thresholds of the stock LazyCache")
    parser.add_argument(
        "--interval", nargs="*", type=float, default=[0.7, 0.5, 0.3], help="parts of the steps that are guided"
    )
    parser.add_argument(
        "--both",
        nargs="*",
        type=float,
        default=[0.3, 0.5],
        metavar="THRESHOLD INTERVAL",
        help="pairs of a TeaCache threshold and a guided part",
    )
    parser.add_argument("--presets", action="store_true", help="the presets of Step1X-Edit Speed as well")
    parser.add_argument(
        "--fp8", action="store_true", help="all settings with fp8_scaled weights (on a card that multiplies them)"
    )
    parser.add_argument("--fp8-attention", action="store_true", help="all settings with fp8 attention, too")
    return parser.parse_args()


def settings(options, model) -> dict:
    """Patched models by name."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    from step1x_core.host.sampling.sampler import set_guidance_interval
    from step1x_core.host.speed.presets import apply_speed
    from step1x_core.host.speed.teacache import apply_teacache
    from step1x_core.speed.presets import PRESETS

    pairs = list(zip(options.both[::2], options.both[1::2]))
    return {
        "exact": model,
        **{f"TeaCache {value:g}": apply_teacache(model, value) for value in options.teacache},
        **{
            f"EasyCache {value:g}": EasyCacheNode.execute(model, value, 0.15, 0.95, False).args[0]
            for value in options.easycache
        },
        **{
            f"LazyCache {value:g}": LazyCacheNode.execute(model, value, 0.15, 0.95, False).args[0]
            for value in options.lazycache
        },
        **{f"guided {value:g}": set_guidance_interval(model, 0.0, value) for value in options.interval},
        **{
            f"TeaCache {value:g}, guided {part:g}": set_guidance_interval(apply_teacache(model, value), 0.0, part)
            for value, part in pairs
        },
        **{f"preset {name}": apply_speed(model, name, PRESETS[name]) for name in (PRESETS if options.presets else ())},
    }


def main() -> int:
    options = arguments()
    import torch

    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    import comfy.utils

    from miniature.scenes import judge, pair_at
    from step1x_core.host.checkpoints.loading import load_model
    from step1x_core.host.speed.fp8_attention import set_fp8_attention

    comfy.utils.set_progress_bar_enabled(False)
    with torch.inference_mode():
        path = demo_model.FOLDER / "diffusion_models" / demo_model.MODEL_FILE
        demo = demo_quality.Demo(demo_model.FOLDER, options.steps, options.cfg, path)
        if options.fp8:
            demo.model = load_model(path, quantise="fp8")
        if options.fp8_attention:
            demo.model = set_fp8_attention(demo.model)
        drawn = ((index, pair_at(options.seed, index, "heldout")) for index in itertools.count())
        edits = list(itertools.islice(((index, pair) for index, pair in drawn if pair.kind != "none"), options.edits))
        rows = 0

        def count(module, args, kwargs):
            nonlocal rows
            rows += len(args[0])

        demo.model.model.diffusion_model.single_blocks[0].register_forward_pre_hook(count, with_kwargs=True)
        print(
            f"{options.edits} held-out edits of 128x128, {options.steps} steps, CFG {options.cfg}, seed {options.seed}{', fp8 weights' if options.fp8 else ''}"
            f"{', fp8 attention' if options.fp8_attention else ''}; torch {torch.__version__}, "
            f"{torch.cuda.get_device_name() if torch.cuda.is_available() else f'{platform.machine()} CPU'}"
        )
        print(
            f"{'':<28}{'success':>8}{'outside':>9}{'work':>7}   (percent of edits; mean absolute error outside the edit; percent of the exact path's block runs)"
        )
        for name, model in settings(options, demo.model).items():
            demo.model, rows = model, 0
            verdicts = [judge(pair, demo.edit(pair.source, pair.instruction, seed=index)) for index, pair in edits]
            print(
                f"{name:<28}{100 * sum(v.success for v in verdicts) / len(edits):8.1f}{sum(v.outside_error for v in verdicts) / len(edits):9.4f}"
                f"{100 * rows / (2 * options.steps * len(edits)):7.1f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
