"""Perceptual hashes: whether two pairs show the same edit of the same picture, whatever their size, format and wording.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .record import changed_pixels

# Gradients of a 16 x 16 grid; those below so many levels count as flat, or noise would decide about them.
GRID, FLAT = 16, 2
# Cells on a side of the colours that are compared.
COLOUR_GRID = 4
# Most different bits of 256, and most different levels of a colour of 255, of what counts as the same.
BITS, LEVELS = 20, 10
STRUCTURE = GRID * GRID // 8
COLOURS = 3 * COLOUR_GRID**2


def look(picture: Image.Image, box: tuple[float, float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """RGB picture, and left, top, right, bottom of the part to look at -> difference hash, uint8 [32], and mean
    colours, uint8 [48]."""
    grid = np.asarray(picture.convert("L").resize((GRID + 1, GRID), Image.Resampling.BOX, box), np.int16)
    colours = np.asarray(picture.resize((COLOUR_GRID, COLOUR_GRID), Image.Resampling.BOX, box))
    return np.packbits(np.diff(grid, axis=1) > FLAT), colours.reshape(-1)


def extent(shares: np.ndarray) -> tuple[float, float]:
    """Beginning and end of what has these shares along one side, [N]: as for an even bar of the same mean and
    deviation. Single pixels hardly count."""
    places = np.arange(len(shares)) + 0.5
    mean = np.average(places, weights=shares)
    half = max(3 * np.average((places - mean) ** 2, weights=shares), 0.25) ** 0.5
    return max(mean - half, 0.0), min(mean + half, float(len(shares)))


def changed_box(source: np.ndarray, target: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what an edit changed, about; all of the picture where nothing was."""
    changed = changed_pixels(source, target)
    if not changed.any():
        return 0.0, 0.0, float(changed.shape[1]), float(changed.shape[0])
    (left, right), (top, bottom) = extent(changed.mean(axis=0)), extent(changed.mean(axis=1))
    return left, top, right, bottom


def fingerprint(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """uint8 [240]: structure, then colours, of the source and of what was changed, after and before. Pictures uint8 [H,
    W, 3] of one size.

    The region that was changed is looked at by itself: a word on a sign is nothing in the whole picture.
    """
    before, after, box = Image.fromarray(source), Image.fromarray(target), changed_box(source, target)
    looks = look(before, (0, 0, *before.size)), look(after, box), look(before, box)
    return np.concatenate([structure for structure, _ in looks] + [colours for _, colours in looks])


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
        distances = (
            _COUNTS[known[:, :bits] ^ print_[:bits]].reshape(len(known), 3, STRUCTURE).sum(axis=2, dtype=np.int32)
        )
        levels = np.abs(known[:, bits:].astype(np.int16) - print_[bits:]).max(axis=1)
        same = np.flatnonzero((distances <= BITS).all(axis=1) & (levels <= LEVELS))
        return seen.names[same[0]] if len(same) else None

    def add(self, group: str, print_: np.ndarray, name: str) -> None:
        seen = self.groups.setdefault(group, Seen(np.zeros((64, SIZE), np.uint8), []))
        if len(seen.names) == len(seen.prints):
            seen.prints = np.concatenate([seen.prints, np.zeros_like(seen.prints)])
        seen.prints[len(seen.names)] = print_
        seen.names.append(name)
