#!/usr/bin/env python3
"""Distils few-step LoRAs for the shipped demo model: `python miniature/few_steps.py all FOLDER --out OUT --seconds 300`.

`prepare` draws sources with instructions, encodes them and samples the teacher's trajectories; `train` distils one LoRA; `all` does both for several kinds of
LoRAs at once, each in processes of its own, spread over the GPUs, and measures them with benchmarks/few_steps.py. What is in the folder is not made again.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

PACK = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(PACK / "scripts" / "support"))
import demo_model
import environment
from few_step_jobs import KINDS, all_kinds, prepare_all

RANK = 32
# Points of a trajectory: those of students of 1, 2 and 4 steps.
GRID = 4
WARM_UP = 30


class Enough(Exception):
    """The time for a training is over."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("prepare", "train", "all"))
    parser.add_argument("folder", type=Path, help="where sources, encodings and trajectories go and stay")
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRAs, one for each kind")
    parser.add_argument("--pairs", type=int, default=2400, help="number of sources, each with one instruction")
    parser.add_argument("--noises", type=int, default=3, help="trajectories of each source")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="LoRAs to make")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--steps", type=int, help="steps of the training (default: as many as --seconds allows)")
    parser.add_argument("--seconds", type=float, default=400, help="time for all of it, or for `train`")
    parser.add_argument("--ground", choices=("scenes", "photographs"), default="scenes", help="what is edited")
    parser.add_argument("--pictures", type=Path, help="folder of the photographs (default: scikit-image's own)")
    parser.add_argument("--models", type=Path, default=demo_model.FOLDER, help="folder of the miniature")
    parser.add_argument("--prepared", action="store_true", help="`all`: what `prepare` made is complete")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument(
        "--shard",
        type=int,
        nargs=2,
        metavar=("NUMBER", "COUNT"),
        help="the part of the sources that `prepare` does (default: all, in --workers processes)",
    )
    parser.add_argument("--workers", type=int, default=8, help="processes that prepare and measure in `all`")
    parser.add_argument("--edits", type=int, default=200, help="held-out edits that `all` measures")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def write_sources(options, indices: range) -> list:
    """Pictures with an instruction each -> EditPairs without targets."""
    from PIL import Image

    from miniature.grounds import ground
    from step1x_core.training.dataset import EditPair

    folder, pair_at = options.folder, ground(options.ground, options.pictures).pair_at
    (folder / "source").mkdir(parents=True, exist_ok=True)
    pairs = []
    for index in indices:
        path, text = (folder / "source" / f"{index:06d}{suffix}" for suffix in (".png", ".txt"))
        if not text.is_file():
            drawn = pair_at(options.seed, index)
            Image.fromarray(drawn.source).save(path)
            text.write_text(drawn.instruction, encoding="utf-8")
        pairs.append(EditPair(path, None, text.read_text(encoding="utf-8")))
    return pairs


def memory_cache(folder: Path, device):
    """A cache whose tensors stay on the device once they are loaded."""
    import torch

    from step1x_core.training.cache import Cache

    class MemoryCache(Cache):
        def __init__(self, folder):
            super().__init__(folder)
            self.kept, self.others = {}, {}

        def beside(self, name):
            return self.others.setdefault(name, MemoryCache(self.folder / name))

        def load(self, key):
            if key not in self.kept:
                with torch.inference_mode(False):
                    self.kept[key] = {name: tensor.to(device) for name, tensor in super().load(key).items()}
            return dict(self.kept[key])

    return MemoryCache(folder)


def load(options, indices: range):
    """The demo model and the dataset of these sources, encoded."""
    import comfy.utils

    from step1x_core.host.checkpoints.loading import load_model, load_text_encoder, load_vae
    from step1x_core.host.training.cache import cache_pairs

    comfy.utils.set_progress_bar_enabled(False)
    from miniature.grounds import SIDES

    clip = load_text_encoder(demo_model.find(options.models, demo_model.MLLM_FILE))
    vae = load_vae(demo_model.find(options.models, demo_model.VAE_FILE))
    dataset, made = cache_pairs(clip, vae, write_sources(options, indices), options.folder, SIDES[options.ground])
    return load_model(demo_model.find(options.models, demo_model.MODEL_FILE)), dataset, made


def distillation(options, kind: str):
    from step1x_core.training.distillation import Distillation

    chosen = KINDS[kind]
    return Distillation(
        chosen.steps,
        demo_model.STEPS,
        demo_model.CFG,
        grid=GRID,
        noises=options.noises,
        later=chosen.later,
        share=chosen.share,
        first=chosen.first,
        last=chosen.last,
    )


def settings_of(options, steps: int, rate: float = 1.0):
    from step1x_core.training.objective import COSINE, Settings

    return Settings(
        steps,
        options.rate * rate,
        RANK,
        float(RANK),
        options.batch,
        seed=options.seed,
        schedule=COSINE,
        warmup=min(WARM_UP, steps // 10),
    )


def prepare(options) -> None:
    import torch

    from step1x_core.host.training.distill import Lesson
    from step1x_core.host.training.train import prepare_model

    started = time.monotonic()
    number, count = options.shard
    with torch.inference_mode():
        model, dataset, made = load(options, range(number, options.pairs, count))
        encoded = time.monotonic()
        lesson = Lesson(model, distillation(options, options.kinds[0]))
        lesson.prepare(prepare_model(model), dataset, settings_of(options, 1))
    print(
        f"shard {number}: {made} encodings in {encoded - started:.0f} s with loading, {lesson.made} trajectories in {time.monotonic() - encoded:.0f} s",
        flush=True,
    )


def train_one(options) -> None:
    """One LoRA, in --steps steps or for --seconds; learning rate and stages then follow the time that has passed."""
    import torch

    from step1x_core.host.training.distill import Lesson
    from step1x_core.host.training.train import STATE_FILE, train

    kind, = options.kinds
    deadline = time.monotonic() + options.seconds
    with torch.inference_mode():
        model, dataset, _ = load(options, range(options.pairs))
        dataset = replace(dataset, cache=memory_cache(dataset.cache.folder, model.load_device))
        started = time.monotonic()

        def report(run):
            now = time.monotonic()
            if options.steps is None:
                passed = (now - started) / max(deadline - started, 1e-6)
                run.settings = replace(run.settings, steps=max(run.step + 1, round(run.step / passed)))
            if run.step % 100 == 0 or run.step == options.steps:
                print(
                    f"{kind}: step {run.step}, loss {statistics.mean(run.losses[-100:]):.4f}, {now - started:.0f} s",
                    flush=True,
                )
            if options.steps is None and now > deadline:
                raise Enough

        settings = settings_of(options, options.steps or 1_000_000, KINDS[kind].rate)
        lesson = Lesson(model, distillation(options, kind))
        try:
            train(
                model,
                dataset,
                settings,
                options.out / kind,
                resume=False,
                checkpointing=False,
                report=report,
                lesson=lesson,
            )
        except Enough:
            print(f"{kind}: {time.monotonic() - started:.0f} s are over", flush=True)
        (options.out / kind / STATE_FILE).unlink()  # six times the size of the LoRA, and not resumed


def main() -> int:
    options = arguments()
    if options.task == "all":
        all_kinds(options)
        return 0
    if options.task == "prepare" and options.shard is None:
        prepare_all(options, time.monotonic())
        return 0
    environment.use_host_in_process(options.cpu)
    import comfy.cli_args
    import torch

    # The host's estimate for a batch would have it stream the few weights from main memory.
    comfy.cli_args.args.highvram = not options.cpu
    torch.set_float32_matmul_precision("high")
    {"prepare": prepare, "train": train_one}[options.task](options)
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
