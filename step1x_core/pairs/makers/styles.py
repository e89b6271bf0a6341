"""A picture as if drawn, painted, printed or photographed in another way."""

import numpy as np
from PIL import Image

from .pixels import LUMA, blurred, grey, three, to_pixels


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
    return three(np.where((blurred(brightness[..., 0], 1) < surroundings - offset) | (brightness < 40), 20.0, 250.0)), {
        "offset": offset
    }


def box_means(values: np.ndarray, radius: int) -> np.ndarray:
    """Means over the square of radius + 1 pixels whose upper left corner each pixel is, of a picture [H, W, C] with
    `radius` pixels of margin on each side."""
    sums = np.pad(values.cumsum(0, np.float64).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    size = radius + 1
    return ((sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size**2).astype(
        np.float32
    )


def painted(picture: np.ndarray, radius: int) -> np.ndarray:
    """Kuwahara's filter: each pixel takes the mean of that quarter of its surroundings that varies least. uint8 [H, W,
    3] -> float32."""
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
    edges = np.abs(np.diff(brightness, axis=0, append=brightness[-1:])) + np.abs(
        np.diff(brightness, axis=1, append=brightness[:, -1:])
    )
    lines = blurred(np.clip(edges * 6 - 60, 0, 255), 0.7)
    return to_pixels(np.round(flat / step) * step * (1 - 0.9 * lines / 255)), {"levels": levels}


def pixel_art(picture, rng):
    height, width, _ = picture.shape
    cells = int(rng.integers(56, 112))
    scale = cells / max(height, width)
    small = Image.fromarray(picture).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX
    )
    small = small.quantize(24).convert("RGB")
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST)), {"cells": cells}


def halftone(picture, rng):
    height, width, _ = picture.shape
    spacing = max(3.0, max(height, width) * rng.uniform(0.006, 0.012))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = np.pi / 4
    across, along = (x * np.cos(angle) + y * np.sin(angle)) / spacing, (y * np.cos(angle) - x * np.sin(angle)) / spacing
    screen = (np.cos(2 * np.pi * across) + np.cos(2 * np.pi * along))[..., None] * 62 + 128
    return three(np.clip((blurred(grey(picture)[..., 0], spacing / 3) - screen) * 4 + 128, 15, 245)), {
        "spacing": spacing
    }
