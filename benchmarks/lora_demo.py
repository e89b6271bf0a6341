#!/usr/bin/env python3
"""A LoRA teaches the shipped demo model a new edit: `python benchmarks/lora_demo.py`.

The new kind is "draw a thick red line across the middle of the picture", which the demo model was never shown. Pairs of it, and some of the old kinds so that
those are kept, are written as a dataset in the official layout, cached, trained on and tried on held-out scenes, with the nodes' own code. Success of all kinds
is judged on the pixels, by the rules of `miniature/judging.py`, before and after. With --folder an interrupted training goes on where it was.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import demo_model
import environment

INSTRUCTIONS = (
    "draw a thick red line across the middle of the picture",
    "put a red line across the image",
    "cross the picture with a thick red line",
    "在图片中间画一条粗红线",
    "用一条红色的粗线横穿画面",
    "在画面中间加一条红色横线",
)
# Pixels.
LINE = 16
# Between the scenes that are tried for a pair.
STRIDE = 1_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=48, help="number of pairs of the new kind")
    parser.add_argument("--old-pairs", type=int, default=96, help="number of pairs of the old kinds")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--rank", type=int, default=16, help="also the alpha")
    parser.add_argument("--edits", type=int, default=25, help="number of held-out edits of the new kind")
    parser.add_argument("--controls", type=int, default=40, help="number of held-out edits of the old kinds")
    parser.add_argument("--edit-steps", type=int, default=8, help="denoising steps of each edit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where dataset, cache and LoRA go and stay (default: a temporary folder)"
    )
    return parser.parse_args()


def line_pair(seed: int, index: int, split: str):
    """A pair of the new kind on a drawn scene that has nothing where the line goes, as an EditPair."""
    import numpy as np

    from miniature.drawing import COLOURS, things_area
    from miniature.edits import REGION_MARGIN, EditPair
    from miniature.scenes import pair_at

    for attempt in itertools.count():
        drawn = pair_at(seed, index + STRIDE * attempt, split, kind="none")
        target, region = drawn.source.copy(), np.zeros(drawn.source.shape[:2], bool)
        middle = len(target) // 2
        region[middle - LINE // 2 - REGION_MARGIN:middle + LINE // 2 + REGION_MARGIN] = True
        if not things_area(drawn.scene, drawn.scene.things, 0)[region].any():
            break
    target[middle - LINE // 2:middle + LINE // 2] = COLOURS["red"]
    return EditPair(
        drawn.source, target, INSTRUCTIONS[index % len(INSTRUCTIONS)], "line", "", region, drawn.scene, drawn.scene, {}
    )


def write_dataset(folder: Path, pairs: list) -> Path:
    """Pictures and metadata.json in the official layout; returns the latter's path."""
    from PIL import Image

    for name in ("source", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    metadata = {}
    for index, pair in enumerate(pairs):
        for name in ("source", "target"):
            Image.fromarray(getattr(pair, name)).save(folder / name / f"{index:06d}.png")
        metadata[f"target/{index:06d}.png"] = {"ref_image_path": f"source/{index:06d}.png", "caption": pair.instruction}
    path = folder / "metadata.json"
    path.write_text(json.dumps(metadata, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def successes(demo, pairs: list) -> float:
    """Percentage of edits that succeed."""
    from miniature.judging import judge

    done = []
    for index, pair in enumerate(pairs):
        done.append(judge(pair, demo.edit(pair.source, pair.instruction, seed=index)).success)
        print(f"\r{index + 1}/{len(pairs)} edits, {sum(done)} right", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return 100 * sum(done) / len(done)


def main() -> int:
    options = arguments()
    environment.use_host_in_process()
    import comfy.utils
    import demo_quality
    import torch

    from miniature.scenes import pair_at
    from step1x_core.host.checkpoints.lora import apply_lora, load_lora_file
    from step1x_core.host.training.cache import cache_pairs
    from step1x_core.host.training.train import LORA_FILE, train
    from step1x_core.training.dataset import read_pairs
    from step1x_core.training.objective import COSINE, Settings

    comfy.utils.set_progress_bar_enabled(False)
    settings = Settings(
        steps=options.steps,
        learning_rate=options.rate,
        rank=options.rank,
        alpha=options.rank,
        batch=options.batch,
        seed=options.seed,
        schedule=COSINE,
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, torch.inference_mode():
        folder = options.folder or Path(temporary)
        demo = demo_quality.Demo(
            demo_model.FOLDER,
            options.edit_steps,
            demo_model.CFG,
            demo_model.FOLDER / "diffusion_models" / demo_model.MODEL_FILE,
        )
        new = [line_pair(options.seed, index, "heldout") for index in range(options.edits)]
        old = [pair_at(options.seed, index, "heldout") for index in range(options.controls)]
        before = successes(demo, new), successes(demo, old)

        started = time.monotonic()
        drawn = [line_pair(options.seed, index, "train") for index in range(options.pairs)]
        drawn += [pair_at(options.seed, index) for index in range(options.old_pairs)]
        dataset, _ = cache_pairs(
            demo.clip, demo.vae, read_pairs(write_dataset(folder, drawn)), folder, demo_model.SIZE_LEVEL
        )
        cached = time.monotonic()
        run = train(
            demo.model,
            dataset,
            settings,
            folder / "run",
            save_every=50,
            report=lambda run: print(
                f"\rstep {run.step}/{options.steps}, loss {run.losses[-1]:.4f}", end="", file=sys.stderr, flush=True
            ),
        )
        print(file=sys.stderr)
        trained = time.monotonic()
        demo.model = apply_lora(demo.model, load_lora_file(folder / "run" / LORA_FILE), 1.0)
        after = successes(demo, new), successes(demo, old)

    tenth = max(1, run.step // 10)
    first, last = (sum(losses) / tenth for losses in (run.losses[:tenth], run.losses[-tenth:]))
    print(
        f"{len(dataset.pairs)} pairs, {run.step} steps of {options.batch}, rank {options.rank}, learning rate {options.rate}, seed {options.seed}, "
        f"{options.edit_steps} denoising steps; torch {torch.__version__}, CPU"
    )
    print(
        f"caching {cached - started:.0f} s, training {trained - cached:.0f} s; mean loss {first:.4f} in the first tenth of the steps, {last:.4f} in the last"
    )
    for name, number, first, last in (
        ("new kind", options.edits, before[0], after[0]),
        ("old kinds", options.controls, before[1], after[1]),
    ):
        print(f"{name:<10} {number:>4} held-out edits: {first:5.1f} % right before, {last:5.1f} % after")
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
