"""Scenes of simple shapes, and how they are drawn.

A `Scene` is an immutable description. Rendering depends on nothing else, and every object keeps to its own box, so two scenes that
differ in one object differ in that object's pixels only. Positions and sizes are in pixels, pictures are uint8 [H, W, 3].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

RGB = tuple[int, int, int]

# Colours of objects and words; any two are at least 100 apart (Euclidean distance in 0..255 RGB).
COLOURS: dict[str, RGB] = {
    "red": (208, 22, 36),
    "orange": (248, 128, 14),
    "yellow": (255, 228, 50),
    "green": (36, 150, 60),
    "blue": (28, 80, 220),
    "purple": (122, 30, 165),
    "pink": (250, 135, 195),
    "white": (246, 246, 246),
    "black": (20, 20, 20),
}

BACKGROUNDS: dict[str, RGB] = {
    "white": (250, 250, 250),
    "grey": (150, 150, 150),
    "beige": (236, 218, 182),
    "light blue": (176, 214, 246),
    "light green": (188, 230, 178),
    "navy": (24, 30, 84),
    "black": (14, 14, 16),
}

WORDS = (
    "OPEN",
    "SALE",
    "STOP",
    "EXIT",
    "CAFE",
    "HELLO",
    "PIZZA",
    "MUSIC",
    "BOOKS",
    "HOTEL",
    "LOVE",
    "SUN",
    "TEA",
    "BUS",
    "MARKET",
    "WINTER",
    "GARDEN",
    "FISH",
)

# Drawn at this scale and averaged down, for smooth edges.
OVERSAMPLING = 4
# Thickness added to the built-in font's thin strokes, as a share of the letters' size.
BOLDNESS = 0.025
# The word's strip along the upper or lower edge, as a share of the picture's height.
STRIP_HEIGHT = 0.23


@dataclass(frozen=True)
class Thing:
    """One object: `rgb` is the drawn shade of the named `colour`, (x, y) the centre, and the shape fits a box of 2 * radius."""

    shape: str
    colour: str
    rgb: RGB
    x: int
    y: int
    radius: int


@dataclass(frozen=True)
class Word:
    text: str
    rgb: RGB
    at_top: bool


@dataclass(frozen=True)
class Background:
    """`pattern` is plain, gradient (from rgb at the top to rgb2 at the bottom), stripes or dots (rgb2 on rgb, every `period` pixels)."""

    name: str
    pattern: str
    rgb: RGB
    rgb2: RGB
    period: int = 16


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    background: Background
    things: tuple[Thing, ...]
    word: Word | None = None


def colour_distance(a: RGB, b: RGB) -> float:
    """Euclidean distance in 0..255 RGB."""
    return math.dist(a, b)


def _polygon(*points: tuple[float, float]) -> Callable:
    return lambda draw, at: draw.polygon([at(x, y) for x, y in points], fill=255)


def _ellipse(draw: ImageDraw.ImageDraw, at: Callable, radius: float, fill: int = 255) -> None:
    draw.ellipse([*at(-radius, -radius), *at(radius, radius)], fill=fill)


def _ring(draw: ImageDraw.ImageDraw, at: Callable) -> None:
    _ellipse(draw, at, 1)
    _ellipse(draw, at, 0.52, fill=0)


def _star_points() -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        reach, angle = (0.44 if corner % 2 else 1.05), math.pi * corner / 5
        points.append((reach * math.sin(angle), 0.05 - reach * math.cos(angle)))
    return points


# Each draws one shape in the box -1..1 (y points down); `at` turns such coordinates into pixels.
SHAPES: dict[str, Callable] = {
    "circle": lambda draw, at: _ellipse(draw, at, 1),
    "square": _polygon((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),
    "triangle": _polygon((0, -0.95), (1, 0.82), (-1, 0.82)),
    "star": _polygon(*_star_points()),
    "ring": _ring,
    "diamond": _polygon((0, -1), (0.8, 0), (0, 1), (-0.8, 0)),
    "cross": _polygon((-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
                      (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32)),
}
# No shape reaches further from its centre than this many radii.
SHAPE_REACH = 1.16


def _opacity(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(OVERSAMPLING), np.float32) / 255


@lru_cache(maxsize=1024)
def shape_mask(shape: str, radius: int) -> np.ndarray:
    """Opacity 0..1 of a shape in its box, float32 [2 * radius, 2 * radius]."""
    scale = radius * OVERSAMPLING
    image = Image.new("L", (2 * scale, 2 * scale))
    SHAPES[shape](ImageDraw.Draw(image), lambda x, y: ((x + 1) * scale - 0.5, (y + 1) * scale - 0.5))
    return _opacity(image)


@lru_cache(maxsize=1024)
def shape_area(shape: str, radius: int, grow: int) -> np.ndarray:
    """Pixels that a shape touches, grown by `grow` pixels; negative: pixels that it fills, shrunk. bool, square, centred on the shape."""
    margin = max(grow, 0)
    mask = np.pad(shape_mask(shape, radius), margin)
    if grow == 0:
        return mask > 0
    area = Image.fromarray(np.uint8(255) * (mask > 0 if grow > 0 else mask == 1))
    size = 2 * abs(grow) + 1
    return np.asarray(area.filter(ImageFilter.MaxFilter(size) if grow > 0 else ImageFilter.MinFilter(size))) > 0


def things_area(scene: Scene, things: tuple[Thing, ...], grow: int) -> np.ndarray:
    """Union of `shape_area` over things of the scene's picture, bool [H, W]."""
    area = np.zeros((scene.height, scene.width), bool)
    for thing in things:
        shape = shape_area(thing.shape, thing.radius, grow)
        half = shape.shape[0] // 2
        area[thing.y - half:thing.y + half, thing.x - half:thing.x + half] |= shape
    return area


def strip_rows(scene: Scene) -> slice:
    """The rows of the picture that belong to the scene's word."""
    height = round(STRIP_HEIGHT * scene.height)
    return slice(0, height) if scene.word.at_top else slice(scene.height - height, scene.height)


@lru_cache(maxsize=64)
def _word_font(width: int, height: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """The built-in font at the largest size at which every word fits (so that all have letters of one size), and its stroke width."""
    trial = 100
    font = ImageFont.load_default(trial)
    boxes = [font.getbbox(word, anchor="ls", stroke_width=round(BOLDNESS * trial)) for word in WORDS]
    widest = max(right - left for left, _, right, _ in boxes)
    tallest = max(bottom - top for _, top, _, bottom in boxes)
    size = trial * OVERSAMPLING * min(0.94 * width / widest, 0.76 * height / tallest)
    return ImageFont.load_default(size), round(BOLDNESS * size)


@lru_cache(maxsize=1024)
def word_mask(text: str, width: int, height: int) -> np.ndarray:
    """Opacity 0..1 of a word in the middle of its strip, float32 [height, width]."""
    font, stroke = _word_font(width, height)
    image = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    capital = -font.getbbox("H", anchor="ls")[1]
    ImageDraw.Draw(image).text(
        (image.width / 2, (image.height + capital) / 2), text, font=font, fill=255, anchor="ms", stroke_width=stroke
    )
    return _opacity(image)


@lru_cache(maxsize=8)
def _draw_background(background: Background, width: int, height: int) -> np.ndarray:
    """float32 [H, W, 3], 0..255; shared between calls, not to be written to."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    if background.pattern == "gradient":
        share = rows / (height - 1)
    elif background.pattern == "stripes":
        share = 0.5 + 0.5 * np.sin((rows + columns) * (2 * math.pi / background.period))
    elif background.pattern == "dots":
        half = background.period / 2
        distance = np.hypot(rows % background.period - half, columns % background.period - half)
        share = np.clip(background.period / 5 - distance, 0, 1)
    else:
        share = np.zeros_like(rows)
    first, second = np.float32(background.rgb), np.float32(background.rgb2)
    return first + share[..., None] * (second - first)


def _blend(canvas: np.ndarray, opacity: np.ndarray, rgb: RGB) -> None:
    canvas += opacity[..., None] * (np.float32(rgb) - canvas)


def render(scene: Scene) -> np.ndarray:
    """The scene's picture, uint8 [H, W, 3]."""
    canvas = _draw_background(scene.background, scene.width, scene.height).copy()
    if scene.word is not None:
        strip = canvas[strip_rows(scene)]
        _blend(strip, word_mask(scene.word.text, scene.width, strip.shape[0]), scene.word.rgb)
    for thing in scene.things:
        box = canvas[thing.y - thing.radius:thing.y + thing.radius, thing.x - thing.radius:thing.x + thing.radius]
        _blend(box, shape_mask(thing.shape, thing.radius), thing.rgb)
    return (canvas + 0.5).astype(np.uint8)
