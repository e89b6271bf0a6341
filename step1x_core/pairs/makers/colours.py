"""A colour of the picture becomes another one."""

import numpy as np
from PIL import Image

from ..record import words
from .pixels import Made, rgb

# Hues of Pillow's HSV, 0..255: the middle of each colour.
HUES = {"red": 0, "orange": 19, "yellow": 40, "green": 85, "cyan": 128, "blue": 165, "purple": 194, "pink": 228}
# Pixels greyer or darker than this do not make a colour worth a name, and those below the second ones have no hue.
MIN_SATURATION, MIN_VALUE = 80, 50
HUELESS_SATURATION, HUELESS_VALUE = 24, 24
# A colour reaches from its most frequent hue, on both sides, to where there are fewer pixels than this share, and so
# many hues at most.
VALLEY, REACH = 0.12, 36
# Share of its pixels that must bear its name.
NAMED = 0.6
# Shares of the picture that a colour must and may take: all of it would be another edit.
LEAST_SHARE, LARGEST_SHARE = 0.02, 0.7
# Least distance of hues between the old colour and the new one.
LEAST_DISTANCE = 40


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


# Hue 0..255 -> the number of the nearest named colour.
NEAREST = np.argmin(np.stack([np.abs(hue_distance(np.arange(256), centre)) for centre in HUES.values()]), axis=0)


def has_hue(hsv: np.ndarray) -> np.ndarray:
    """The pixels of a picture in HSV, uint8 [H, W, 3], that are neither grey nor black; bool [H, W]."""
    return (hsv[..., 1] > HUELESS_SATURATION) & (hsv[..., 2] > HUELESS_VALUE)


def set_off(hsv: np.ndarray) -> dict[str, np.ndarray]:
    """The colours of a picture in HSV that can be told from their neighbours: name -> hues, bool [256].

    One that goes over into the next is left out: an edit would cut it in two. So is one that is almost all of the
    picture.
    """
    strong = (hsv[..., 1] > MIN_SATURATION) & (hsv[..., 2] > MIN_VALUE)
    counts, reached = (np.bincount(hsv[..., 0][pixels], minlength=256) for pixels in (strong, has_hue(hsv)))
    smooth = sum(np.roll(counts, shift) for shift in range(-3, 4))
    found = {}
    for number, name in enumerate(HUES):
        peak = int(np.argmax(np.where(NEAREST == number, smooth, -1)))
        inside = hue_range(smooth, peak)
        if inside is None or counts[inside & (NEAREST == number)].sum() < NAMED * counts[inside].sum():
            continue
        if counts[inside].sum() >= LEAST_SHARE * strong.size and reached[inside].sum() <= LARGEST_SHARE * strong.size:
            found[name] = inside
    return found


def recolour(picture, rng):
    """A colour of the picture becomes another one; light and shade stay."""
    hsv = np.asarray(Image.fromarray(picture).convert("HSV"))
    found = set_off(hsv)
    if not found:
        return None
    old = str(rng.choice(list(found)))
    others = [name for name in HUES if abs(hue_distance(np.array(HUES[name]), HUES[old])) >= LEAST_DISTANCE]
    new = str(rng.choice(others))
    # Pale and dark pixels of the hue go along, so that there is no edge where a colour fades.
    region = has_hue(hsv) & found[old][hsv[..., 0]]
    changed = hsv.copy()
    changed[..., 0] = (HUES[new] + hue_distance(hsv[..., 0], HUES[old]) * 0.5).astype(np.int16) % 256
    target = np.where(region[..., None], rgb(changed), picture)
    colours = words()["colours"]
    return Made(picture, target, {"share": float(region.mean())}, {"old": old, "new": new},
                {"old": colours[old], "new": colours[new]})
