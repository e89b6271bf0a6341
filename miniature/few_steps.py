#!/usr/bin/env python3
"""Distils few-step LoRAs for the shipped demo model: `python miniature/few_steps.py all FOLDER --out OUT --seconds 300`.

`prepare` draws sources with instructions, encodes them and samples the teacher's trajectories; `train` distils one LoRA; `all` does both for several kinds of
LoRAs at once, each in processes of its own, spread over the GPUs, and measures them with benchmarks/few_steps.py. What is in the folder is not made again.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

PACK = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(PACK / "scripts" / "support"))
import demo_model
import environment

RANK = 32
# Points of a trajectory: those of students of 1, 2 and 4 steps.
GRID = 4
WARM_UP = 30


@dataclass(frozen=True)
class Kind:
    """A LoRA that `all` makes. steps: of the student; later: what the later part of the training does, share: how much of it that is;
    first, last: first and last trained step; rate: learning rate, in units of --rate."""

    steps: int
    later: str = "cached"
    share: float = 0.5
    first: int = 0
    last: int = 0
    rate: float = 1.0


KINDS = {
    "1": Kind(1),
    "1-final": Kind(1, "final"),
    **{f"{steps}-{later}": Kind(steps, later) for later in ("trajectory", "cached", "teacher", "final") for steps in (2, 4)},
    **{f"{steps}-early": Kind(steps, last=steps // 2) for steps in (2, 4)},
    **{f"{steps}-late": Kind(steps, first=steps // 2, last=steps) for steps in (2, 4)},
    "4-slow": Kind(4, rate=0.3),
    "4-final-slow": Kind(4, "final", 0.6, rate=0.4),
}
# Part of the time of `all` that is left for measuring, in seconds.
MEASURING = 95


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


def spawn(options, name: str, number: int, *arguments: str) -> subprocess.Popen:
    """One of this folder's scripts in a process of its own, on one of the GPUs. Its output goes to a log and on."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(gpus())]
    changes = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.workers))} | (
        {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}
    )
    return subprocess.Popen(
        [sys.executable, str(PACK / name), *arguments, *(["--cpu"] if options.cpu else [])], env=os.environ | changes
    )


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def wait(processes: list[subprocess.Popen], what: str, started: float) -> None:
    failed = [process.args for process in processes if process.wait()]
    print(f"{what} done after {time.monotonic() - started:.0f} s", flush=True)
    for command in failed:
        print(f"FAILED: {' '.join(command[1:])}", flush=True)


def common(options) -> list[str]:
    """What all processes of one call are told."""
    names = ("pairs", "noises", "batch", "rate", "seed", "ground", "models")
    return [
        str(options.folder),
        "--out",
        str(options.out),
        *(f"--{name}={getattr(options, name)}" for name in names),
        *([f"--pictures={options.pictures}"] if options.pictures else []),
        *([f"--steps={options.steps}"] if options.steps else []),
    ]


HERE, BENCHMARK = "miniature/few_steps.py", "benchmarks/few_steps.py"


def prepare_all(options, started: float) -> None:
    shards = [("--shard", str(i), str(options.workers)) for i in range(options.workers)]
    wait(
        [spawn(options, HERE, i, "prepare", *common(options), *shard) for i, shard in enumerate(shards)],
        "preparing",
        started,
    )


def all_kinds(options) -> None:
    started = time.monotonic()
    if not options.prepared:
        prepare_all(options, started)
    left = max(1, options.seconds - MEASURING - (time.monotonic() - started))
    wait(
        [
            spawn(options, HERE, i, "train", *common(options), "--kinds", kind, f"--seconds={left}")
            for i, kind in enumerate(options.kinds)
        ],
        "training",
        started,
    )
    measure_all(options, started)


def measure_all(options, started: float) -> None:
    files = {kind: options.out / kind / "lora.safetensors" for kind in KINDS}
    files = {kind: file for kind, file in files.items() if file.is_file()}
    loras = [f"{kind}={file}@{KINDS[kind].steps}" for kind, file in files.items() if not KINDS[kind].last]
    for steps in (2, 4):
        halves = (f"{steps}-early", f"{steps}-late")
        if all(kind in files for kind in halves):
            loras.append(f"{steps}-split={'+'.join(str(files[kind]) for kind in halves)}@{steps}")
    common = [
        f"--edits={options.edits}",
        f"--ground={options.ground}",
        f"--models={options.models}",
        f"--deadline={time.time() + options.seconds - (time.monotonic() - started) - 15}",
        *([f"--pictures={options.pictures}"] if options.pictures else []),
    ]
    rows = [options.out / f"rows-{i}.json" for i in range(options.workers)]
    sheet = ("--sheet", str(options.out / "sheet.jpg"))
    wait(
        [
            spawn(
                options,
                BENCHMARK,
                i,
                *common,
                "--shard",
                str(i),
                str(options.workers),
                "--rows",
                str(path),
                *(sheet if i == 0 else ()),
                "--loras",
                *loras,
            )
            for i, path in enumerate(rows)
        ],
        "measuring",
        started,
    )
    made = [str(path) for path in rows if path.is_file()]
    wait([spawn(options, BENCHMARK, 0, "--merge", *made)], "table", started)


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
