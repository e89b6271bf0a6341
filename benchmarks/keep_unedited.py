#!/usr/bin/env python3
"""How well keep_unedited finds what an edit changed: `python benchmarks/keep_unedited.py --edits edits.safetensors --photographs FOLDER`.

--edits: held-out edits of the miniature, from benchmarks/keep_unedited_edits.py. Prints success and the error outside the edit, without and
with keep_unedited. --photographs: the folder skimage/data of an unpacked scikit-image wheel. Prints how well the region is found in pairs
computed from photographs (benchmarks/edited_photographs.py), and what the seam looks like. Needs no ComfyUI.
"""

import argparse
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

PACK = Path(__file__).absolute().parent.parent
sys.path[:0] = [str(PACK), str(Path(__file__).absolute().parent)]

from edited_photographs import make_pair, photographs
from safetensors.numpy import load_file

from miniature.scenes import judge, pair_at
from step1x_core.editing.changes import find_change
from step1x_core.editing.shapes import grown, shrunk
from step1x_core.editing.unedited import blended, keep_unedited
from step1x_core.images import from_uint8, truncate_uint8

CONTROL = 100_000
WHOLE_KINDS = ("style", "background")
# The aim of the region: what changed, with gaps of this radius closed, and grown by so much.
CLOSED, GROWN = 4, 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=Path, help="file of benchmarks/keep_unedited_edits.py")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many edits: those that the constants were set with")
    parser.add_argument("--photographs", type=Path, help="folder with the photographs of scikit-image")
    parser.add_argument("--pairs", type=int, default=400, help="pairs with an edit of a part of the image")
    parser.add_argument("--whole", type=int, default=120, help="pairs with an edit of the whole image")
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes for the photographs")
    parser.add_argument("--list", action="store_true", help="print every pair that failed")
    return parser.parse_args()


def table(title: str, rows: dict[str, list[dict]]) -> None:
    names = list(next(iter(rows.values()))[0])
    print(f"\n{title}\n{'':<15}{'n':>5}" + "".join(f"{name:>12}" for name in names))
    for kind, results in rows.items():
        means = (np.nanmean([result[name] for result in results] or [0]) for name in names)
        print(f"{kind:<15}{len(results):>5}" + "".join(f"{mean:>12.5g}" for mean in means))


def miniature(options: argparse.Namespace) -> None:
    file = load_file(options.edits)
    rows = defaultdict(list)
    for index, edited, round_trip in list(zip(file["index"], file["edited"], file["round_trip"]))[options.skip:]:
        control = index >= CONTROL
        pair = pair_at(1, int(index) % CONTROL, "heldout", kind="none" if control else None)
        source, edited, round_trip = (from_uint8(pixels)[None] for pixels in (pair.source, edited, round_trip))
        kept = keep_unedited(source, source, round_trip, edited, edited)
        pixels = [truncate_uint8(image[0] + 1e-4).numpy() for image in (edited, kept.pictures)]
        before, after = (judge(pair, image) for image in pixels)
        leaks = (pixels[1] != pair.source).any(-1) & ~pair.region
        result = {"success": 100 * before.success, "kept succ.": 100 * after.success, "outside": before.outside_error,
                  "kept outs.": after.outside_error, "outside 0 %": 100 * (not leaks.any()),
                  "< 0.00005 %": 100 * (after.outside_error < 5e-5), "left whole %": 100 * kept.reports[0].startswith("the edit is left")}
        local = pair.kind not in (*WHOLE_KINDS, "none")
        for name in (pair.kind, *(["local edits"] if local else []), *([] if control else ["all edits"])):
            rows[name].append(result)
        if options.list and (before.success != after.success or local == bool(result["left whole %"])):
            print(index, pair.kind, before.success, after.success, kept.reports[0])
    table(f"Miniature, {len(file['index']) - options.skip} edits", dict(sorted(rows.items())))


def gradient(image: torch.Tensor) -> torch.Tensor:
    """Of an image [h, w, 3]: how much a pixel differs from the next ones [h, w]."""
    down, right = image.roll(-1, 0) - image, image.roll(-1, 1) - image
    return (down.abs() + right.abs()).amax(-1)


def seam(source: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor, changed: torch.Tensor) -> float:
    """By how many levels of 255 the mean gradient across the border of the mask [h, w] exceeds that of the source in the same,
    unchanged places."""
    inside = mask > 0
    ring = grown(inside, 1) & ~shrunk(inside, 1) & ~grown(changed, 1)
    ring[-1] = ring[:, -1] = False
    if not ring.any():
        return float("nan")
    return 255 * float(gradient(kept)[ring].mean() - gradient(source)[ring].mean())


def measured(pair) -> dict:
    source, round_trip, edited = (from_uint8(pixels) for pixels in (pair.source, pair.round_trip, pair.edited))
    change = find_change(source, round_trip, edited)
    mask, changed = change.share, torch.from_numpy(pair.changed)
    kept = blended(source, edited, mask)
    aim = grown(shrunk(grown(changed, CLOSED), CLOSED) | changed, GROWN)
    found = mask > 0
    whole = change.whole is not None
    nothing = float("nan")
    return {
        "IoU": nothing if whole else float((aim & found).sum() / (aim | found).sum()),
        "missed %": nothing if whole else 100 * float((mask[changed] < 0.5).float().mean()),
        "spill %": nothing if whole else 100 * float((found & ~grown(aim, 5)).float().mean()),
        "seam": nothing if whole else seam(source, kept, mask, changed),
        "no seam %": nothing if whole else 100.0 * (seam(source, kept, mask, changed) < 1),
        "same bits %": 100 * float(torch.equal(kept[~found], source[~found])),
        "left whole %": 100.0 * whole,
        "edited outs.": 255 * float((edited - source).abs()[~aim].mean()) if (~aim).any() else nothing,
    }


def one_pair(seed: int, pictures: list, side: int, whole: bool, index: int) -> tuple[str, dict, float]:
    """Make a pair and measure it -> its kind, what was measured, and the squared error of the simulated VAE."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        pair = make_pair(index, seed, pictures, side, whole)
        return pair.kind, measured(pair), ((pair.round_trip / 255.0 - pair.source / 255.0) ** 2).mean()


def photos(options: argparse.Namespace) -> None:
    pictures = photographs(options.photographs, options.side)
    print(f"{len(pictures)} photographs, {options.side} pixels, seed {options.seed}", flush=True)
    errors = []
    for whole, count in ((False, options.pairs), (True, options.whole)):
        rows = defaultdict(list)
        with ProcessPoolExecutor(options.jobs) as pool:
            done = pool.map(partial(one_pair, options.seed, pictures, options.side, whole), range(count), chunksize=4)
            done = enumerate(done)
        for index, (kind, result, error) in done:
            errors.append(error)
            rows[kind].append(result)
            rows["all"].append(result)
            if options.list and (bool(result["left whole %"]) != whole or result["missed %"] > 20 or result["IoU"] < 0.4):
                print(index, kind, {name: round(value, 2) for name, value in result.items()}, flush=True)
        if rows:
            table(f"Photographs, edits of {'the whole image' if whole else 'a part'}", dict(sorted(rows.items())))
    print(f"simulated VAE: PSNR {-10 * np.log10(np.mean(errors)):.1f} dB")


def main() -> int:
    options = arguments()
    started = time.monotonic()
    with torch.inference_mode():
        if options.photographs:
            photos(options)
        if options.edits:
            miniature(options)
    print(f"{time.monotonic() - started:.0f} s, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
