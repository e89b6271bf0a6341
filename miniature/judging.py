"""Did an edit succeed? Compares a result with the known target of a pair."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from .drawing import BACKGROUNDS, COLOURS, SHAPES, WORDS, Scene, render, things_area
from .edits import MOSAIC_BLOCK, STYLES, EditPair, plain_background, with_thing

# All errors are mean absolute differences on the 0..1 scale.
CORE_DIFFERENCE = (
    0.15  # a pixel belongs to the core if one of its channels differs more than this between source and target
)
CORE_LIMIT = 0.20
CORE_SHARE = 0.5  # of the error that the unedited source makes
SURROUND_LIMIT = 0.10  # inside the region but around the core
OUTSIDE_LIMIT = 0.04
OBJECT_LIMIT = 0.12  # in each object that is not edited


@dataclass(frozen=True)
class Verdict:
    """`success` is `changed` (the edit was made) and `untouched` (all else was kept). The errors are those against the target."""

    success: bool
    changed: bool
    untouched: bool
    outside_error: float
    region_error: float


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute difference of two uint8 pictures, float32 of the same shape, 0..1."""
    return np.abs(a.astype(np.float32) - b.astype(np.float32)) / 255


def changed_core(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pixels that an edit clearly changes, bool [H, W]."""
    return difference(source, target).max(-1) > CORE_DIFFERENCE


def _other_words(scene: Scene) -> Iterator[np.ndarray]:
    """Pictures of the scene with every other word, and with none, if it has one."""
    if scene.word is not None:
        yield render(replace(scene, word=None))
        yield from (
            render(replace(scene, word=replace(scene.word, text=text))) for text in WORDS if text != scene.word.text
        )


def _other_things(pair: EditPair) -> Iterator[np.ndarray]:
    """Pictures with the new object missing or, where the edit named them, with every other shape and every other colour."""
    index = pair.details["thing"]
    thing = pair.edited.things[index]
    yield render(with_thing(pair.edited, index))
    if "shape" in pair.details:
        yield from (
            render(with_thing(pair.edited, index, replace(thing, shape=shape)))
            for shape in SHAPES
            if shape != thing.shape
        )
    if "colour" in pair.details:
        yield from (
            render(with_thing(pair.edited, index, replace(thing, rgb=rgb)))
            for name, rgb in COLOURS.items()
            if name != thing.colour
        )


def _other_styles(pair: EditPair) -> Iterator[np.ndarray]:
    yield from (effect(pair.source) for name, effect in STYLES.items() if name != pair.details["style"])
    # A mere blur comes close to a mosaic in every single pixel.
    yield np.asarray(Image.fromarray(pair.source).filter(ImageFilter.GaussianBlur(MOSAIC_BLOCK / 3)))


def _other_answers(pair: EditPair) -> Iterator[np.ndarray]:
    """Pictures that answer instructions of the same kind, but not this one."""
    if pair.kind in ("recolour", "replace", "add"):
        yield from _other_things(pair)
    elif pair.kind == "background":
        yield from (
            render(replace(pair.edited, background=plain_background(name)))
            for name in BACKGROUNDS
            if name != pair.details["background"]
        )
    elif pair.kind == "text":
        yield from _other_words(pair.edited)
    elif pair.kind == "style":
        yield from _other_styles(pair)


def _is_nearest(target: np.ndarray, result: np.ndarray, others: Iterator[np.ndarray]) -> bool:
    """Whether the target is nearer (L2) to the result than each of the others."""
    result = result.astype(np.float32)
    distance = np.square(target - result).sum()
    return all(np.square(other - result).sum() > distance for other in others)


def _is_changed(pair: EditPair, result: np.ndarray, error: np.ndarray) -> bool:
    core = changed_core(pair.source, pair.target) & pair.region
    limit = min(CORE_LIMIT, CORE_SHARE * _mean(difference(pair.source, pair.target)[core]))
    # The surroundings may be nothing but thin outlines, so their error counts by their share of the region.
    surround_error = _mean(np.where(core[..., None], 0, error)[pair.region])
    return (
        _mean(error[core]) < limit
        and surround_error < SURROUND_LIMIT
        and _is_nearest(pair.target, result, _other_answers(pair))
    )


def _is_untouched(pair: EditPair, result: np.ndarray, error: np.ndarray) -> bool:
    if pair.kind == "style":
        return True
    if _mean(error[~pair.region]) > OUTSIDE_LIMIT:
        return False
    # One small object has little weight in the mean over the whole picture.
    kept = [thing for thing in pair.scene.things if thing in pair.edited.things]
    if any(_mean(error[things_area(pair.scene, (thing,), 0)]) > OBJECT_LIMIT for thing in kept):
        return False
    return pair.kind == "text" or _is_nearest(pair.target, result, _other_words(pair.edited))


def judge(pair: EditPair, result: np.ndarray) -> Verdict:
    """Judges a result, uint8 [H, W, 3], of the pair's source and instruction.

    `changed`: in the core the result is far closer to the target than the source is, the rest of the region is not spoilt, and no other
    colour, shape, word, background or style would explain the result better. `untouched`: outside of the region the result is the
    source, each other object is still there, and so is a word that was not to be changed.
    """
    error = difference(result, pair.target)
    changed = pair.kind == "none" or _is_changed(pair, result, error)
    untouched = _is_untouched(pair, result, error)
    return Verdict(
        changed and untouched,
        changed,
        untouched,
        outside_error=_mean(error[~pair.region]),
        region_error=_mean(error[pair.region]),
    )
