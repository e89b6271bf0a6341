#!/usr/bin/env python3
"""Makes held-out edits of the miniature for benchmarks/keep_unedited.py: `python benchmarks/keep_unedited_edits.py edits.safetensors`.

For each edit the file holds its index, the decoded edit and the source through the VAE and back, as 8-bit values (truncated). Controls (an empty
instruction) have their number plus CONTROL as index. --jobs splits the work over so many processes, for a GPU.
"""

import argparse
import itertools
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).absolute().parent.parent / "scripts"
sys.path[:0] = [str(SCRIPTS / "support"), str(SCRIPTS)]
import demo_model
import environment

CONTROL = 100_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--controls", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--job", type=int, help="only this job's share")
    return parser.parse_args()


def pairs(options: argparse.Namespace) -> list[tuple]:
    """The edits that benchmarks/demo_quality.py draws: (index, pair)."""
    from miniature.scenes import pair_at

    drawn = ((index, pair_at(options.seed, index, "heldout")) for index in itertools.count())
    edits = itertools.islice((entry for entry in drawn if entry[1].kind != "none"), options.edits)
    numbers = range(options.controls)
    controls = ((CONTROL + i, pair_at(options.seed, i, "heldout", kind="none")) for i in numbers)
    return [*edits, *controls]


def make(options: argparse.Namespace) -> None:
    environment.use_host_in_process()
    import comfy.utils
    import numpy as np
    import torch
    from demo_quality import Demo
    from safetensors.numpy import save_file

    from step1x_core.host.prompts.encoding import decode_at_working_size
    from step1x_core.images import truncate_uint8

    comfy.utils.set_progress_bar_enabled(False)
    torch.set_num_threads(2)
    folder = demo_model.FOLDER
    found = pairs(options)[options.job or 0::options.jobs]
    indices, edited, round_trips, started = [], [], [], time.monotonic()
    with torch.inference_mode():
        model = folder / "diffusion_models" / demo_model.MODEL_FILE
        demo = Demo(folder, demo_model.STEPS, demo_model.CFG, model)
        for done, (index, pair) in enumerate(found, 1):
            latent = demo.latent(pair.source, pair.instruction, seed=index % CONTROL)
            indices.append(index)
            edited.append(truncate_uint8(decode_at_working_size(demo.vae, latent)[0]).cpu().numpy())
            round_trips.append(demo.round_trip(pair.source))
            if done % 20 == 0:
                print(f"job {options.job}: {done}/{len(found)}, {time.monotonic() - started:.0f} s", flush=True)
    order = np.argsort(indices)
    save_file({"index": np.array(indices)[order], "edited": np.stack(edited)[order],
               "round_trip": np.stack(round_trips)[order]}, options.file)


def main() -> int:
    options = arguments()
    if options.jobs == 1 or options.job is not None:
        make(options)
        return 0
    files = [options.file.with_suffix(f".{job}.safetensors") for job in range(options.jobs)]
    common = [sys.executable, __file__, "--edits", str(options.edits), "--controls", str(options.controls), "--seed",
              str(options.seed), "--jobs", str(options.jobs)]
    running = [subprocess.Popen([*common, "--job", str(job), str(file)]) for job, file in enumerate(files)]
    if any([process.wait() for process in running]):
        return 1
    import numpy as np
    from safetensors.numpy import load_file, save_file

    parts = [load_file(file) for file in files]
    order = np.argsort(np.concatenate([part["index"] for part in parts]))
    save_file({name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}, options.file)
    for file in files:
        file.unlink()
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
