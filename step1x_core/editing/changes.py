"""Finds by itself what an edit changed: against what the VAE alone does to the source, pixel by pixel."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .colour_shift import Shift, colour_shift, no_shift
from .shapes import grown, ramp, shrunk, without_holes, without_specks

# Lengths in pixels are for an image whose shorter side is this long, and go with it.
SIDE = 256
# Differences (0..1) that may be noise anywhere, and for each unit of the VAE's own error and of the contrast around.
BASE, PER_ERROR, PER_CONTRAST = 0.022, 1.2, 0.12
# Sharp images differ by noise, too: their difference, times this, bounds the one found in blurred images.
SHARP = 1.5
# The VAE lets a change bleed into its surroundings: within so many pixels of one, differences of this share of it count
# as noise.
BLED, REACH = 0.1, 4
# A change is certain where it exceeds the noise by this factor, and so by this much.
CERTAIN, CERTAIN_BASE = 2.0, 0.035
# A change has at least this number of certain pixels, squared; below it is a speck.
SPECK = 4
# Two changes with a gap of twice this radius are one.
CLOSING = 2
# A hole of at most this share of all that changed is filled.
HOLE_SHARE = 0.25
# How far the region grows. The soft edge lies in what was added, so that every changed pixel is the edit's.
GROWTH = 2
# A shift larger than this (0..1) is an edit of the image's tone, and one smaller than the second number is none.
DRIFT, UNSEEN = 0.08, 0.004
# From these shares on an edit is one of the whole image: of its pixels, of its border, of the squares of a coarse grid
# of so many per side.
WHOLE, BORDER, SPREAD, GRID = 0.6, 0.55, 0.6, 8
# A style may change nothing but edges. It is told by the share of the squares with detail in which detail changed, if
# the changes are spread over more than the second share of the image and fill less than the third share of that: a
# single object on a plain ground is filled. In a square with detail, this share of the pixels has a contrast of at
# least so much; it changed if this share of them did.
EDGES, BOX, FILLED = 0.7, 0.1, 0.5
DETAILED, CONTRAST, TOUCHED = 0.05, 0.08, 0.15
# Outside of the region, at most this share of the pixels differs by more than half the noise: more is a faint change
# nearly everywhere, as a filter makes it.
FAINT = 0.3
# Where nothing is found: the fine detail of the whole image became this many times stronger or weaker.
DETAIL = 1.35


@dataclass(frozen=True)
class Change:
    """What an edit changed in one image.

    share: float32 [h, w], how much of each pixel is the edit's, 0 where the source stays. whole: why the edit is one
    of the whole image, which is left as it is; None otherwise. shift: of the colours of the whole image, undone or
    not.
    """

    share: Tensor
    whole: str | None
    shift: Shift


def length(size: tuple[int, int], pixels: float) -> int:
    """Scale a length at `SIDE` to an image of this size; at least a pixel."""
    return max(1, round(pixels * min(size) / SIDE))


def softened(image: Tensor) -> Tensor:
    """Blur an image [h, w, 3] over 3x3 pixels -> [3, h, w]."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=image.device) / 4
    planes = F.pad(image.movedim(-1, 0)[:, None], (1, 1, 1, 1), mode="replicate")
    planes = F.conv2d(planes, kernel.view(1, 1, 3, 1))
    return F.conv2d(planes, kernel.view(1, 1, 1, 3))[:, 0]


def contrast(planes: Tensor) -> Tensor:
    """Return the largest difference between a pixel's neighbours [h, w], for an image [3, h, w]."""
    planes = planes[None]
    return (F.max_pool2d(planes, 3, 1, 1) + F.max_pool2d(-planes, 3, 1, 1))[0].amax(0)


def noise_floor(source: Tensor, round_trip: Tensor) -> Tensor:
    """Return by how much a pixel may differ without having been edited [h, w], for images [3, h, w]: more where the
    VAE errs, and where an edge or texture may move by part of a pixel."""
    error = ((round_trip - source) ** 2).amax(0)[None, None]
    error = F.avg_pool2d(F.pad(error, (2, 2, 2, 2), mode="replicate"), 5, 1)[0, 0].sqrt()
    return BASE + PER_ERROR * error + PER_CONTRAST * contrast(round_trip)


def outside(source: Tensor, round_trip: Tensor, edited: Tensor) -> Tensor:
    """Return how far an edited image lies from source and round trip, [h, w] for images [3, h, w].

    What lies between the two is not changed: an edit on the latent of an earlier turn has not lost what the VAE loses.
    """
    low, high = torch.minimum(source, round_trip), torch.maximum(source, round_trip)
    return torch.maximum(edited - high, low - edited).clamp(min=0).amax(0)


def excess(source: Tensor, round_trip: Tensor, edited: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far an edited image lies from source and round trip, and the noise floor, both [h, w] for images
    [h, w, 3]."""
    images = source, round_trip, edited
    smooth = [softened(image) for image in images]
    # The blur averages noise, but carries a change a pixel further. There the sharp images do not differ.
    sharp = outside(*(image.movedim(-1, 0) for image in images))
    return torch.minimum(outside(*smooth), SHARP * sharp), noise_floor(*smooth[:2])


def changed_pixels(distance: Tensor, floor: Tensor) -> Tensor:
    """Return what changed, bool [h, w], without specks."""
    size = tuple(distance.shape)
    certain = (distance > CERTAIN * floor) & (distance > floor + CERTAIN_BASE)
    strongest = F.max_pool2d(distance[None], 2 * REACH + 1, 1, REACH)[0]
    changed = distance > torch.maximum(floor, BLED * strongest)
    return without_specks(changed, certain, length(size, SPECK) ** 2, length(size, CLOSING))


def region_of(changed: Tensor) -> Tensor:
    """Close gaps and holes of what changed [h, w]."""
    if not changed.any():
        return changed
    radius = length(tuple(changed.shape), CLOSING)
    closed = shrunk(grown(changed, radius), radius) | changed
    return without_holes(closed, HOLE_SHARE * float(closed.sum()))


def spread(region: Tensor) -> tuple[float, float, float]:
    """Return the shares of an image, of its border and of the squares of a grid that a region [h, w] takes."""
    border = torch.cat([region[0], region[-1], region[:, 0], region[:, -1]])
    squares = F.adaptive_avg_pool2d(region[None, None].float(), GRID) > 0.02
    return tuple(float(part.float().mean()) for part in (region, border, squares))


def box_share(changed: Tensor) -> float:
    """Return the share of the image that a box around what changed [h, w] has."""
    if not changed.any():
        return 0.0
    rows, columns = (changed.any(axis).nonzero() for axis in (1, 0))
    return int(rows[-1] - rows[0] + 1) * int(columns[-1] - columns[0] + 1) / changed.numel()


def edges_changed(changed: Tensor, region: Tensor, round_trip: Tensor) -> float:
    """Return the share of the squares with detail in which a region [h, w] takes some of it; 0 for a region that is in
    one place or filled by what changed."""
    box = box_share(changed)
    if box < BOX or float(changed.float().mean()) > FILLED * box:
        return 0.0
    detail = contrast(softened(round_trip)) > CONTRAST
    there, taken = (F.adaptive_avg_pool2d(part[None, None].float(), GRID).flatten() for part in (detail, detail & region))
    squares = there > DETAILED
    return float((taken > TOUCHED * there)[squares].float().mean()) if squares.any() else 0.0


def detail(image: Tensor) -> Tensor:
    """Mean contrast between neighbours in an image [h, w, 3]."""
    return (image[1:] - image[:-1]).abs().mean() + (image[:, 1:] - image[:, :-1]).abs().mean()


def faint_share(region: Tensor, distance: Tensor, floor: Tensor) -> float:
    """Return the share of the pixels outside of a region [h, w] that differ by more than half the noise."""
    rest = ~grown(region, length(tuple(region.shape), 2 * GROWTH))
    return float((distance > floor / 2)[rest].float().mean()) if rest.any() else 0.0


def whole_reason(region: Tensor, shift: Shift, edges: float, faint: float, sharper: float) -> str | None:
    """Say why an edit is one of the whole image, if it is. edges: what `edges_changed` returned. faint: what
    `faint_share` returned. sharper: the factor of the image's fine detail."""
    area, border, squares = spread(region)
    if shift.size > DRIFT:
        return f"colours changed everywhere by up to {100 * shift.size:.0f} %"
    if area > WHOLE:
        return f"{100 * area:.0f} % of the image changed"
    if border > BORDER:
        return f"{100 * border:.0f} % of the image's border changed"
    if squares > SPREAD:
        return f"changes lie in {100 * squares:.0f} % of the image"
    if edges > EDGES:
        return f"edges changed in {100 * edges:.0f} % of the image's detail"
    if faint > FAINT:
        return f"{100 * faint:.0f} % of the image changed faintly"
    if not area and shift.size > 3 * UNSEEN:
        return f"no local change, but colours changed everywhere by up to {100 * shift.size:.0f} %"
    if not area and not 1 / DETAIL < sharper < DETAIL:
        return "no local change, but sharpness changed everywhere"
    return None


def find_change(source: Tensor, round_trip: Tensor, edited: Tensor) -> Change:
    """Find what an edit changed. All images float32 [h, w, 3] in 0..1; round_trip is the source through the VAE and
    back."""
    shift = colour_shift(round_trip, edited)
    if shift.agree < 0.5 or shift.size < UNSEEN:
        shift = no_shift(edited.device)
    level = shift.undone(edited) if shift.size <= DRIFT else edited
    distance, floor = excess(source, round_trip, level)
    changed = changed_pixels(distance, floor)
    region = region_of(changed)
    sharper = float(detail(level) / detail(round_trip).clamp(min=1e-6))
    edges, faint = edges_changed(changed, region, round_trip), faint_share(region, distance, floor)
    reason = whole_reason(region, shift, edges, faint, sharper)
    if reason:
        return Change(torch.ones_like(region, dtype=torch.float32), reason, shift)
    growth = length(tuple(region.shape), GROWTH)
    return Change(ramp(grown(region, growth), growth), None, shift)
