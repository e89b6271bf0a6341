#!/usr/bin/env python3
"""How near few-step edits of the demo model come to its teacher: `python benchmarks/few_steps.py`.

Edits held-out scenes with the teacher (20 steps, CFG 1.5) and at CFG 1 in 1, 2 and 4 steps, without and with few-step LoRAs, all from the same noise. At CFG 1 the
norm limiter still mixes the negative prompt's prediction into the first steps; "bare" is the model without a LoRA and without the limiter, as a LoRA is used.
Prints how often the edit is right, the mean squared distance of the image (0..1) to the teacher's, its ratios to the distances without a LoRA at the same steps,
the sharpness (the gradient energy inside the edited region, in percent of the teacher's), the median distance, and how many edits are nearer than the bare model's.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

SCRIPTS = Path(__file__).absolute().parent.parent / "scripts"
sys.path[:0] = [str(SCRIPTS / "support"), str(SCRIPTS)]
import demo_model
import environment

PLAIN_STEPS = (1, 2, 4)
TEACHER, WITHOUT, BARE = "teacher", "without", "bare"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--loras",
        nargs="*",
        help="NAME=FILE@STEPS; FILE+FILE: the first for the first half of the steps (default: the shipped LoRA, if "
             "there is one)",
    )
    parser.add_argument("--edits", type=int, default=200, help="number of held-out edits")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--shard",
        type=int,
        nargs=2,
        default=(0, 1),
        metavar=("NUMBER", "COUNT"),
        help="make only this part of the edits",
    )
    parser.add_argument("--rows", type=Path, help="write the numbers of each edit to this JSON file")
    parser.add_argument("--merge", type=Path, nargs="+", help="print the table of such files in place of measuring")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def energy(picture, region) -> float:
    """Sum of the squared differences of neighbouring pixels inside a region. picture uint8 [H, W, 3], region bool [H, W]."""
    import numpy as np

    values = picture.astype(np.float64) / 255
    down = np.square(np.diff(values, axis=0)).sum(-1) * (region[1:] & region[:-1])
    right = np.square(np.diff(values, axis=1)).sum(-1) * (region[:, 1:] & region[:, :-1])
    return float(down.sum() + right.sum())


class Editor:
    """The demo model and held-out edits, encoded once."""

    def __init__(self, edits: list):
        import demo_quality

        from step1x_core.host.prompts.encoding import encode_edit
        from step1x_core.images import from_uint8

        model = demo_model.FOLDER / "diffusion_models" / demo_model.MODEL_FILE
        self.demo = demo_quality.Demo(demo_model.FOLDER, demo_model.STEPS, demo_model.CFG, model)
        self.edits = [(index, pair, from_uint8(pair.source)[None]) for index, pair in edits]
        self.encoded = [
            encode_edit(self.demo.clip, self.demo.vae, image, pair.instruction, "", demo_model.SIZE_LEVEL)
            for _, pair, image in self.edits
        ]

    def models(self, files: list[str]) -> list:
        """One for each part of the steps: with the LoRA of a file, or with none for "", at CFG 1 without the norm limiter. Without files: the model as it is."""
        from step1x_core.host.checkpoints.lora import apply_lora, load_lora_file
        from step1x_core.host.sampling.sampler import set_norm_limiter
        from step1x_core.sampling.guidance import NormLimiter

        with_loras = [
            apply_lora(self.demo.model, load_lora_file(Path(file)), 1.0) if file else self.demo.model for file in files
        ]
        return [set_norm_limiter(model, NormLimiter(1.0)) for model in with_loras] or [self.demo.model]

    def pictures(self, files: list[str], steps: int, cfg: float):
        """uint8 [H, W, 3] of every edit."""
        from step1x_core.host.prompts.encoding import decode_edit
        from step1x_core.host.sampling.sampler import flow_sigmas, sample
        from step1x_core.images import truncate_uint8

        models = self.models(files)
        latents = [latent for _, _, latent in self.encoded]
        for part, model in enumerate(models):
            for place, ((index, _, _), (positive, negative, start)) in enumerate(zip(self.edits, self.encoded)):
                sigmas = flow_sigmas(steps, start["samples"])[
                    part * steps // len(models) : (part + 1) * steps // len(models) + 1
                ]
                if part == 0:
                    latents[place] = sample(
                        model, positive, negative, start, sigmas, cfg, index, callback=lambda *args: None
                    )
                else:
                    latents[place] = {
                        "samples": go_on(model, positive, negative, latents[place]["samples"], sigmas, cfg)
                    }
        return [
            truncate_uint8(decode_edit(self.demo.vae, latent, image)[0]).numpy()
            for latent, (_, _, image) in zip(latents, self.edits)
        ]


def go_on(model, positive, negative, latent, sigmas, cfg: float):
    """Sample on from a latent that an earlier sampling left at sigmas[0], without new noise."""
    import comfy.sample
    import comfy.samplers
    import torch

    return comfy.sample.sample_custom(
        model,
        torch.zeros_like(latent),
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        positive,
        negative,
        latent,
        disable_pbar=True,
    )


def measure(options) -> list[dict]:
    """One row for each edit and way of making it."""
    import comfy.utils
    import numpy as np
    import torch

    from miniature.scenes import judge, pair_at

    comfy.utils.set_progress_bar_enabled(False)
    drawn = ((index, pair_at(options.seed, index, "heldout")) for index in itertools.count())
    number, count = options.shard
    edits = list(itertools.islice(((index, pair) for index, pair in drawn if pair.kind != "none"), options.edits))[
        number::count
    ]
    loras = shipped() if options.loras is None else options.loras
    ways = [
        (TEACHER, [], demo_model.STEPS, demo_model.CFG),
        *((f"{WITHOUT}, {steps}", [], steps, 1.0) for steps in PLAIN_STEPS),
        *((f"{BARE}, {steps}", [""], steps, 1.0) for steps in PLAIN_STEPS),
    ]
    for lora in loras:
        name, _, rest = lora.partition("=")
        files, _, steps = rest.rpartition("@")
        ways.append((name, files.split("+"), int(steps), 1.0))
    rows = []
    with torch.inference_mode():
        editor, teachers = Editor(edits), None
        for name, files, steps, cfg in ways:
            started = time.monotonic()
            pictures = editor.pictures(files, steps, cfg)
            teachers = teachers or pictures
            for (index, pair), picture, teacher in zip(edits, pictures, teachers):
                distance = float(np.square((picture.astype(np.float64) - teacher) / 255).mean())
                rows.append(
                    {
                        "edit": index,
                        "kind": pair.kind,
                        "way": name,
                        "steps": steps,
                        "right": judge(pair, picture).success,
                        "distance": distance,
                        "energy": energy(picture, pair.region),
                    }
                )
            print(f"{name}: {len(edits)} edits in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def shipped() -> list[str]:
    return [f"shipped={demo_model.FAST_FILE}@{demo_model.FAST_STEPS}"] if demo_model.FAST_FILE.is_file() else []


def table(rows: list[dict]) -> None:
    groups = defaultdict(list)
    for row in rows:
        groups[row["way"]].append(row)

    def mean(way: str, name: str) -> float:
        return sum(row[name] for row in groups[way]) / len(groups[way])

    def median(way: str) -> float:
        return statistics.median(row["distance"] for row in groups[way])

    def nearer(way: str, plain: str) -> float:
        """Percentage of the edits that are nearer to the teacher than those of another way."""
        other = {row["edit"]: row["distance"] for row in groups[plain]}
        return 100 * sum(row["distance"] < other[row["edit"]] for row in groups[way]) / len(groups[way])

    print(
        f"{'':<16}{'steps':>6}{'edits':>7}{'right %':>9}{'distance':>11}{'/without':>10}{'/bare':>8}{'sharpness %':>13}{'median':>10}{'/bare':>8}{'nearer %':>10}"
    )
    for way, members in groups.items():
        steps = members[0]["steps"]
        without, bare = f"{WITHOUT}, {steps}", f"{BARE}, {steps}"
        ratios = "".join(
            f"{mean(way, 'distance') / mean(plain, 'distance'):>{width}.3f}" if plain in groups else " " * width
            for plain, width in ((without, 10), (bare, 8))
        )
        middle = (
            f"{median(way):>10.6f}{median(way) / median(bare):>8.3f}{nearer(way, bare):>10.1f}"
            if bare in groups
            else ""
        )
        print(
            f"{way:<16}{steps:>6}{len(members):>7}{100 * mean(way, 'right'):>9.1f}{mean(way, 'distance'):>11.6f}{ratios}"
            f"{100 * mean(way, 'energy') / mean(TEACHER, 'energy'):>13.1f}{middle}"
        )


def main() -> int:
    options = arguments()
    if options.merge:
        table([row for path in options.merge for row in json.loads(path.read_text(encoding="utf-8"))])
        return 0
    environment.use_host_in_process(options.cpu)
    import torch

    started = time.monotonic()
    rows = measure(options)
    if options.rows:
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        options.rows.write_text(json.dumps(rows), encoding="utf-8")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(
        f"{len(rows)} edits, 128x128, seed {options.seed}; torch {torch.__version__}, {where}, {time.monotonic() - started:.0f} s"
    )
    table(rows)
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
