"""Sizes and 8-bit conversions."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from step1x_core.checks import all_finite, check_pictures
from step1x_core.errors import Step1XError
from step1x_core.images import (
    from_uint8,
    to_output_size,
    to_uint8,
    to_vision_size,
    to_working_size,
    truncate_uint8,
    vision_sizes,
    working_size,
)


def test_float_round_trip_of_every_byte_is_exact():
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).expand(-1, -1, 3)
    picture = from_uint8(levels.numpy())
    assert np.array_equal(to_uint8(picture), levels.numpy())
    assert torch.equal(truncate_uint8(picture), levels)
    # What the host's SaveImage does with the picture.
    assert np.array_equal(np.clip(255.0 * picture.numpy(), 0, 255).astype(np.uint8), levels.numpy())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grey_and_alpha_become_rgb(channels):
    picture = torch.rand(5, 7, channels)
    out = to_uint8(picture)
    assert out.shape == (5, 7, 3)
    if channels == 4:
        assert np.array_equal(out, to_uint8(picture[..., :3]))
    if channels == 1:
        assert np.array_equal(out[..., 0], out[..., 2])


def test_values_outside_the_range_are_clamped():
    picture = torch.tensor([[[float("nan"), -3.0, 7.0]]])
    assert to_uint8(picture).tolist() == [[[0, 0, 255]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conversions_leave_their_input_alone_and_round_as_written_out(dtype):
    picture = (torch.rand(37, 53, 4, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2).to(dtype)
    picture[0, :3, 0] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for view in (picture, picture.transpose(0, 1), picture[::2, 1:], picture[..., :1]):
        before = view.clone()
        rgb = view[..., :3] if view.shape[-1] > 3 else view[..., :1].expand(*view.shape[:-1], 3)
        expected = rgb.float().nan_to_num(0.0).clamp(0, 1)
        assert np.array_equal(to_uint8(view), (expected * 255).round().to(torch.uint8).numpy())
        assert torch.equal(truncate_uint8(expected), (expected * 255).to(torch.uint8))
        assert torch.equal(view.nan_to_num(5.0), before.nan_to_num(5.0))
    pixels = to_uint8(picture)
    assert torch.equal(from_uint8(pixels), torch.from_numpy(pixels.copy()).float() / 255)


@pytest.mark.parametrize("values, finite", [
    ([1.0, -2.0, 0.0], True), ([1.0, float("nan")], False), ([float("inf"), 1.0], False),
    ([float("inf"), float("-inf")], False), ([3e38, 3e38, 1.0], True), ([3e38, 3e38, float("-inf")], False),
])
def test_what_counts_as_finite(values, finite):
    assert all_finite(torch.tensor(values)) is finite
    assert all_finite(torch.tensor(values).to(torch.bfloat16)) is finite


def test_working_size_resize_is_pillow_lanczos():
    picture = torch.rand(100, 150, 3, generator=torch.Generator().manual_seed(0))
    pixels = to_uint8(picture)
    expected = Image.fromarray(pixels).resize(working_size(150, 100, 256), Image.Resampling.LANCZOS)
    assert np.array_equal(to_uint8(to_working_size(picture, 256)), np.asarray(expected))


def test_a_picture_of_the_right_size_is_not_touched():
    picture = from_uint8(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    assert torch.equal(to_working_size(picture, 512), picture)
    assert torch.equal(to_output_size(picture, (512, 512)), picture)


def test_vision_size_goes_through_both_resizes():
    picture = torch.rand(384, 672, 3, generator=torch.Generator().manual_seed(0))
    first, second = vision_sizes(672, 384)
    assert (first, second) == ((672, 392), (644, 364))
    expected = Image.fromarray(to_uint8(picture)).resize(first, Image.Resampling.BICUBIC).resize(second, Image.Resampling.BICUBIC)
    assert np.array_equal(to_vision_size(picture).numpy(), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (16, 16), (20000, 200), (3, 4)])
def test_extreme_pictures_get_a_size(size):
    width, height = working_size(*size, 512)
    assert width % 16 == height % 16 == 0 and min(width, height) >= 16
    for w, h in vision_sizes(width, height):
        assert w % 28 == h % 28 == 0 and min(w, h) >= 28


def test_degenerate_sizes_are_refused_in_words():
    with pytest.raises(Step1XError, match="20000x3 pixels is too narrow"):
        working_size(20000, 3, 512)
    with pytest.raises(Step1XError, match="too elongated for the language model"):
        vision_sizes(16 * 201, 16)
    # 199 passes the first resize, whose 6356x28 is above 200 for the second.
    assert working_size(15500, 100, 512) == (6368, 32)
    with pytest.raises(Step1XError, match="6368x32 pixels is too elongated for the language model"):
        vision_sizes(6368, 32)


def test_a_picture_with_values_that_are_no_numbers_is_told_of(caplog):
    picture = torch.zeros(1, 4, 5, 3)
    with caplog.at_level(logging.WARNING):
        check_pictures(picture, "image")
        assert not caplog.records
        picture[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
        check_pictures(picture, "image")
    assert "Input 'image': 2 of 60 values are NaN or Inf" in caplog.text and "--fp32-vae" in caplog.text
