"""Resizes on any device are those of Pillow and torch on the CPU, bit for bit."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from step1x_core import exact_resize, images
from step1x_core.exact_resize import by_library, order_of, resize_exactly, resize_in_order

CPU = torch.device("cpu")
SIDES = (1, 2, 3, 7, 28, 31, 64, 97, 150)


def pictures(count: int, seed: int = 0):
    """Noise, black and white noise, and pictures of one value, of random sides, each with a size to resize it to."""
    choose, noise = random.Random(seed), np.random.default_rng(seed)
    for number in range(count):
        height, width, *size = (choose.choice(SIDES) + choose.randint(0, 9) for _ in range(4))
        kind = number % 4
        pixels = noise.integers(0, 256, (height, width, 3)) if kind < 2 else noise.integers(0, 2, (height, width, 3)) * 255
        yield torch.from_numpy((pixels if kind < 3 else pixels * 0 + choose.choice((0, 1, 254, 255))).astype(np.uint8)), tuple(size)


@pytest.mark.parametrize("kind, pillow", [("bicubic", True), ("lanczos", True), ("bicubic", False)])
def test_every_pixel_is_the_librarys(kind, pillow):
    order = order_of(pillow, CPU)
    assert order is not None, "this version of Pillow or torch resizes in a way that is not known here; it then resizes on the CPU"
    for pixels, size in pictures(150):
        assert torch.equal(resize_in_order(pixels, size, kind, pillow, order), by_library(pixels, size, kind, pillow)), (pixels.shape, size)


@pytest.mark.parametrize("before, after", [((1024, 1024), (1036, 1036)), ((1036, 1036), (504, 504)), ((1300, 700), (1184, 640)), ((480, 1100), (448, 1036))])
def test_sizes_of_edits(before, after):
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (before[1], before[0], 3), dtype=np.uint8))
    for kind in exact_resize.FILTERS:
        assert torch.equal(resize_exactly(pixels, after, kind), by_library(pixels, after, kind, True))
    assert torch.equal(resize_exactly(pixels, after, "bicubic", False), by_library(pixels, after, "bicubic", False))


def test_a_library_with_other_results_computes_them_itself(monkeypatch):
    """Pillow's bicubic from another version, here one with a filter of its own."""
    pixels, size = next(pictures(1))
    monkeypatch.setitem(exact_resize.FILTERS, "bicubic", (lambda x: np.clip(1 - np.abs(x), 0, 1), 2.0))
    order_of.cache_clear(), exact_resize.weights.cache_clear()
    try:
        assert order_of(True, CPU) is None
        assert torch.equal(resize_exactly(pixels, size, "bicubic"), by_library(pixels, size, "bicubic", True))
    finally:
        order_of.cache_clear(), exact_resize.weights.cache_clear()


@pytest.mark.parametrize("side", [(300, 420), (1100, 700), (2200, 300), (64, 1500)])
def test_images_for_the_language_model_and_the_vae_are_the_same_on_a_device(side):
    image = torch.rand(*side, 4, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    image[0, 0], image[5, 5, 1] = float("nan"), 0.5 / 255
    for resize in (images.to_vision_size, images.to_thinker_size):
        assert torch.equal(resize(image, CPU), resize(image))
    found, expected = images.to_vision_size_v12(image, 256, CPU), images.to_vision_size_v12(image, 256)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
    assert torch.equal(images.to_working_size(image, 256, CPU), images.to_working_size(image, 256))


def test_thinker_images_are_pillows_thumbnails():
    """The size of the thumbnail and whether Pillow averages first are Pillow's own."""
    for side in ((1500, 1000), (1025, 333), (5000, 90), (4100, 4096), (1366, 768)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side[1], side[0], 3), dtype=np.uint8))
        expected = images.thumbnail(np.asarray(picture))
        assert images.thumbnail_size(*side) == expected.shape[1::-1]


def test_an_image_too_large_for_the_gpu_is_left_to_the_cpu(monkeypatch):
    monkeypatch.setattr(images, "MAX_ON_GPU", 100)
    monkeypatch.setattr(images, "resize_exactly", lambda *args, **kwargs: pytest.fail("resized on the device"))
    assert images.to_vision_size(torch.rand(40, 40, 3), CPU).shape[2] == 3


def test_a_gpu_without_memory_leaves_it_to_the_cpu(monkeypatch):
    image = torch.rand(60, 40, 3)
    expected = images.to_vision_size(image)

    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(images, "resize_exactly", full)
    assert torch.equal(images.to_vision_size(image, CPU), expected)
