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
import tempfile
import time
from dataclasses import replace
from pathlib import Path

PACK = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(PACK / "scripts" / "support"))
import demo_model
import environment

RANK = 32
# Points of a trajectory: those of students of 1, 2 and 4 steps.
GRID = 4
# LoRAs that `all` makes: a name, the student's steps, what the later part of the training does, first and last trained
# step.
KINDS = {
    "1": (1, "cached", 0, 0),
    "2-trajectory": (2, "trajectory", 0, 0),
    "4-trajectory": (4, "trajectory", 0, 0),
    "2-cached": (2, "cached", 0, 0),
    "4-cached": (4, "cached", 0, 0),
    "2-teacher": (2, "teacher", 0, 0),
    "4-teacher": (4, "teacher", 0, 0),
    "2-final": (2, "final", 0, 0),
    "2-early": (2, "cached", 0, 1),
    "2-late": (2, "cached", 1, 2),
    "1-final": (1, "final", 0, 0),
    "4-final": (4, "final", 0, 0),
}
TIMED = 6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("prepare", "train", "all"))
    parser.add_argument("folder", type=Path, help="where sources, encodings and trajectories go and stay")
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRAs, one for each kind")
    parser.add_argument("--pairs", type=int, default=2400, help="number of sources, each with one instruction")
    parser.add_argument("--noises", type=int, default=3, help="trajectories of each source")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="LoRAs to make")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--steps", type=int, help="steps of the training (default: as many as --seconds allows)")
    parser.add_argument("--seconds", type=float, default=200, help="time for training")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument(
        "--shard",
        type=int,
        nargs=2,
        default=(0, 1),
        metavar=("NUMBER", "COUNT"),
        help="the part of the sources that `prepare` does",
    )
    parser.add_argument("--workers", type=int, default=8, help="processes that prepare and measure in `all`")
    parser.add_argument("--edits", type=int, default=200, help="held-out edits that `all` measures")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def write_sources(folder: Path, indices: range, seed: int) -> list:
    """Drawn scenes with an instruction each -> EditPairs without targets."""
    from PIL import Image

    from miniature.scenes import pair_at
    from step1x_core.training.dataset import EditPair

    (folder / "source").mkdir(parents=True, exist_ok=True)
    pairs = []
    for index in indices:
        path, text = (folder / "source" / f"{index:06d}{suffix}" for suffix in (".png", ".txt"))
        if not text.is_file():
            drawn = pair_at(seed, index)
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
    folder = demo_model.FOLDER
    clip, vae = (
        load_text_encoder(folder / "text_encoders" / demo_model.MLLM_FILE),
        load_vae(folder / "vae" / demo_model.VAE_FILE),
    )
    dataset, made = cache_pairs(
        clip, vae, write_sources(options.folder, indices, options.seed), options.folder, demo_model.SIZE_LEVEL
    )
    return load_model(folder / "diffusion_models" / demo_model.MODEL_FILE), dataset, made


def distillation(options, kind: str):
    from step1x_core.training.distillation import Distillation

    steps, later, first, last = KINDS[kind]
    return Distillation(
        steps, demo_model.STEPS, demo_model.CFG, grid=GRID, noises=options.noises, later=later, first=first, last=last
    )


def settings_of(options, steps: int):
    from step1x_core.training.objective import COSINE, Settings

    return Settings(
        steps,
        options.rate,
        RANK,
        float(RANK),
        options.batch,
        seed=options.seed,
        schedule=COSINE,
        warmup=min(30, steps // 10),
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
    import torch

    from step1x_core.host.training.distill import Lesson
    from step1x_core.host.training.train import STATE_FILE, train

    kind, = options.kinds
    lesson_settings, began = distillation(options, kind), time.monotonic()
    with torch.inference_mode():
        model, dataset, _ = load(options, range(options.pairs))
        dataset = replace(dataset, cache=memory_cache(dataset.cache.folder, model.load_device))
        started = time.monotonic()

        def run(folder, steps, lesson, report=None):
            return train(
                model,
                dataset,
                settings_of(options, steps),
                folder,
                resume=False,
                checkpointing=False,
                report=report,
                lesson=Lesson(model, lesson),
            )

        def seconds_per_step(share: float) -> float:
            times = []
            with tempfile.TemporaryDirectory() as temporary:
                run(
                    Path(temporary),
                    2 * TIMED,
                    replace(lesson_settings, share=share),
                    lambda run: times.append(time.monotonic()),
                )
            return statistics.mean(b - a for a, b in zip(times[TIMED - 1:], times[TIMED:]))

        steps = options.steps
        if steps is None:
            pace = (seconds_per_step(0.0) + seconds_per_step(1.0)) / 2
            steps = max(2, int((options.seconds - (time.monotonic() - started)) / pace))
            print(f"{kind}: {pace:.3f} s a step, {steps} steps", flush=True)

        def report(run):
            if run.step % 100 == 0 or run.step == steps:
                print(
                    f"{kind}: step {run.step}/{steps}, loss {statistics.mean(run.losses[-100:]):.4f}, {time.monotonic() - began:.0f} s",
                    flush=True,
                )

        run(options.out / kind, steps, lesson_settings, report)
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


def all_kinds(options) -> None:
    started, here = time.monotonic(), "miniature/few_steps.py"
    common = [
        str(options.folder),
        "--out",
        str(options.out),
        *(f"--{name}={getattr(options, name)}" for name in ("pairs", "noises", "batch", "rate", "seed", "seconds")),
        *([f"--steps={options.steps}"] if options.steps else []),
    ]
    wait(
        [
            spawn(options, here, i, "prepare", *common, "--shard", str(i), str(options.workers))
            for i in range(options.workers)
        ],
        "preparing",
        started,
    )
    wait(
        [spawn(options, here, i, "train", *common, "--kinds", kind) for i, kind in enumerate(options.kinds)],
        "training",
        started,
    )
    files = {kind: options.out / kind / "lora.safetensors" for kind in options.kinds}
    loras = [
        f"{kind}={files[kind]}@{KINDS[kind][0]}"
        for kind in options.kinds
        if not KINDS[kind][3] and files[kind].is_file()
    ]
    if {"2-early", "2-late"} <= {kind for kind in options.kinds if files[kind].is_file()}:
        loras.append(f"2-split={files['2-early']}+{files['2-late']}@2")
    bench, rows = "benchmarks/few_steps.py", [options.out / f"rows-{i}.json" for i in range(options.workers)]
    wait(
        [
            spawn(
                options,
                bench,
                i,
                "--edits",
                str(options.edits),
                "--shard",
                str(i),
                str(options.workers),
                "--rows",
                str(path),
                "--loras",
                *loras,
            )
            for i, path in enumerate(rows)
        ],
        "measuring",
        started,
    )
    wait([spawn(options, bench, 0, "--merge", *(str(path) for path in rows if path.is_file()))], "table", started)


def main() -> int:
    options = arguments()
    if options.task == "all":
        all_kinds(options)
        return 0
    environment.use_host_in_process(options.cpu)
    {"prepare": prepare, "train": train_one}[options.task](options)
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
