"""Random scenes: which objects, in which named places, on which background."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from .drawing import (
    BACKGROUNDS,
    COLOURS,
    RGB,
    SHAPE_REACH,
    SHAPES,
    STRIP_HEIGHT,
    WORDS,
    Background,
    Scene,
    Thing,
    Word,
    colour_distance,
)

T = TypeVar("T")

# Named places: (column, row) of a 3x3 grid. None is any column or row: "on the left" holds in the corners on the left,
# too.
PLACES: dict[str, tuple[int | None, int | None]] = {
    "left": (0, None),
    "right": (2, None),
    "top": (None, 0),
    "bottom": (None, 2),
    "middle": (1, 1),
    "top left": (0, 0),
    "top right": (2, 0),
    "bottom left": (0, 2),
    "bottom right": (2, 2),
}
GRID = (0.18, 0.5, 0.82)  # centres of columns and rows, as shares of the picture's sides
GRID_JITTER = 0.035
COLUMN_LIMITS = (0.36, 0.64)  # where an object's column or row changes

MARGIN = 4  # pixels between an object and the picture's edge
GAP = 5  # pixels between objects, and between an object and the word's strip

# Smallest and largest radius as shares of the short side, by the number of objects.
RADII = {1: (0.14, 0.22), 2: (0.13, 0.21), 3: (0.12, 0.18), 4: (0.12, 0.165)}
COUNT_SHARES = (0.15, 0.35, 0.35, 0.15)
ADDED_RADIUS = 0.16  # an instruction to add names no size, so there is only one

# Least distances in RGB: an object from the background, a word from the background.
OBJECT_CONTRAST = 90
WORD_CONTRAST = 150
COLOUR_JITTER = 8
WORD_SHARE = 0.25


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def check_size(width: int, height: int) -> None:
    """Raises ValueError unless both sides are multiples of 16 between 96 and 256."""
    for side in (width, height):
        if side % 16 or not 96 <= side <= 256:
            raise ValueError(
                f"A scene of {width}x{height} pixels cannot be drawn: sides are multiples of 16 from 96 to 256."
            )


def cell_of(thing: Thing, scene: Scene) -> tuple[int, int]:
    """(column, row) of the object in the 3x3 grid of named places."""
    first, second = COLUMN_LIMITS
    column, row = ((share > first) + (share > second) for share in (thing.x / scene.width, thing.y / scene.height))
    return column, row


def in_place(thing: Thing, scene: Scene, place: str) -> bool:
    """Whether the object is at a place of that name."""
    return all(wanted in (None, actual) for wanted, actual in zip(PLACES[place], cell_of(thing, scene), strict=True))


def position(
    size: tuple[int, int],
    cell: tuple[int, int],
    radius: int,
    word_at_top: bool | None,
    jitter: Sequence[float] = (0, 0),
) -> tuple[int, int]:
    """Centre (x, y) of an object in a cell of the grid, moved by jitter (shares of the sides), kept inside the picture and off the strip."""
    width, height = size
    strip = round(STRIP_HEIGHT * height) + GAP - MARGIN
    top, bottom = (strip if word_at_top is True else 0), (strip if word_at_top is False else 0)
    x = round((GRID[cell[0]] + jitter[0]) * width)
    y = round((GRID[cell[1]] + jitter[1]) * height)
    reach = radius + MARGIN
    return min(max(x, reach), width - reach), min(max(y, top + reach), height - bottom - reach)


def is_free(x: int, y: int, radius: int, things: Sequence[Thing]) -> bool:
    """Whether an object of any shape fits there without coming near another one, whatever that one's shape."""
    return all(math.dist((x, y), (other.x, other.y)) >= SHAPE_REACH * (radius + other.radius) + GAP for other in things)


def free_cells(word_at_top: bool | None) -> list[tuple[int, int]]:
    """Cells of the grid that the word's strip leaves to objects."""
    rows = [row for row in range(3) if word_at_top is None or row != (0 if word_at_top else 2)]
    return [(column, row) for row in rows for column in range(3)]


def _jittered(rng: np.random.Generator, rgb: RGB, jitter: int) -> RGB:
    return tuple(
        min(max(channel + int(shift), 0), 255)
        for channel, shift in zip(rgb, rng.integers(-jitter, jitter + 1, 3), strict=True)
    )


def sample_background(rng: np.random.Generator) -> Background:
    name = pick(rng, tuple(BACKGROUNDS))
    rgb = _jittered(rng, BACKGROUNDS[name], 4)
    pattern = pick(rng, ("plain", "plain", "gradient", "stripes", "dots"))
    contrast = {"plain": 0, "gradient": 45, "stripes": 18, "dots": 22}[pattern]
    # Light tints get darker, dark ones lighter: the other way there is no room.
    shift = -contrast if sum(rgb) > 3 * 127 else contrast
    return Background(
        name, pattern, rgb, tuple(min(max(channel + shift, 0), 255) for channel in rgb), int(rng.integers(10, 21))
    )


def contrasting(background: Background, least: float) -> list[str]:
    """Names of the colours that stand out from every part of the background."""
    return [
        name
        for name, rgb in COLOURS.items()
        if min(colour_distance(rgb, part) for part in (background.rgb, background.rgb2)) >= least
    ]


def _sample_look(rng: np.random.Generator, things: Sequence[Thing], colours: Sequence[str]) -> tuple[str, str]:
    """Shape and colour of the next object: often like an earlier one, so that places are needed to tell them apart."""
    shape, colour = pick(rng, tuple(SHAPES)), pick(rng, colours)
    if things and rng.random() < 0.45:
        twin = pick(rng, things)
        shape = twin.shape
        if rng.random() < 0.4:
            colour = twin.colour
    return shape, colour


def sample_scene(rng: np.random.Generator, size: tuple[int, int], with_word: bool | None = None) -> Scene:
    """A random scene of size (width, height). Every object is in a cell of its own; with_word=None leaves the word to chance."""
    width, height = size
    background = sample_background(rng)
    word = None
    if with_word or (with_word is None and rng.random() < WORD_SHARE):
        ink = COLOURS[pick(rng, contrasting(background, WORD_CONTRAST))]
        word = Word(pick(rng, WORDS), ink, at_top=bool(rng.random() < 0.3))
    word_at_top = word.at_top if word else None

    count = int(rng.choice(4, p=COUNT_SHARES)) + 1
    colours = contrasting(background, OBJECT_CONTRAST)
    things: list[Thing] = []
    cells = free_cells(word_at_top)
    for cell in rng.permutation(len(cells)):
        radius = round(float(rng.uniform(*RADII[count])) * min(size))
        x, y = position(size, cells[cell], radius, word_at_top, rng.uniform(-GRID_JITTER, GRID_JITTER, 2))
        if len(things) < count and is_free(x, y, radius, things):
            shape, colour = _sample_look(rng, things, colours)
            things.append(Thing(shape, colour, _jittered(rng, COLOURS[colour], COLOUR_JITTER), x, y, radius))
    return Scene(width, height, background, tuple(things), word)
