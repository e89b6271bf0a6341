"""What the effects share: what a maker gives, brightness, blur, noise, hues."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

# Rec. 601.
LUMA = np.array((0.299, 0.587, 0.114), np.float32)


@dataclass(frozen=True)
class Made:
    """source, target: uint8 [H, W, 3]. english, chinese: values for the fields of the wordings. numbers: how strong the
    effect is."""

    source: np.ndarray
    target: np.ndarray
    numbers: dict
    english: dict[str, str] = field(default_factory=dict)
    chinese: dict[str, str] = field(default_factory=dict)


Make = Callable[[np.ndarray, np.random.Generator], Made | None]


def to_pixels(values: np.ndarray) -> np.ndarray:
    """Values 0..255 of any type -> uint8, rounded and clipped."""
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def grey(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> brightness, float32 [H, W, 1] in 0..255."""
    return (picture @ LUMA)[..., None]


def three(values: np.ndarray) -> np.ndarray:
    """[H, W, 1] -> uint8 [H, W, 3]."""
    return np.repeat(to_pixels(values), 3, axis=2)


def blurred(values: np.ndarray, radius: float) -> np.ndarray:
    """A plane [H, W] of 0..255, blurred at 8 bits -> float32 [H, W, 1]."""
    return np.asarray(Image.fromarray(to_pixels(values)).filter(ImageFilter.GaussianBlur(radius)), np.float32)[
        ..., None
    ]


def clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of two scales, float32 [H, W, 1] in 0..1."""
    planes = [
        np.asarray(
            Image.fromarray(rng.random((cells, cells), np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        )
        for cells in (4, 12)
    ]
    return np.clip((2 * planes[0] + planes[1]) / 3, 0, 1)[..., None]


def rgb(hsv: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def forwards(effect) -> Make:
    """The picture, and what an effect makes of it."""
    def make(picture, rng):
        made = effect(picture, rng)
        return made and Made(picture, *made)
    return make


def backwards(effect) -> Make:
    """What an effect makes of the picture, and the picture: how to undo it."""
    def make(picture, rng):
        made, numbers = effect(picture, rng)
        return Made(made, picture, numbers)
    return make
