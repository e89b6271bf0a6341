"""A photograph, and pairs made of it, for the tests of training pairs."""

import numpy as np
from environment import PACK
from PIL import Image

from step1x_core.pairs.orders import MAKERS, carry_out, orders


def photograph() -> np.ndarray:
    """With a strip of green, uint8 [200, 300, 3]."""
    with Image.open(PACK / "assets" / "coffee.jpg") as photo:
        pixels = np.array(photo.convert("RGB").resize((300, 200)))
    pixels[:30] = (60, 150, 40)
    return pixels


def pairs_of(picture, count=32, seed=1):
    made = [carry_out(picture, "photo", order, seed) for order in orders("photo", list(MAKERS), 0, count, seed)]
    return [pair for pair in made if pair]
