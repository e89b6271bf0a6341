"""Perceptual hashes: whether two pairs show the same edit of the same picture, whatever their size, format and wording."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .pairs_record import changed_pixels

# Gradients of a 16 x 16 grid; those below so many levels count as flat, or noise would decide about them.
GRID, FLAT = 16, 2
# Cells on a side of the colours that are compared.
COLOUR_GRID = 4
# Most different bits of 256, and most different levels of a colour of 255, of what counts as the same.
BITS, LEVELS = 20, 10
STRUCTURE = GRID * GRID // 8
COLOURS = 3 * COLOUR_GRID**2


def look(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """RGB picture -> difference hash, uint8 [32], and mean colours, uint8 [48]."""
    grid = np.asarray(picture.convert("L").resize((GRID + 1, GRID), Image.Resampling.BOX), np.int16)
    colours = np.asarray(picture.resize((COLOUR_GRID, COLOUR_GRID), Image.Resampling.BOX))
    return np.packbits(np.diff(grid, axis=1) > FLAT), colours.reshape(-1)


def changed_box(source: np.ndarray, target: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what an edit changed, in steps of a 16th of the picture; all of it where nothing did.

    A cell counts from half of the most changed one's share on: single pixels, which another format changes, would make the box another one.
    """
    height, width, _ = source.shape
    shares = np.asarray(Image.fromarray(changed_pixels(source, target).astype(np.uint8) * 255).resize((GRID, GRID), Image.Resampling.BOX))
    rows, columns = np.nonzero(2 * shares.astype(int) >= max(shares.max(), 1))
    if not len(rows):
        return 0, 0, width, height
    return columns.min() * width // GRID, rows.min() * height // GRID, -(-(columns.max() + 1) * width // GRID), -(-(rows.max() + 1) * height // GRID)


def fingerprint(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """uint8 [240]: structure, then colours, of the source and of what was changed, after and before. Pictures uint8 [H, W, 3] of one size.

    The region that was changed is looked at by itself: a word on a sign is nothing in the whole picture.
    """
    box = changed_box(source, target)
    looks = look(Image.fromarray(source)), look(Image.fromarray(target).crop(box)), look(Image.fromarray(source).crop(box))
    return np.concatenate([looks[0][0], looks[1][0], looks[2][0], looks[0][1], looks[1][1], looks[2][1]])


SIZE = 3 * (STRUCTURE + COLOURS)
_COUNTS = np.array([bin(number).count("1") for number in range(256)], np.uint8)


@dataclass
class Seen:
    """Fingerprints of one group of pairs, with their names."""

    prints: np.ndarray
    names: list[str]


class Index:
    """Finds near duplicates among pairs of one group (a kind and a maker): other groups never match."""

    def __init__(self):
        self.groups: dict[str, Seen] = {}

    def find(self, group: str, print_: np.ndarray) -> str | None:
        """The name of a pair that looks the same."""
        seen = self.groups.get(group)
        if seen is None:
            return None
        known, bits = seen.prints[:len(seen.names)], 3 * STRUCTURE
        distances = _COUNTS[known[:, :bits] ^ print_[:bits]].reshape(len(known), 3, STRUCTURE).sum(axis=2, dtype=np.int32)
        levels = np.abs(known[:, bits:].astype(np.int16) - print_[bits:]).max(axis=1)
        same = np.flatnonzero((distances <= BITS).all(axis=1) & (levels <= LEVELS))
        return seen.names[same[0]] if len(same) else None

    def add(self, group: str, print_: np.ndarray, name: str) -> None:
        seen = self.groups.setdefault(group, Seen(np.zeros((64, SIZE), np.uint8), []))
        if len(seen.names) == len(seen.prints):
            seen.prints = np.concatenate([seen.prints, np.zeros_like(seen.prints)])
        seen.prints[len(seen.names)] = print_
        seen.names.append(name)
