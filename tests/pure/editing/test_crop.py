"""Crop and stitch, without ComfyUI."""

import pytest
import torch

from step1x_core.editing.local_edit import cut_box, cut_out, fit_mask, paste
from step1x_core.errors import Step1XError


@pytest.mark.parametrize("inner, context, min_size, expected", [
    ((400, 300, 100, 50), 0.5, 16, (350, 250, 200, 150)),   # half of the longer side on each side
    ((400, 300, 20, 10), 0.0, 16, (399, 297, 22, 16)),      # one pixel at least, and the least size
    ((0, 0, 100, 100), 0.5, 16, (0, 0, 200, 200)),          # moved at the border, not cut
    ((950, 790, 50, 10), 1.0, 16, (850, 690, 150, 110)),
    ((500, 400, 2, 2), 0.5, 256, (373, 273, 256, 256)),
    ((100, 100, 700, 600), 0.1, 16, (0, 0, 1000, 800)),     # most of the picture is all of it
    ((500, 400, 2, 2), 0.0, 4096, (0, 0, 1000, 800)),
])
def test_crop_box(inner, context, min_size, expected):
    assert cut_box(inner, (1000, 800), context, min_size) == expected


def test_masks_that_do_not_fit_are_refused():
    image = torch.zeros(3, 300, 400, 3)
    # What the stock 'Load Image' gives for a picture without a mask.
    with pytest.raises(Step1XError, match="The mask is empty"):
        cut_out(image, torch.zeros(1, 64, 64), 0.5, 16)
    with pytest.raises(Step1XError, match="There are 2 masks for 3 pictures"):
        cut_out(image, torch.ones(2, 300, 400), 0.5, 16)
    for mask in (
        torch.ones(300, 400),
        torch.ones(1, 1, 300, 400),
        torch.full((3, 300, 400), torch.nan).index_fill(0, torch.tensor(0), 5.0),
    ):
        assert fit_mask(mask, image).unique().max() == 1


@pytest.mark.parametrize("feather", [0, 1, 7, 40])
@pytest.mark.parametrize("dtype, channels", [(torch.float32, 3), (torch.float16, 4), (torch.float32, 1)])
def test_outside_stays_to_the_last_bit_and_the_edge_is_inside(feather, dtype, channels):
    torch.manual_seed(feather)
    image = torch.rand(1, 90, 120, channels).to(dtype)
    mask = torch.zeros(1, 90, 120)
    mask[0] = ((torch.arange(90)[:, None] - 40) ** 2 + (torch.arange(120) - 60) ** 2 < 900)
    mask[0, :, 100:102] = 0.5
    result = torch.rand(1, 90, 120, 3)
    cutout = cut_out(image, mask, 10, 16)
    # A decoder that overflowed must not spoil what is outside of the mask.
    out = paste(torch.where(mask[..., None] > 0, result, torch.nan), cutout, feather)
    source = image if channels > 1 else image.expand(-1, -1, -1, 3)
    outside = mask[0] == 0
    assert out.dtype == dtype and torch.equal(out[0][outside], source[0][outside]) and torch.equal(out[..., 3:], source[..., 3:])
    assert torch.allclose(out[0, 40, 60, :3].float(), result[0, 40, 60], atol=1e-3)
    changed = (out[0, ..., :3] - source[0, ..., :3].to(dtype)).abs().amax(-1) > 0
    assert (changed == ~outside).float().mean() > 0.99
    if feather == 0:
        assert torch.allclose(out[0, ..., :3][mask[0] == 1].float(), result[0][mask[0] == 1], atol=1e-3)
