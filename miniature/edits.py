"""The kinds of edits. Each takes a scene and returns what to say, the edited scene and the pixels that may change."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .drawing import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    WORDS,
    Background,
    Scene,
    Thing,
    colour_distance,
    render,
    strip_rows,
    things_area,
    word_mask,
)
from .instructions import choose_reference, name_colour, name_place, name_thing, phrase, quote, refer, with_article
from .layout import (
    ADDED_RADIUS,
    OBJECT_CONTRAST,
    PLACES,
    WORD_CONTRAST,
    contrasting,
    free_cells,
    is_free,
    pick,
    position,
)

# Pixels by which a region exceeds what changes in it.
REGION_MARGIN = 3
# Pixels inside an object's outline that a new background may change, too. Thin rings would vanish under a wider margin.
BACKGROUND_MARGIN = 2
MOSAIC_BLOCK = 8
# Least distance in RGB between the old and the new background.
BACKGROUND_CONTRAST = 60


@dataclass
class EditPair:
    """`source` and `target` are uint8 [H, W, 3]; `region`, bool [H, W], holds the pixels that the edit may change.

    `scene` and `edited` describe the pictures; a style is applied to the drawing of `edited`. `details` holds what the edit was about:
    `thing` (index of the object), `reference`, `colour`, `shape`, `place`, `background`, `style`, `word`, each where the kind has it.
    """

    source: np.ndarray
    target: np.ndarray
    instruction: str
    kind: str
    language: str
    region: np.ndarray
    scene: Scene
    edited: Scene
    details: dict


@dataclass
class Edit:
    """What one of the kinds below makes of a scene; fields as in `EditPair`, `scene` being the edited one."""

    instruction: str
    scene: Scene
    region: np.ndarray
    details: dict

    def draw(self) -> np.ndarray:
        """The edited picture, uint8 [H, W, 3]."""
        picture = render(self.scene)
        return STYLES[self.details["style"]](picture) if "style" in self.details else picture


def _choose_thing(rng: np.random.Generator, scene: Scene, language: str) -> tuple[dict, str] | None:
    """An object that can be referred to: its details and the reference in words."""
    index = int(rng.integers(len(scene.things)))
    reference = choose_reference(rng, scene, index)
    return reference and ({"thing": index, "reference": reference}, refer(rng, language, reference))


def with_thing(scene: Scene, index: int, *things: Thing) -> Scene:
    """The scene with another object, or none, instead of the one at the index."""
    return replace(scene, things=(*scene.things[:index], *things, *scene.things[index + 1:]))


def recolour(rng: np.random.Generator, scene: Scene, language: str) -> Edit | None:
    """Another colour for one object, exactly as in the table of colours."""
    chosen = _choose_thing(rng, scene, language)
    if chosen is None:
        return None
    details, ref = chosen
    old = scene.things[details["thing"]]
    colour = pick(rng, [name for name in contrasting(scene.background, OBJECT_CONTRAST) if name != old.colour])
    named = name_colour(language, colour)
    new = replace(old, colour=colour, rgb=COLOURS[colour])
    return Edit(
        phrase(rng, language, "recolour", ref=ref, colour=named, a_colour=with_article(named)),
        with_thing(scene, details["thing"], new),
        things_area(scene, (old,), REGION_MARGIN),
        details | {"colour": colour},
    )


def replace_shape(rng: np.random.Generator, scene: Scene, language: str) -> Edit | None:
    """Another shape in the same place, of the same colour and size."""
    chosen = _choose_thing(rng, scene, language)
    if chosen is None:
        return None
    details, ref = chosen
    old = scene.things[details["thing"]]
    shape = pick(rng, [name for name in SHAPES if name != old.shape])
    new = replace(old, shape=shape)
    return Edit(
        phrase(rng, language, "replace", ref=ref, shape=name_thing(rng, language, shape)),
        with_thing(scene, details["thing"], new),
        things_area(scene, (old, new), REGION_MARGIN),
        details | {"shape": shape},
    )


def remove(rng: np.random.Generator, scene: Scene, language: str) -> Edit | None:
    chosen = _choose_thing(rng, scene, language)
    if chosen is None:
        return None
    details, ref = chosen
    index = details["thing"]
    return Edit(phrase(rng, language, "remove", ref=ref), with_thing(scene, index),
                things_area(scene, (scene.things[index],), REGION_MARGIN), details)


def add(rng: np.random.Generator, scene: Scene, language: str) -> Edit | None:
    """A new object at a named place. Its size and exact position follow from the instruction alone, or nobody could meet them."""
    size = (scene.width, scene.height)
    word_at_top = scene.word.at_top if scene.word else None
    radius = round(ADDED_RADIUS * min(size))
    spots = {}
    for place, (column, row) in PLACES.items():
        cell = (1 if column is None else column, 1 if row is None else row)
        if cell in free_cells(word_at_top):
            x, y = position(size, cell, radius, word_at_top)
            if is_free(x, y, radius, scene.things):
                spots[place] = (x, y)
    if not spots:
        return None
    place = pick(rng, list(spots))
    shape, colour = pick(rng, tuple(SHAPES)), pick(rng, contrasting(scene.background, OBJECT_CONTRAST))
    thing = Thing(shape, colour, COLOURS[colour], *spots[place], radius)
    text = phrase(
        rng, language, "add", thing=name_thing(rng, language, shape, colour), place=name_place(rng, language, place)
    )
    return Edit(text, replace(scene, things=(*scene.things, thing)), things_area(scene, (thing,), REGION_MARGIN),
                {"thing": len(scene.things), "shape": shape, "colour": colour, "place": place})


def plain_background(name: str) -> Background:
    """The background exactly as in the table."""
    return Background(name, "plain", BACKGROUNDS[name], BACKGROUNDS[name])


def background(rng: np.random.Generator, scene: Scene, language: str) -> Edit | None:
    """A plain background of another colour, from which everything in the picture still stands out."""
    old = scene.background
    names = []
    for name, rgb in BACKGROUNDS.items():
        far_from_old = (
            name != old.name and min(colour_distance(rgb, part) for part in (old.rgb, old.rgb2)) >= BACKGROUND_CONTRAST
        )
        readable = scene.word is None or colour_distance(rgb, scene.word.rgb) >= WORD_CONTRAST
        if (
            far_from_old
            and readable
            and all(colour_distance(rgb, thing.rgb) >= OBJECT_CONTRAST for thing in scene.things)
        ):
            names.append(name)
    if not names:
        return None
    name = pick(rng, names)
    named = name_colour(language, name)
    return Edit(phrase(rng, language, "background", colour=named, a_colour=with_article(named)),
                replace(scene, background=plain_background(name)),
                ~things_area(scene, scene.things, -BACKGROUND_MARGIN), {"background": name})


def invert(picture: np.ndarray) -> np.ndarray:
    return 255 - picture


def greyscale(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def pixelate(picture: np.ndarray) -> np.ndarray:
    """Squares of the mean colour, `MOSAIC_BLOCK` pixels wide."""
    image = Image.fromarray(picture)
    return np.asarray(image.reduce(MOSAIC_BLOCK).resize(image.size, Image.Resampling.NEAREST))


STYLES = {"invert": invert, "greyscale": greyscale, "pixelate": pixelate}


def style(rng: np.random.Generator, scene: Scene, language: str) -> Edit:
    name = pick(rng, tuple(STYLES))
    return Edit(phrase(rng, language, name), scene, np.ones((scene.height, scene.width), bool), {"style": name})


def text(rng: np.random.Generator, scene: Scene, language: str) -> Edit:
    """Another word in place of the scene's word. The region is the box around both."""
    word = pick(rng, [word for word in WORDS if word != scene.word.text])
    old, new = quote(rng, scene.word.text, word)
    region = np.zeros((scene.height, scene.width), bool)
    strip = region[strip_rows(scene)]
    ink = np.maximum(word_mask(scene.word.text, *strip.shape[::-1]), word_mask(word, *strip.shape[::-1])) > 0
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    strip[
        max(rows[0] - REGION_MARGIN, 0) : rows[-1] + REGION_MARGIN + 1,
        max(columns[0] - REGION_MARGIN, 0) : columns[-1] + REGION_MARGIN + 1,
    ] = True
    return Edit(
        phrase(rng, language, "text", old=old, new=new),
        replace(scene, word=replace(scene.word, text=word)),
        region,
        {"word": word},
    )


def no_edit(rng: np.random.Generator, scene: Scene, language: str) -> Edit:
    """The control: nothing is asked for and nothing changes."""
    return Edit("", scene, np.zeros((scene.height, scene.width), bool), {})


# None stands for a scene on which this kind of edit cannot be asked for.
EDITS: dict[str, Callable[[np.random.Generator, Scene, str], Edit | None]] = {
    "recolour": recolour,
    "replace": replace_shape,
    "remove": remove,
    "add": add,
    "background": background,
    "style": style,
    "text": text,
    "none": no_edit,
}
