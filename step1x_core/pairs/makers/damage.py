"""What spoils a picture: read backwards, how to restore it."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .pixels import blurred, clouds, to_pixels
from .styles import sepia


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
        canvas.line(
            (x, y, x + rng.normal(0, 0.03) * width, y + rng.normal(0, 0.25) * height),
            fill=int(rng.uniform(90, 220)),
            width=max(1, round(height / 600)),
        )
    return to_pixels(faded + (240 - faded) * blurred(np.asarray(plane), 0.6) / 255), {"scratches": scratches}
