"""Words on signs and on the picture itself."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..record import words
from .pixels import LUMA, Made

INKS = {
    "red": (205, 30, 35),
    "yellow": (250, 215, 40),
    "green": (25, 130, 60),
    "blue": (30, 70, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
# Least difference in brightness, of 255, at which letters can be read.
CONTRAST = 80


@dataclass(frozen=True)
class Sign:
    """Where letters are put. box: left, top, right, bottom. paper: the colour of the plate, None for letters on the
    picture itself."""

    place: str
    box: tuple[int, int, int, int]
    size: float
    paper: str | None
    ink: str


def place_sign(picture: np.ndarray, rng: np.random.Generator, texts: list[str], plate: bool) -> Sign:
    """Room for the longest of the texts in one of six places of the picture."""
    height, width, _ = picture.shape
    size = height * rng.uniform(0.06, 0.12)
    longest = max(ImageFont.load_default(size).getlength(text) for text in texts)
    if longest > 0.8 * width:
        size, longest = size * 0.8 * width / longest, 0.8 * width
    box_width, box_height = min(width, int(longest + 1.2 * size)), min(height, int(1.8 * size))
    place = str(rng.choice(list(words()["places"])))
    margin = int(0.03 * min(width, height))
    left = margin if "left" in place else width - margin - box_width if "right" in place else (width - box_width) // 2
    top = margin if "top" in place else height - margin - box_height
    box = (max(left, 0), top, max(left, 0) + box_width, top + box_height)
    paper = str(rng.choice(list(INKS))) if plate else None
    ground = INKS[paper] if plate else picture[box[1]:box[3], box[0]:box[2]].mean(axis=(0, 1))
    return Sign(place, box, size, paper, str(rng.choice(readable(ground))))


def readable(ground) -> list[str]:
    """The inks that stand out from a colour, RGB 0..255: black or white always does."""
    brightness = np.dot(ground, LUMA)
    return [name for name, ink in INKS.items() if abs(np.dot(ink, LUMA) - brightness) >= CONTRAST]


def letter(picture: np.ndarray, sign: Sign, text: str, ink: str | None = None) -> np.ndarray:
    """The picture with a sign that says so. ink: another colour of the letters."""
    out = Image.fromarray(picture)
    canvas = ImageDraw.Draw(out)
    if sign.paper:
        canvas.rounded_rectangle(sign.box, radius=sign.size * 0.25, fill=INKS[sign.paper])
    left, top, right, bottom = sign.box
    canvas.text(
        ((left + right) / 2, (top + bottom) / 2),
        text,
        INKS[ink or sign.ink],
        ImageFont.load_default(sign.size),
        anchor="mm",
    )
    return np.asarray(out)


def pick_words(rng: np.random.Generator, count: int) -> list[str]:
    return [str(word) for word in rng.choice(words()["words"], count, replace=False)]


def text_replace(picture, rng):
    old, new = pick_words(rng, 2)
    sign = place_sign(picture, rng, [old, new], plate=True)
    values = {"old": old, "new": new}
    return Made(letter(picture, sign, old), letter(picture, sign, new), {"place": sign.place}, values, values)


def text_add(picture, rng):
    new, = pick_words(rng, 1)
    sign = place_sign(picture, rng, [new], plate=False)
    english, chinese = words()["places"][sign.place]
    return Made(
        picture,
        letter(picture, sign, new),
        {"place": sign.place},
        {"new": new, "place": english, "colour": sign.ink},
        {"new": new, "place": chinese, "colour": words()["colours"][sign.ink]},
    )


def text_remove(picture, rng):
    old, = pick_words(rng, 1)
    sign = place_sign(picture, rng, [old], plate=False)
    return Made(letter(picture, sign, old), picture, {"place": sign.place}, {"old": old}, {"old": old})


def text_colour(picture, rng):
    old, = pick_words(rng, 1)
    sign = place_sign(picture, rng, [old], plate=True)
    # On dark paper only white and yellow can be read.
    paper = str(rng.choice(["white", "yellow"]))
    ink, colour = (str(name) for name in rng.choice(readable(INKS[paper]), 2, replace=False))
    sign = replace(sign, paper=paper, ink=ink)
    return Made(
        letter(picture, sign, old),
        letter(picture, sign, old, colour),
        {"place": sign.place},
        {"old": old, "colour": colour},
        {"old": old, "colour": words()["colours"][colour]},
    )
