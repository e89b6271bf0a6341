"""Weather, seasons and the time of day."""

import numpy as np
from PIL import Image, ImageDraw

from .pixels import blurred, clouds, grey, rgb, to_pixels


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
        canvas.line(
            (x, y, x + slant * length, y + length), fill=int(rng.uniform(60, 150)), width=max(1, round(height / 700))
        )
    dark = 0.72 * picture + 0.08 * grey(picture)
    return to_pixels(dark + (235 - dark) * blurred(np.asarray(plane), 0.6) / 255), {"slant": slant, "density": density}


def night(picture, rng):
    strength = rng.uniform(0.28, 0.42)
    values = (picture / np.float32(255)) ** 1.35 * 255
    return to_pixels((0.55 * values + 0.45 * grey(picture)) * strength * np.array((0.75, 0.9, 1.35), np.float32)), {
        "strength": strength
    }


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
