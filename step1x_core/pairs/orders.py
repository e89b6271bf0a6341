"""Which makers there are, which pairs of a picture are made, and making them."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import Step1XError
from .makers.colours import recolour
from .makers.damage import add_noise, age, blur, compress, darken
from .makers.lettering import text_add, text_colour, text_remove, text_replace
from .makers.pixels import Make, backwards, forwards
from .makers.styles import cartoon, halftone, ink, monochrome, oil, pencil, pixel_art, sepia
from .makers.weather import autumn, fog, night, rain, snow, sunset, winter
from .record import Pair, changed_pixels, instructions, words

# Below, letters could not be read.
MIN_SIDE = 64
# Least share of the picture's pixels that an edit has to change.
MIN_CHANGE = 0.002
TONES = {
    "fog": forwards(fog),
    "defog": backwards(fog),
    "snow": forwards(snow),
    "unsnow": backwards(snow),
    "rain": forwards(rain),
    "unrain": backwards(rain),
    "night": forwards(night),
    "day": backwards(night),
    "sunset": forwards(sunset),
    "winter": forwards(winter),
    "autumn": forwards(autumn),
    "brighten": backwards(darken),
    "denoise": backwards(add_noise),
    "deblur": backwards(blur),
    "dejpeg": backwards(compress),
    "restore": backwards(age),
    "colourise": backwards(monochrome),
}
STYLES = {
    "pencil": forwards(pencil),
    "ink": forwards(ink),
    "oil": forwards(oil),
    "cartoon": forwards(cartoon),
    "pixel": forwards(pixel_art),
    "halftone": forwards(halftone),
    "sepia": forwards(sepia),
    "monochrome": forwards(monochrome),
}
TEXTS = {"text_replace": text_replace, "text_add": text_add, "text_remove": text_remove, "text_colour": text_colour}
MAKERS: dict[str, dict[str, Make]] = {
    "tone_transfer": TONES,
    "style_change": STYLES,
    "color_alter": {"recolour": recolour},
    "text_change": TEXTS,
}
ORDER_KINDS = tuple(MAKERS)


@dataclass(frozen=True)
class Order:
    """A pair to make. number: which of the picture's orders it is."""

    kind: str
    maker: str
    number: int


def orders(name: str, kinds: list[str], first: int, count: int, seed: int) -> list[Order]:
    """The picture's orders number `first` to `first + count`: the kinds take turns, and the makers of each kind in a
    random order of the picture's own.

    name: of the picture; the same name and seed give the same orders.
    """
    rng = random.Random(f"{seed} {name}")
    kinds = rng.sample(kinds, len(kinds))
    makers = {kind: rng.sample(list(MAKERS[kind]), len(MAKERS[kind])) for kind in kinds}
    chosen = [(kinds[number % len(kinds)], number // len(kinds), number) for number in range(first, first + count)]
    return [Order(kind, makers[kind][turn % len(makers[kind])], number) for kind, turn, number in chosen]


def check_side(height: int, width: int) -> None:
    """Raise Step1XError for a picture that is too small."""
    if min(height, width) < MIN_SIDE:
        raise Step1XError(f"An image has {width}x{height} pixels; pairs need {MIN_SIDE} on each side. Leave it out.")


def shrink(picture: np.ndarray, max_side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> the same with at most so many pixels on the longer side; 0: as it is. Raises Step1XError for a
    picture that is too small."""
    height, width, _ = picture.shape
    check_side(height, width)
    scale = max_side / max(height, width)
    if not max_side or scale >= 1:
        return picture
    return np.asarray(
        Image.fromarray(picture).resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
        )
    )


def carry_out(picture: np.ndarray, name: str, order: Order, seed: int) -> Pair | None:
    """The ordered pair of a picture, uint8 [H, W, 3]; None where the maker finds nothing to work on or changes too
    little."""
    text = f"{seed} {name} {order.number}"
    made = MAKERS[order.kind][order.maker](picture, np.random.default_rng(list(text.encode())))
    if made is None or changed_pixels(made.source, made.target).mean() < MIN_CHANGE:
        return None
    english, chinese = instructions(words()["makers"][order.maker], made.english, made.chinese, random.Random(text))
    numbers = {key: round(value, 4) if isinstance(value, float) else value for key, value in made.numbers.items()}
    return Pair(
        made.source,
        made.target,
        order.kind,
        english,
        chinese,
        order.maker,
        {"picture": name, "number": order.number, "seed": seed, **numbers},
    )
