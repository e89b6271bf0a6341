"""Edits of photographs with a known target: random crops, changed by the pair makers (step1x_core/pairs/makers).

The photographs are those in scikit-image's wheel: `pip install scikit-image`; its page on skimage.data tells their licences.
A few-step model is judged on photographs that its teacher was not trained on.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from step1x_core.pairs.orders import MAKERS, Order, carry_out
from step1x_core.pairs.record import changed_pixels

from .judging import CORE_DIFFERENCE, CORE_SHARE, Verdict, difference

SIDE = 256
# Public domain, CC0, or without known restrictions, as skimage.data says of each. The others are left out.
TRAINED = (
    "astronaut.png", "brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "ihc.png", "moon.png", "retina.jpg", "rocket.jpg",
)
HELD_OUT = ("chelsea.png", "coffee.png")
# Edits whose result follows from the source and the instruction, but for their strength.
KINDS = {
    "night": "tone_transfer", "day": "tone_transfer", "sunset": "tone_transfer", "fog": "tone_transfer",
    "sepia": "style_change", "pencil": "style_change", "ink": "style_change", "oil": "style_change",
    "cartoon": "style_change", "recolour": "color_alter",
}
# Crops that are tried for a pair.
TRIES = 100
# A crop's side, as a share of the photograph's shorter one.
CROPS = (0.45, 1.0)
# Mean absolute error allowed where the edit changes nothing, 0..1; the autoencoder alone makes some.
KEPT_LIMIT = 0.08
SPLITS = {"train": (0, TRAINED), "heldout": (1, HELD_OUT)}


@dataclass
class PhotographPair:
    """As `edits.EditPair`, without a scene. `region`, bool [H, W], holds the pixels that the edit changes; `others`: what other edits make
    of the source."""

    source: np.ndarray
    target: np.ndarray
    instruction: str
    kind: str
    language: str
    region: np.ndarray
    name: str
    seed: int

    @property
    def others(self) -> list[np.ndarray]:
        return other_targets(self.source.tobytes(), self.source.shape, self.kind)


def find_folder(folder: Path | None) -> Path:
    """Where the photographs are: as given, else scikit-image's own. Raises FileNotFoundError."""
    if folder is None:
        package = importlib.util.find_spec("skimage")
        folder = Path(package.origin).parent / "data" if package else Path()
    missing = [name for name in TRAINED + HELD_OUT if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The photographs {', '.join(missing)} are not in {folder}. Run `pip install scikit-image`, or name a folder "
            "that has the images of skimage/data with --pictures."
        )
    return folder


@lru_cache
def photograph(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def draw_crop(rng: np.random.Generator, picture: np.ndarray, side: int, vary: bool) -> np.ndarray:
    """A random square of a photograph, uint8 [side, side, 3]. vary: turned, mirrored and with its colours exchanged, too."""
    height, width, _ = picture.shape
    length = max(32, int(min(height, width) * rng.uniform(*CROPS)))
    y, x = (int(rng.integers(0, extent - length + 1)) for extent in (height, width))
    crop = picture[y:y + length, x:x + length]
    if vary:
        crop = np.rot90(crop, int(rng.integers(4)))[:, ::int(rng.choice((-1, 1)))]
        crop = crop[..., rng.permutation(3)] if rng.random() < 0.5 else crop
    return np.asarray(Image.fromarray(np.ascontiguousarray(crop)).resize((side, side), Image.Resampling.LANCZOS))


class Photographs:
    """A ground to edit on, as `scenes` is one: pairs by index and how they are judged."""

    kinds = tuple(KINDS)

    def __init__(self, folder: Path | None = None):
        self.folder = find_folder(folder)

    def pair_at(
        self,
        seed: int,
        index: int,
        split: str = "train",
        size: tuple[int, int] = (SIDE, SIDE),
        kind: str | None = None,
        language: str | None = None,
    ) -> PhotographPair:
        """The pair at an index of the endless sequence that the seed and the split name; the same on every call.

        Raises ValueError where a kind finds nothing to change in the photographs.
        """
        number, names = SPLITS[split]
        rng = np.random.default_rng([number, seed, index])
        language = language or str(rng.choice(("en", "zh")))
        for _ in range(TRIES):
            maker = kind or str(rng.choice(self.kinds))
            picture = draw_crop(rng, photograph(self.folder / str(rng.choice(names))), size[0], split == "train")
            made = carry_out(picture, f"{split} {index}", Order(KINDS[maker], maker, int(rng.integers(1 << 30))), seed)
            if made is not None and changed_pixels(made.source, made.target).mean() > 0.02:
                said = made.english if language == "en" else made.chinese
                region = changed_pixels(made.source, made.target)
                return PhotographPair(made.source, made.target, said, maker, language, region, f"{split} {index}", seed)
        raise ValueError(f"{kind or 'No edit'} changes none of {TRIES} crops of {', '.join(names)}. Use other photographs.")


@lru_cache(maxsize=512)
def other_targets(source: bytes, shape: tuple[int, ...], kind: str) -> list[np.ndarray]:
    picture = np.frombuffer(source, np.uint8).reshape(shape)
    found = [picture]
    for maker, family in KINDS.items():
        if maker not in (kind, "recolour"):
            made = MAKERS[family][maker](picture, np.random.default_rng(0))
            found.append(made.source if maker == "day" else made.target)
    return found


def judge(pair: PhotographPair, result: np.ndarray) -> Verdict:
    """Judges a result, uint8 [H, W, 3].

    `changed`: where the edit clearly changes the source, the result's error is less than half of the unedited source's, and no other
    edit of the source, and not the source itself, is nearer to it (L2) than the target. `untouched`: the rest is kept.
    """
    error, change = difference(result, pair.target), difference(pair.source, pair.target)
    core = change.max(-1) > CORE_DIFFERENCE
    core = core if core.any() else pair.region
    kept = error[~pair.region]
    outside = float(kept.mean()) if kept.size else 0.0
    pixels = result.astype(np.float32)
    nearest = np.square(pair.target - pixels).sum()
    changed = bool(
        error[core].mean() < CORE_SHARE * change[core].mean()
        and all(np.square(other - pixels).sum() > nearest for other in pair.others)
    )
    untouched = outside <= KEPT_LIMIT
    return Verdict(changed and untouched, changed, untouched, outside, float(error[pair.region].mean()))
