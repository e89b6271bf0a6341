"""Pairs that need no model: tone, style, colour and text, by arithmetic on the pixels (docs/model.md, Training pairs).

A maker gets a picture, uint8 [H, W, 3], and a random generator, and gives source and target; None where the picture has nothing for it
to work on. Where an effect can be read both ways, the picture itself is the target of one: "remove the fog" has a real target.
"""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..errors import Step1XError
from .record import Pair, changed_pixels, instructions, words

# Below, letters could not be read.
MIN_SIDE = 64
# Least share of the picture's pixels that an edit has to change.
MIN_CHANGE = 0.002
# Rec. 601.
LUMA = np.array((0.299, 0.587, 0.114), np.float32)
# Hues of Pillow's HSV, 0..255: the middle of each colour.
HUES = {"red": 0, "orange": 19, "yellow": 40, "green": 85, "cyan": 128, "blue": 165, "purple": 194, "pink": 228}
# Pixels greyer or darker than this do not make a colour worth a name, and those below the second ones have no hue.
MIN_SATURATION, MIN_VALUE = 80, 50
HUELESS_SATURATION, HUELESS_VALUE = 24, 24
# A colour reaches from its most frequent hue, on both sides, to where there are fewer pixels than this share, and so many hues at most.
VALLEY, REACH = 0.12, 36
# Share of its pixels that must bear its name.
NAMED = 0.6
INKS = {"red": (205, 30, 35), "yellow": (250, 215, 40), "green": (25, 130, 60), "blue": (30, 70, 190), "white": (250, 250, 250), "black": (15, 15, 15)}
# Least difference in brightness, of 255, at which letters can be read.
CONTRAST = 80


@dataclass(frozen=True)
class Made:
    """source, target: uint8 [H, W, 3]. english, chinese: values for the fields of the wordings. numbers: how strong the effect is."""

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
    return np.asarray(Image.fromarray(to_pixels(values)).filter(ImageFilter.GaussianBlur(radius)), np.float32)[..., None]


def clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of two scales, float32 [H, W, 1] in 0..1."""
    planes = [np.asarray(Image.fromarray(rng.random((cells, cells), np.float32)).resize((width, height), Image.Resampling.BICUBIC)) for cells in (4, 12)]
    return np.clip((2 * planes[0] + planes[1]) / 3, 0, 1)[..., None]


def fog(picture, rng):
    height, width, _ = picture.shape
    strength = rng.uniform(0.5, 0.85)
    # The upper part of a scene is the farther one as a rule.
    depth = np.linspace(1.0, 0.45, height, dtype=np.float32)[:, None, None]
    share = strength * depth * (0.7 + 0.3 * clouds(rng, height, width))
    return to_pixels(picture * (1 - share) + rng.uniform(205, 235) * share), {"strength": strength}


def flakes(rng: np.random.Generator, height: int, width: int, density: float) -> np.ndarray:
    """Snowflakes of three sizes, the large ones blurred; float32 [H, W, 1] in 0..255."""
    layer, scale = np.zeros((height, width, 1), np.float32), max(height, width) / 1000
    for radius, share in ((1.0, 6.0), (2.2, 2.0), (4.5, 0.5)):
        plane = Image.new("L", (width, height))
        canvas, size = ImageDraw.Draw(plane), max(0.6, radius * scale)
        for _ in range(int(density * share * 100)):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            canvas.ellipse((x - size, y - size, x + size, y + size), fill=int(rng.uniform(160, 255)))
        layer = np.maximum(layer, blurred(np.asarray(plane), size / 3))
    return layer


def snow(picture, rng):
    density = rng.uniform(1.0, 2.5)
    pale = 0.75 * picture + 0.1 * grey(picture) + 30
    layer = flakes(rng, *picture.shape[:2], density)
    return to_pixels(pale + (255 - pale) * layer / 255), {"density": density}


def rain(picture, rng):
    height, width, _ = picture.shape
    slant, density = rng.uniform(-0.35, 0.35), rng.uniform(0.6, 1.4)
    plane = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(plane)
    for _ in range(int(700 * density)):
        x, y, length = rng.uniform(-0.2, 1.2) * width, rng.uniform(-0.1, 1) * height, rng.uniform(0.03, 0.09) * height
        canvas.line((x, y, x + slant * length, y + length), fill=int(rng.uniform(60, 150)), width=max(1, round(height / 700)))
    dark = 0.72 * picture + 0.08 * grey(picture)
    return to_pixels(dark + (235 - dark) * blurred(np.asarray(plane), 0.6) / 255), {"slant": slant, "density": density}


def night(picture, rng):
    strength = rng.uniform(0.28, 0.42)
    values = (picture / np.float32(255)) ** 1.35 * 255
    return to_pixels((0.55 * values + 0.45 * grey(picture)) * strength * np.array((0.75, 0.9, 1.35), np.float32)), {"strength": strength}


def sunset(picture, rng):
    strength = rng.uniform(0.6, 1.0)
    glow = np.linspace(1.0, 0.7, len(picture), dtype=np.float32)[:, None, None] * strength
    warm = picture * np.array((1.12, 0.86, 0.58), np.float32) + np.array((28, 8, 0), np.float32)
    return to_pixels(picture * (1 - glow) + warm * glow), {"strength": strength}


def winter(picture, rng):
    strength = rng.uniform(0.6, 1.0)
    cold = (0.55 * picture + 0.45 * grey(picture)) * np.array((0.86, 0.98, 1.16), np.float32) + 10
    return to_pixels(picture * (1 - strength) + cold * strength), {"strength": strength}


def autumn(picture, rng):
    hsv = np.asarray(Image.fromarray(picture).convert("HSV")).copy()
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    green = (hue > 45) & (hue < 115) & (saturation > 40) & (value > 25)
    if green.mean() < 0.03:
        return None
    centre = rng.uniform(10, 26)
    hsv[..., 0] = np.where(green, centre + (hue.astype(np.float32) - 80) * 0.25, hue).clip(0, 255)
    hsv[..., 1] = np.where(green, saturation * 1.15, saturation).clip(0, 255)
    return rgb(hsv), {"hue": centre}


def darken(picture, rng):
    strength = rng.uniform(0.25, 0.45)
    return to_pixels((picture / np.float32(255)) ** 1.2 * 255 * strength), {"strength": strength}


def add_noise(picture, rng):
    deviation = rng.uniform(15, 35)
    return to_pixels(picture + rng.standard_normal(picture.shape, np.float32) * deviation), {"deviation": deviation}


def blur(picture, rng):
    # In pixels; small pictures are blurred more for their size, or nobody would see it.
    radius = rng.uniform(0.5, 1) * (1 + max(picture.shape) / 250)
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))), {"radius": radius}


def compress(picture, rng):
    quality, content = int(rng.integers(4, 12)), io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=quality)
    return np.asarray(Image.open(content).convert("RGB")), {"quality": quality}


def age(picture, rng):
    """A faded brown photograph with scratches and stains."""
    height, width, _ = picture.shape
    faded, _ = sepia(picture, rng)
    faded = 0.62 * faded + 70 + 25 * clouds(rng, height, width)
    plane = Image.new("L", (width, height))
    canvas, scratches = ImageDraw.Draw(plane), int(rng.integers(8, 25))
    for _ in range(scratches):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        canvas.line((x, y, x + rng.normal(0, 0.03) * width, y + rng.normal(0, 0.25) * height), fill=int(rng.uniform(90, 220)), width=max(1, round(height / 600)))
    return to_pixels(faded + (240 - faded) * blurred(np.asarray(plane), 0.6) / 255), {"scratches": scratches}


def monochrome(picture, rng):
    contrast = rng.uniform(0.95, 1.2)
    return three((grey(picture) - 128) * contrast + 128), {"contrast": contrast}


def sepia(picture, rng):
    strength = rng.uniform(0.85, 1.0)
    brown = grey(picture) * np.array((1.02, 0.86, 0.66), np.float32) + np.array((18, 10, 2), np.float32)
    return to_pixels(picture * (1 - strength) + brown * strength), {"strength": strength}


def pencil(picture, rng):
    radius = rng.uniform(0.006, 0.012) * max(picture.shape)
    brightness = grey(picture)
    # The classic "dodge": what is as bright as its surroundings becomes paper.
    sketch = brightness / np.maximum(blurred(brightness[..., 0], radius), 1) * 255
    grain = rng.standard_normal(brightness.shape, np.float32) * 5
    return three(np.minimum(sketch, 255) ** 2 / 255 + grain), {"radius": radius}


def ink(picture, rng):
    offset = rng.uniform(4, 9)
    brightness = grey(picture)
    surroundings = blurred(brightness[..., 0], max(picture.shape) / 100)
    return three(np.where((blurred(brightness[..., 0], 1) < surroundings - offset) | (brightness < 40), 20.0, 250.0)), {"offset": offset}


def box_means(values: np.ndarray, radius: int) -> np.ndarray:
    """Means over the square of radius + 1 pixels whose upper left corner each pixel is, of a picture [H, W, C] with `radius` pixels of margin on each side."""
    sums = np.pad(values.cumsum(0, np.float64).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    size = radius + 1
    return ((sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size**2).astype(np.float32)


def painted(picture: np.ndarray, radius: int) -> np.ndarray:
    """Kuwahara's filter: each pixel takes the mean of that quarter of its surroundings that varies least. uint8 [H, W, 3] -> float32."""
    height, width, _ = picture.shape
    padded = np.pad(picture, ((radius, radius), (radius, radius), (0, 0)), mode="edge").astype(np.float32)
    brightness = padded @ LUMA
    means = box_means(padded, radius)
    spread = box_means((brightness**2)[..., None], radius) - box_means(brightness[..., None], radius) ** 2
    corners = [(y, x) for y in (0, radius) for x in (0, radius)]
    best = np.argmin(np.stack([spread[y:y + height, x:x + width, 0] for y, x in corners]), axis=0)
    out = np.empty(picture.shape, np.float32)
    for number, (y, x) in enumerate(corners):
        chosen = best == number
        out[chosen] = means[y:y + height, x:x + width][chosen]
    return out


def oil(picture, rng):
    radius, vividness = max(2, round(max(picture.shape) * rng.uniform(0.005, 0.009))), rng.uniform(1.1, 1.4)
    values = painted(picture, radius)
    return to_pixels((values - grey(values)) * vividness + grey(values)), {"radius": radius, "vividness": vividness}


def cartoon(picture, rng):
    levels = int(rng.integers(5, 9))
    flat = painted(picture, max(2, round(max(picture.shape) * 0.003)))
    step = 255 / (levels - 1)
    brightness = grey(flat)[..., 0]
    edges = np.abs(np.diff(brightness, axis=0, append=brightness[-1:])) + np.abs(np.diff(brightness, axis=1, append=brightness[:, -1:]))
    lines = blurred(np.clip(edges * 6 - 60, 0, 255), 0.7)
    return to_pixels(np.round(flat / step) * step * (1 - 0.9 * lines / 255)), {"levels": levels}


def pixel_art(picture, rng):
    height, width, _ = picture.shape
    cells = int(rng.integers(56, 112))
    scale = cells / max(height, width)
    small = Image.fromarray(picture).resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    small = small.quantize(24).convert("RGB")
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST)), {"cells": cells}


def halftone(picture, rng):
    height, width, _ = picture.shape
    spacing = max(3.0, max(height, width) * rng.uniform(0.006, 0.012))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = np.pi / 4
    across, along = (x * np.cos(angle) + y * np.sin(angle)) / spacing, (y * np.cos(angle) - x * np.sin(angle)) / spacing
    screen = (np.cos(2 * np.pi * across) + np.cos(2 * np.pi * along))[..., None] * 62 + 128
    return three(np.clip((blurred(grey(picture)[..., 0], spacing / 3) - screen) * 4 + 128, 15, 245)), {"spacing": spacing}


def rgb(hsv: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def hue_distance(hue: np.ndarray, centre: int) -> np.ndarray:
    """Signed way around the circle of hues, -128..127."""
    return (hue.astype(np.int16) - centre + 128) % 256 - 128


def hue_range(counts: np.ndarray, peak: int) -> np.ndarray | None:
    """The hues around a peak of a histogram [256], bool [256]; None where they have no clear end on both sides."""
    low = counts < VALLEY * counts[peak]
    sides = [np.flatnonzero(low[(peak + step * np.arange(REACH + 1)) % 256]) for step in (-1, 1)]
    if not all(len(side) for side in sides):
        return None
    inside = np.zeros(256, bool)
    inside[np.arange(peak - sides[0][0] + 1, peak + sides[1][0]) % 256] = True
    return inside


def recolour(picture, rng):
    """A colour of the picture becomes another one; light and shade stay. Colours that go over into their neighbours are left: they would be cut in two."""
    hsv = np.asarray(Image.fromarray(picture).convert("HSV"))
    names = list(HUES)
    nearest = np.argmin(np.stack([np.abs(hue_distance(np.arange(256), centre)) for centre in HUES.values()]), axis=0)
    coloured = (hsv[..., 1] > HUELESS_SATURATION) & (hsv[..., 2] > HUELESS_VALUE)
    strong = (hsv[..., 1] > MIN_SATURATION) & (hsv[..., 2] > MIN_VALUE)
    counts, reached = (np.bincount(hsv[..., 0][pixels], minlength=256) for pixels in (strong, coloured))
    smooth = sum(np.roll(counts, shift) for shift in range(-3, 4))
    candidates = {}
    for number, name in enumerate(names):
        peak = int(np.argmax(np.where(nearest == number, smooth, -1)))
        inside = hue_range(smooth, peak)
        if inside is None or counts[inside & (nearest == number)].sum() < NAMED * counts[inside].sum():
            continue
        # Not all of the picture: that would be another edit.
        if counts[inside].sum() >= 0.02 * strong.size and reached[inside].sum() <= 0.7 * strong.size:
            candidates[name] = inside
    if not candidates:
        return None
    old = str(rng.choice(list(candidates)))
    new = str(rng.choice([name for name in names if abs(hue_distance(np.array(HUES[name]), HUES[old])) >= 40]))
    # Pale and dark pixels of the hue go along, so that there is no edge where a colour fades.
    region = coloured & candidates[old][hsv[..., 0]]
    changed = hsv.copy()
    changed[..., 0] = (HUES[new] + hue_distance(hsv[..., 0], HUES[old]) * 0.5).astype(np.int16) % 256
    target = np.where(region[..., None], rgb(changed), picture)
    colours = words()["colours"]
    return Made(picture, target, {"share": float(region.mean())}, {"old": old, "new": new}, {"old": colours[old], "new": colours[new]})


@dataclass(frozen=True)
class Sign:
    """Where letters are put. box: left, top, right, bottom. paper: the colour of the plate, None for letters on the picture itself."""

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
    canvas.text(((left + right) / 2, (top + bottom) / 2), text, INKS[ink or sign.ink], ImageFont.load_default(sign.size), anchor="mm")
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
    return Made(picture, letter(picture, sign, new), {"place": sign.place}, {"new": new, "place": english, "colour": sign.ink},
                {"new": new, "place": chinese, "colour": words()["colours"][sign.ink]})


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
    return Made(letter(picture, sign, old), letter(picture, sign, old, colour), {"place": sign.place}, {"old": old, "colour": colour},
                {"old": old, "colour": words()["colours"][colour]})


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


TONES = {"fog": forwards(fog), "defog": backwards(fog), "snow": forwards(snow), "unsnow": backwards(snow), "rain": forwards(rain), "unrain": backwards(rain),
         "night": forwards(night), "day": backwards(night), "sunset": forwards(sunset), "winter": forwards(winter), "autumn": forwards(autumn),
         "brighten": backwards(darken), "denoise": backwards(add_noise), "deblur": backwards(blur), "dejpeg": backwards(compress), "restore": backwards(age),
         "colourise": backwards(monochrome)}
STYLES = {"pencil": forwards(pencil), "ink": forwards(ink), "oil": forwards(oil), "cartoon": forwards(cartoon), "pixel": forwards(pixel_art),
          "halftone": forwards(halftone), "sepia": forwards(sepia), "monochrome": forwards(monochrome)}
TEXTS = {"text_replace": text_replace, "text_add": text_add, "text_remove": text_remove, "text_colour": text_colour}
MAKERS: dict[str, dict[str, Make]] = {"tone_transfer": TONES, "style_change": STYLES, "color_alter": {"recolour": recolour}, "text_change": TEXTS}
ORDER_KINDS = tuple(MAKERS)


@dataclass(frozen=True)
class Order:
    """A pair to make. number: which of the picture's orders it is."""

    kind: str
    maker: str
    number: int


def orders(name: str, kinds: list[str], first: int, count: int, seed: int) -> list[Order]:
    """The picture's orders number `first` to `first + count`: the kinds take turns, and the makers of each kind in a random order of the picture's own.

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
        raise Step1XError(f"A picture has {width}x{height} pixels; pairs need {MIN_SIDE} on each side at least. Leave it out.")


def shrink(picture: np.ndarray, max_side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> the same with at most so many pixels on the longer side; 0: as it is. Raises Step1XError for a picture that is too small."""
    height, width, _ = picture.shape
    check_side(height, width)
    scale = max_side / max(height, width)
    if not max_side or scale >= 1:
        return picture
    return np.asarray(Image.fromarray(picture).resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS))


def carry_out(picture: np.ndarray, name: str, order: Order, seed: int) -> Pair | None:
    """The ordered pair of a picture, uint8 [H, W, 3]; None where the maker finds nothing to work on or changes too little."""
    text = f"{seed} {name} {order.number}"
    made = MAKERS[order.kind][order.maker](picture, np.random.default_rng(list(text.encode())))
    if made is None or changed_pixels(made.source, made.target).mean() < MIN_CHANGE:
        return None
    english, chinese = instructions(words()["makers"][order.maker], made.english, made.chinese, random.Random(text))
    numbers = {key: round(value, 4) if isinstance(value, float) else value for key, value in made.numbers.items()}
    return Pair(made.source, made.target, order.kind, english, chinese, order.maker, {"picture": name, "number": order.number, "seed": seed, **numbers})
