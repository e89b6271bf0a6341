"""The LoRAs that miniature/few_steps.py makes, and the processes that it makes and measures them in."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from environment import PACK

HERE, BENCHMARK = "miniature/few_steps.py", "benchmarks/few_steps.py"


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
