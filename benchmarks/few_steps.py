#!/usr/bin/env python3
"""How near few-step edits of the demo model come to its teacher: `python benchmarks/few_steps.py`.

Edits held-out scenes with the teacher (20 steps, CFG 1.5) and at CFG 1 in 1, 2 and 4 steps, without and with few-step LoRAs, all from the same noise. At CFG 1 the
norm limiter still mixes the negative prompt's prediction into the first steps; "bare" is the model without a LoRA and without the limiter, as a LoRA is used.
Prints how often the edit is right, the mean squared distance of the image (0..1) to the teacher's, its ratios to the distances without a LoRA at the same steps,
the sharpness (the gradient energy inside the edited region, in percent of the teacher's), the median distance, and how many edits are nearer than the bare model's.

With --ground photographs a second miniature edits photographs as the pair makers do, at 256 pixels. `pip install scikit-image` brings the photographs; it is not
shipped, so make it first (`miniature/train.py --ground photographs --begin miniature/weights --out RUN`, then `miniature/train.py export --out RUN --to MODELS`) and name
its folder with --models. The row "autoencoder" is the true target after a round trip: the most that a transformer can reach.
"""

import argparse
import itertools
import json
import math
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
TEACHER, WITHOUT, BARE, CEILING = "teacher", "without", "bare", "autoencoder"
# Edits of a contact sheet.
SHOWN = 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--loras",
        nargs="*",
        help="NAME=FILE@STEPS; FILE+FILE: the first for the first half of the steps (default: the shipped LoRA, if "
             "there is one)",
    )
    parser.add_argument("--ground", choices=("scenes", "photographs"), default="scenes", help="what is edited")
    parser.add_argument("--pictures", type=Path, help="folder of the photographs (default: scikit-image's own)")
    parser.add_argument("--models", type=Path, default=demo_model.FOLDER, help="folder of the miniature (default: the shipped one)")
    parser.add_argument("--deadline", type=float, help="time of day, in seconds, after which no further way is begun")
    parser.add_argument("--sheet", type=Path, help="write source, target and every way of some edits to this image")
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
    """A miniature and held-out edits, encoded once. models: its folder."""

    def __init__(self, edits: list, models: Path = demo_model.FOLDER):
        import demo_quality

        from step1x_core.host.prompts.encoding import encode_edit
        from step1x_core.images import from_uint8

        model = demo_model.find(models, demo_model.MODEL_FILE)
        self.demo = demo_quality.Demo(models, demo_model.STEPS, demo_model.CFG, model)
        self.edits = [(index, pair, from_uint8(pair.source)[None]) for index, pair in edits]
        self.encoded = [
            encode_edit(self.demo.clip, self.demo.vae, image, pair.instruction, "", pair.source.shape[0])
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

    from miniature.grounds import ground, judge

    comfy.utils.set_progress_bar_enabled(False)
    pair_at = ground(options.ground, options.pictures).pair_at
    drawn = ((index, pair_at(options.seed, index, "heldout")) for index in itertools.count())
    number, count = options.shard
    edits = list(itertools.islice(((index, pair) for index, pair in drawn if pair.kind != "none"), options.edits))[
        number::count
    ]
    own = options.models == demo_model.FOLDER
    loras = (shipped() if own else []) if options.loras is None else options.loras
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
        editor, teachers, columns = Editor(edits, options.models), None, []
        if options.ground == "photographs":
            rows += ceiling(editor)
        for name, files, steps, cfg in ways:
            started = time.monotonic()
            if options.deadline is not None and time.time() > options.deadline:
                print(f"{name}: no time left", file=sys.stderr, flush=True)
                continue
            pictures = editor.pictures(files, steps, cfg)
            teachers = teachers or pictures
            columns.append(pictures[:SHOWN])
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
    if options.sheet:
        write_sheet(options.sheet, [pair for _, pair in edits[:SHOWN]], columns)
    return rows


def ceiling(editor: Editor) -> list[dict]:
    """Rows of the true targets after a round trip through the autoencoder: what a perfect model would reach."""
    from miniature.grounds import judge

    rows = []
    for index, pair, _ in editor.edits:
        picture = editor.demo.round_trip(pair.target)
        entry = {"edit": index, "kind": pair.kind, "way": CEILING, "steps": 0, "right": judge(pair, picture).success}
        rows.append(entry | {"distance": math.nan, "energy": energy(picture, pair.region)})
    return rows


def write_sheet(path: Path, pairs: list, columns: list) -> None:
    """A row for each edit: source, target, and what every way made of it."""
    import numpy as np
    from PIL import Image

    lines = [
        np.concatenate([pair.source, pair.target, *(made[row] for made in columns)], axis=1)
        for row, pair in enumerate(pairs)
    ]
    Image.fromarray(np.concatenate(lines)).save(path, quality=92)


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
        return 100 * sum(row["distance"] < other.get(row["edit"], 0) for row in groups[way]) / len(groups[way])

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
        f"{options.ground}, {len(rows)} edits, seed {options.seed}; torch {torch.__version__}, {where}, {time.monotonic() - started:.0f} s"
    )
    table(rows)
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
