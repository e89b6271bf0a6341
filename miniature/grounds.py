"""What the miniatures edit: drawn scenes (the one that is shipped), or photographs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from . import photographs, scenes
from .judging import Verdict

NAMES = ("scenes", "photographs")
SCENES = SimpleNamespace(kinds=scenes.KINDS, pair_at=scenes.pair_at)
# Pixels of a side.
SIDES = {"scenes": 128, "photographs": photographs.SIDE}


def ground(name: str, pictures: Path | None = None):
    """`kinds` and `pair_at` of a ground. pictures: folder of the photographs, None for scikit-image's. Raises FileNotFoundError without them."""
    return photographs.Photographs(pictures) if name == "photographs" else SCENES


def judge(pair, result: np.ndarray) -> Verdict:
    """Judges a result, uint8 [H, W, 3], as its pair's ground does."""
    return (photographs if isinstance(pair, photographs.PhotographPair) else scenes).judge(pair, result)
