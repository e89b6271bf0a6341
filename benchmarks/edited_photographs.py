"""Edits computed from photographs, with known masks, and what a VAE and a model make of them, for benchmarks/keep_unedited.py.

No VAE here reproduces photographs, so it is simulated: 40 % of the image blurred (sigma 1), and an error of 0.006 and 0.4 times the local
contrast, 70 % of whose variance depends on the place alone and so is the same before and after the edit; 8 bits. The model adds: a shift of up
to 0.25 pixels, blur, noise, and for half of the pairs a colour shift of the whole image (gain up to 4 %, offset up to 0.015).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# Of the images in scikit-image's wheel, those that are photographs.
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "camera.png", "hubble_deep_field.jpg",
    "moon.png", "coins.png", "brick.png", "grass.png", "gravel.png", "clock_motion.png", "retina.jpg",
)
# A pixel that differs by more than this (of 255) has visibly changed.
VISIBLE = 12


@dataclass(frozen=True)
class Pair:
    """source, target, round_trip, edited: uint8 [H, W, 3]; changed: bool [H, W], what the edit visibly changed; kind: of edit."""

    source: np.ndarray
    target: np.ndarray
    round_trip: np.ndarray
    edited: np.ndarray
    changed: np.ndarray
    kind: str


def photographs(folder: Path, side: int) -> list[np.ndarray]:
    """The photographs in a folder, uint8 [H, W, 3], the shorter side that long."""
    found = []
    for path in (folder / name for name in PHOTOGRAPHS):
        if path.is_file():
            with Image.open(path) as image:
                image = image.convert("RGB")
                scale = side / min(image.size)
                found.append(np.asarray(image.resize([round(n * scale) for n in image.size], Image.Resampling.LANCZOS)))
    return found


def cut(picture: np.ndarray, rng: np.random.Generator, side: int) -> np.ndarray:
    """A square of a photograph, three quarters of the side or more, at `side` pixels; mirrored every other time."""
    size = round(side * rng.uniform(0.75, 1))
    top, left = (rng.integers(0, length - size + 1) for length in picture.shape[:2])
    part = picture[top:top + size, left:left + size]
    return np.asarray(Image.fromarray(part[:, ::rng.choice([1, -1])]).resize((side, side), Image.Resampling.LANCZOS))


def blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """A round shape with a wavy outline somewhere in the image, float [H, W] with an edge of two pixels."""
    radius = side * rng.uniform(0.06, 0.18)
    y, x = rng.uniform(radius, side - radius, 2)
    rows, columns = np.mgrid[:side, :side]
    angle = np.arctan2(rows - y, columns - x)
    outline = radius * (1 + sum(rng.uniform(0, 0.12) * np.sin(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5)))
    return np.clip((outline - np.hypot(rows - y, columns - x)) / 2 + 0.5, 0, 1)


def object_add(picture, rng, others):
    """A piece of another photograph."""
    share = blob(rng, len(picture))[..., None]
    other = cut(others[rng.integers(len(others))], rng, len(picture))
    return picture, (picture * (1 - share) + other * share + 0.5).astype(np.uint8)


def object_remove(picture, rng, others):
    return object_add(picture, rng, others)[::-1]


def object_colour(picture, rng, others):
    """Another hue and brightness in one place."""
    share = blob(rng, len(picture))[..., None]
    hsv = np.asarray(Image.fromarray(picture).convert("HSV")).astype(np.int16)
    hsv[..., 0] = (hsv[..., 0] + rng.integers(50, 200)) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] + 60, 0, 255)
    hsv[..., 2] = np.clip(hsv[..., 2] * rng.uniform(0.7, 1.3), 0, 255)
    other = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))
    return picture, (picture * (1 - share) + other * share + 0.5).astype(np.uint8)


def of_maker(make):
    def edit(picture, rng, others):
        made = make(picture, rng)
        return None if made is None or made.numbers.get("share", 0) > 0.4 else (made.source, made.target)
    return edit


def kinds() -> tuple[dict, dict]:
    """The edits of a part of the image, and those of the whole."""
    from step1x_core.pairs.makers import colours, damage, lettering, pixels, styles, weather

    local = {"text add": lettering.text_add, "text replace": lettering.text_replace, "text remove": lettering.text_remove,
             "text colour": lettering.text_colour, "recolour": colours.recolour}
    local = {name: of_maker(make) for name, make in local.items()}
    local |= {"object add": object_add, "object remove": object_remove, "object colour": object_colour}
    whole = {"monochrome": styles.monochrome, "sepia": styles.sepia, "pencil": styles.pencil, "oil": styles.oil,
             "cartoon": styles.cartoon, "pixel art": styles.pixel_art, "darken": damage.darken, "noise": damage.add_noise,
             "fog": weather.fog, "night": weather.night, "sunset": weather.sunset, "winter": weather.winter}
    whole = {name: of_maker(pixels.forwards(effect)) for name, effect in whole.items()}
    return local, whole


def blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    """float32 [H, W, 3], blurred."""
    radius = int(3 * sigma + 1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    out = values.astype(np.float32)
    for axis in (0, 1):
        padded = np.pad(out, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="edge")
        out = sum(w * np.take(padded, range(i, i + out.shape[axis]), axis) for i, w in enumerate(weights))
    return out


def field(rng: np.random.Generator, shape) -> np.ndarray:
    """Noise of variance 1 whose neighbours resemble each other."""
    noise = blurred(rng.standard_normal(shape).astype(np.float32), 0.7)
    return noise / noise.std()


def through_vae(image: np.ndarray, own: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """float [H, W, 3] in 0..1 -> the same of 8 bits. own, placed: noise of this image and of the place."""
    soft = blurred(image, 1.0)
    error = (0.006 + 0.4 * np.abs(image - soft)) * (0.7**0.5 * placed + 0.3**0.5 * own)
    return np.round(np.clip(image + 0.4 * (soft - image) + error, 0, 1) * 255) / 255


def through_model(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a model does to what it was not asked to edit; float [H, W, 3] in 0..1."""
    dy, dx = rng.uniform(-0.25, 0.25, 2)
    for axis, shift in ((0, dy), (1, dx)):
        image = image + abs(shift) * (np.roll(image, int(np.sign(shift)), axis) - image)
    image = image + rng.uniform(0, 0.25) * (blurred(image, 1.0) - image)
    if rng.random() < 0.5:
        image = image * rng.uniform(0.96, 1.04, 3) + rng.uniform(-0.015, 0.015, 3)
    return image + 0.004 * rng.standard_normal(image.shape)


def make_pair(index: int, seed: int, photos: list[np.ndarray], side: int, whole: bool) -> Pair:
    """The pair at an index of an endless sequence."""
    rng = np.random.default_rng([seed, index, whole])
    edits = kinds()[whole]
    name = list(edits)[index % len(edits)]
    while True:
        picture = cut(photos[rng.integers(len(photos))], rng, side)
        made = edits[name](picture, rng, photos)
        if made is None:
            continue
        source, target = made
        changed = np.abs(source.astype(int) - target).max(-1) > VISIBLE
        if changed.mean() > 0.001:
            break
    placed = field(rng, source.shape)
    round_trip = through_vae(source / 255.0, field(rng, source.shape), placed)
    edited = through_vae(through_model(target / 255.0, rng), field(rng, source.shape), placed)
    as_bytes = [np.round(values * 255).astype(np.uint8) for values in (round_trip, edited)]
    return Pair(source, target, *as_bytes, changed, name)
