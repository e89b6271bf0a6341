#!/usr/bin/env python3
"""Pairs of pictures before and after an edit, with the instruction, drawn from seeds.

`python miniature/scenes.py --preview sheet.png` draws a contact sheet, `--dataset folder` writes pairs in the official fine-tuning format.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from miniature.drawing import render
from miniature.edits import EDITS, EditPair
from miniature.instructions import LANGUAGES
from miniature.judging import Verdict, changed_core, judge
from miniature.layout import check_size, pick, sample_scene

__all__ = ["KINDS", "LANGUAGES", "SPLITS", "EditPair", "Verdict", "judge", "make_pair", "pair_at", "write_dataset"]

KINDS = tuple(EDITS)
KIND_SHARES = {
    "recolour": 0.2,
    "replace": 0.16,
    "remove": 0.15,
    "add": 0.15,
    "background": 0.1,
    "style": 0.1,
    "text": 0.1,
    "none": 0.04,
}
# First word of each split's seeds: no index of one split can give the random numbers of another.
SPLITS = {"train": 0, "heldout": 1}
# An edit has to change at least this many pixels clearly, or it cannot be judged.
MIN_CORE = 40


def make_pair(
    rng: np.random.Generator, size: tuple[int, int] = (128, 128), kind: str | None = None, language: str | None = None
) -> EditPair:
    """A random pair of pictures of size (width, height), multiples of 16 from 96 to 256. Kind and language are drawn unless given."""
    check_size(*size)
    if kind is None:
        kind = rng.choice(KINDS, p=[KIND_SHARES[name] for name in KINDS]).item()
    if language is None:
        language = pick(rng, LANGUAGES)
    while True:
        scene = sample_scene(rng, size, with_word=True if kind == "text" else None)
        edit = EDITS[kind](rng, scene, language)
        if edit is None:
            continue
        source, target = render(scene), edit.draw()
        if kind == "none" or np.count_nonzero(changed_core(source, target)) >= MIN_CORE:
            return EditPair(
                source, target, edit.instruction, kind, language, edit.region, scene, edit.scene, edit.details
            )


def pair_at(seed: int, index: int, split: str = "train", size: tuple[int, int] = (128, 128), kind: str | None = None,
            language: str | None = None) -> EditPair:
    """The pair at an index of the endless sequence that the seed and the split name; the same on every call."""
    return make_pair(np.random.default_rng([SPLITS[split], seed, index]), size, kind, language)


def write_dataset(
    folder: str | Path, count: int, seed: int, split: str = "train", size: tuple[int, int] = (128, 128)
) -> Path:
    """Writes pairs as PNG files, and metadata.json in the format of the official fine-tuning scripts:

    {target path: {"ref_image_path": source path, "caption": instruction}}, with absolute paths. Returns the path of metadata.json.
    """
    folder = Path(folder).resolve()
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    metadata = {}
    for index in range(count):
        pair = pair_at(seed, index, split, size)
        source, target = (folder / name / f"{index:06d}.png" for name in ("source", "target"))
        Image.fromarray(pair.source).save(source)
        Image.fromarray(pair.target).save(target)
        metadata[str(target)] = {"ref_image_path": str(source), "caption": pair.instruction}
    path = folder / "metadata.json"
    path.write_text(json.dumps(metadata, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def contact_sheet(pairs: list[EditPair], columns: int = 4) -> Image.Image:
    """Source, target and region (the rest darkened) of each pair side by side, the caption below.

    Pillow's own font has no Chinese letters, so Chinese captions show their number only.
    """
    height, width = pairs[0].source.shape[:2]
    font = ImageFont.load_default(13)
    cell_width, cell_height = 3 * width + 24, height + 52
    sheet = Image.new("RGB", (columns * cell_width, -(-len(pairs) // columns) * cell_height), "#505860")
    draw = ImageDraw.Draw(sheet)
    for index, pair in enumerate(pairs):
        x, y = index % columns * cell_width + 6, index // columns * cell_height + 6
        marked = np.where(pair.region[..., None], pair.target, pair.target // 4)
        for offset, picture in enumerate((pair.source, pair.target, marked)):
            sheet.paste(Image.fromarray(picture), (x + offset * (width + 4), y))
        caption = f"{index} {pair.kind}: {pair.instruction if pair.language == 'en' else '(Chinese)'}"
        draw.text((x, y + height + 4), textwrap.fill(caption, 3 * width // 7), font=font, fill="white")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preview", type=Path, help="write a contact sheet to this picture file, and the captions to standard output"
    )
    parser.add_argument("--dataset", type=Path, help="write pairs and metadata.json to this folder")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args()
    if args.preview:
        pairs = [pair_at(args.seed, index, args.split, tuple(args.size)) for index in range(args.count)]
        contact_sheet(pairs).save(args.preview)
        for index, pair in enumerate(pairs):
            print(index, pair.kind, pair.instruction)
    if args.dataset:
        print(write_dataset(args.dataset, args.count, args.seed, args.split, tuple(args.size)))


if __name__ == "__main__":
    main()
