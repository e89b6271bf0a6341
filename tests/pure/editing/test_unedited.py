"""Keeping what was not edited, on computed images with known changes, without ComfyUI."""

import pytest
import torch
import torch.nn.functional as F

from step1x_core.editing.changes import find_change
from step1x_core.editing.colour_shift import colour_shift
from step1x_core.editing.shapes import grown, parts, ramp, shrunk, without_holes, without_specks
from step1x_core.editing.unedited import keep_unedited

SIZE = (96, 128)


def photo(seed: int = 0, size=SIZE) -> torch.Tensor:
    """Something like a photograph [h, w, 3]: soft shapes, and fine texture on top."""
    generator = torch.Generator().manual_seed(seed)
    soft = F.interpolate(torch.rand(1, 3, 6, 8, generator=generator), size, mode="bicubic")
    fine = F.interpolate(torch.rand(1, 3, size[0] // 2, size[1] // 2, generator=generator), size, mode="bilinear")
    return (0.15 + 0.6 * soft + 0.1 * fine)[0].movedim(0, -1).clamp(0, 1)


def through_vae(image: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """What a VAE does: blurs a little, and is off by a little."""
    planes = image.movedim(-1, 0)[None]
    blurred = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = F.interpolate(torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(seed)), planes.shape[-2:])
    return (0.5 * planes + 0.5 * blurred + 0.006 * noise)[0].movedim(0, -1).clamp(0, 1)


def disc(image: torch.Tensor, radius: int = 14) -> torch.Tensor:
    rows, columns = (torch.arange(side) for side in image.shape[:2])
    return (rows[:, None] - 50) ** 2 + (columns - 60) ** 2 < radius**2


def edited_disc(source: torch.Tensor, seed: int = 1) -> torch.Tensor:
    target = source.clone()
    target[disc(source)] = torch.tensor([0.9, 0.1, 0.2])
    return through_vae(target, seed)


def kept(source, edited, match=False):
    """As the node does where the image is edited at its own size."""
    rgb = source[..., :3] if source.shape[-1] >= 3 else source.expand(-1, -1, -1, 3)
    working = rgb.float()
    return keep_unedited(source, working, torch.stack([through_vae(image) for image in working]), edited, edited, match)


def test_a_local_edit_keeps_every_other_pixel_bit_for_bit():
    source = photo()
    edited = edited_disc(source)
    out = kept(source[None], edited[None])
    changed, mask = disc(source), out.mask[0]
    assert torch.equal(out.pictures[0][mask == 0], source[mask == 0]) and out.pictures.dtype == torch.float32
    assert torch.equal(out.pictures[0][changed], edited[changed]), "what was edited is the edit's, exactly"
    assert not mask[~grown(changed, 4)].any() and (mask[changed] == 1).all()
    assert out.share == pytest.approx(float(mask.mean())) and 0.03 < out.share < 0.1
    assert "% of the image edited" in out.reports[0]


def test_the_soft_edge_lies_in_what_the_region_grew_by():
    source = photo(size=(384, 512))
    target = source.clone()
    target[100:200, 150:300] = 1 - target[100:200, 150:300]
    mask = kept(source[None], through_vae(target)[None]).mask[0]
    assert (mask[100:200, 150:300] == 1).all()
    assert 0 < mask[98, 220] < 1 and mask[90, 220] == 0
    row = mask[85:101, 220]
    assert (row[1:] >= row[:-1]).all()


def test_nothing_edited_gives_the_source():
    source = photo()
    out = kept(source[None], through_vae(source, seed=1)[None])
    assert torch.equal(out.pictures[0], source) and out.share == 0


def test_specks_go():
    source = photo()
    edited = through_vae(source)
    edited[20, 30] += 0.3
    edited[70:72, 100] -= 0.3
    assert kept(source[None], edited[None]).share == 0


def drifted(image):
    """Darker and warmer everywhere, as models return images."""
    return (image * torch.tensor([0.97, 0.95, 0.93]) + torch.tensor([0.01, 0.0, -0.01])).clamp(0, 1)


def test_a_colour_shift_is_no_edit_and_is_undone_inside_if_asked():
    source = photo()
    plain = edited_disc(source)
    edited = drifted(plain)
    out, matched = kept(source[None], edited[None]), kept(source[None], edited[None], match=True)
    for result in (out, matched):
        assert torch.equal(result.mask[0] > 0, kept(source[None], plain[None]).mask[0] > 0)
        assert torch.equal(result.pictures[0][result.mask[0] == 0], source[result.mask[0] == 0])
    changed = disc(source)
    assert torch.equal(out.pictures[0][changed], edited[changed])
    assert (matched.pictures[0][changed] - plain[changed]).abs().max() < 0.012 < (edited - plain)[changed].abs().max()
    assert "shifted" in out.reports[0]


def test_the_shift_is_told_although_a_third_of_the_image_changed():
    before = photo(size=(192, 192))
    after = drifted(before)
    after[:64] = photo(seed=9, size=(192, 192))[:64]
    shift = colour_shift(before, after)
    assert (shift.undone(after)[70:] - before[70:]).abs().max() < 0.01 and shift.agree > 0.6


@pytest.mark.parametrize("edit, reason", [
    (lambda image: image * 0.6, "colours changed everywhere"),
    (lambda image: image.mean(-1, keepdim=True).expand(-1, -1, 3) * 0.7, "changed"),
    (lambda image: 1 - image, "changed"),
    (lambda image: torch.where(disc(image, 30)[..., None], image, photo(seed=5)), "changed"),  # another background
    (lambda image: F.interpolate(F.avg_pool2d(image.movedim(-1, 0)[None], 8), SIZE)[0].movedim(0, -1), "changed"),  # mosaic
])
def test_edits_of_the_whole_image_are_left_whole(edit, reason):
    source = photo()
    edited = through_vae(edit(source).clamp(0, 1))
    out = kept(source[None], edited[None])
    assert torch.equal(out.pictures[0], edited) and (out.mask == 1).all() and out.share == 1
    assert "left whole" in out.reports[0] and reason in out.reports[0]


def test_each_image_of_a_batch_is_compared_with_its_own_source():
    sources = torch.stack([photo(0), photo(1)])
    edited = torch.stack([edited_disc(sources[0]), through_vae(sources[1]), through_vae(sources[0]), through_vae(1 - sources[1])])
    out = kept(sources, edited)
    assert out.pictures.shape == edited.shape and len(out.reports) == 4
    assert 0 < out.mask[0].mean() < 0.1 and not out.mask[1].any() and not out.mask[2].any() and (out.mask[3] == 1).all()
    assert torch.equal(out.pictures[2], sources[0])


@pytest.mark.parametrize("channels, dtype", [(4, torch.float32), (1, torch.float32), (3, torch.float16)])
def test_alpha_stays_and_grey_becomes_rgb(channels, dtype):
    source = photo()[None].to(dtype)
    source = torch.cat([source, torch.rand(1, *SIZE, 1).to(dtype)], -1) if channels == 4 else source[..., :channels]
    edited = edited_disc(source[0, ..., :3].float() if channels > 1 else source[0].float().expand(-1, -1, 3))
    out = kept(source, edited[None])
    kept_pixels = out.mask[0] == 0
    expected = source.float() if channels > 1 else source.expand(-1, -1, -1, 3)
    assert out.pictures.shape[-1] == max(channels, 3) and 0 < out.share < 0.1
    assert torch.equal(out.pictures[0][kept_pixels], expected[0][kept_pixels])
    assert channels < 4 or torch.equal(out.pictures[..., 3], source[..., 3])


def resized(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    return F.interpolate(image.movedim(-1, 0)[None], size, mode="bicubic")[0].movedim(0, -1).clamp(0, 1)


@pytest.mark.parametrize("factor", [2.3, 0.6])
def test_a_source_of_another_size_than_the_edit(factor):
    working = photo()
    edited = edited_disc(working)
    size = [round(side * factor) for side in SIZE]
    source, large = resized(working, size), resized(edited, size)
    out = keep_unedited(source[None], working[None], through_vae(working)[None], edited[None], large[None])
    assert out.pictures.shape == (1, *size, 3) and out.mask.shape == (1, *size)
    assert torch.equal(out.pictures[0][out.mask[0] == 0], source[out.mask[0] == 0]) and 0 < out.share < 0.1
    middle = tuple(round(at * factor) for at in (50, 60))
    assert torch.equal(out.pictures[0][middle], large[middle])


def test_an_edit_of_a_sampled_latent_has_not_lost_what_the_vae_loses():
    """Between source and round trip nothing is an edit, however much the VAE errs."""
    source = photo()
    found = find_change(source, through_vae(source), source.clone())
    assert not found.share.any() and found.whole is None


def snake(side: int) -> torch.Tensor:
    """One part as long as it can be."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


def test_parts_touch_also_at_corners_and_may_be_long():
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]]).bool()
    labels, count = parts(mask)
    assert count == 4 and labels[0, 0] == labels[1, 1] and labels[0, 3] == labels[1, 3]
    assert len(labels[mask].unique()) == 4 and not labels[~mask].any()
    assert parts(snake(61))[1] == 1
    assert parts(torch.zeros(3, 5).bool())[1] == 0


def test_holes_specks_and_edges():
    ring = torch.zeros(20, 20).bool()
    ring[4:12, 4:12] = True
    ring[6:10, 6:10] = False
    assert without_holes(ring, 16)[6:10, 6:10].all() and not without_holes(ring, 15)[7, 7]
    open_ring = ring.clone()
    open_ring[:, 7] &= False
    assert torch.equal(without_holes(open_ring, 400), open_ring)
    certain = torch.zeros(20, 20).bool()
    certain[4, 4:7] = True
    assert torch.equal(without_specks(ring, certain, 3), ring) and not without_specks(ring, certain, 4).any()
    letters = torch.zeros(20, 20).bool()
    letters[3:6, [2, 5, 8, 16]] = True
    assert torch.equal(without_specks(letters, letters, 9, reach=1)[4], torch.arange(20).lt(10) & letters[4])
    assert torch.equal(shrunk(grown(ring, 2), 2)[4:12, 4:12], torch.ones(8, 8).bool())
    soft = ramp(grown(ring, 3), 3)
    assert (soft[ring] == 1).all() and soft[0, 8] == 0 and 0 < soft[1, 8] < soft[2, 8] < soft[3, 8] < 1
    assert (ramp(torch.ones(5, 5).bool(), 3) == 1).all(), "the image's border is no edge"
