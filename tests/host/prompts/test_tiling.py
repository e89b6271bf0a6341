"""Decoding in tiles: by choice, when memory is short, and after running out of it."""

import comfy.model_management
import pytest
import torch
from torch.nn import functional

from step1x_core.host.prompts.encoding import decode_edit
from step1x_core.host.prompts.tiling import AUTO, OFF, ON

# 768x640 pixels: more than one tile of 512.
SAMPLES = torch.randn(1, 16, 80, 96, generator=torch.Generator().manual_seed(0))
WHOLE = (80, 96)
SOURCE = torch.zeros(1, 333, 500, 3)


def quick_decoder(latent):
    """In place of the VAE's network, which takes a minute for this on a CPU: as there, a pixel depends on what is around it."""
    blurred = functional.avg_pool2d(functional.pad(latent[:, :3], (2, 2, 2, 2), mode="reflect"), 5, 1)
    return functional.interpolate(blurred, scale_factor=8, mode="nearest")


@pytest.fixture
def decoded(vae, monkeypatch):
    """The sizes of all latents that the VAE's network is given, and the most pixels that one may have; all around it is the host's own code."""
    sizes, most = [], [10**9]

    def watched(latent):
        sizes.append(tuple(latent.shape[-2:]))
        if area(sizes[-1]) > most[0]:
            raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory")
        return quick_decoder(latent)

    monkeypatch.setattr(vae.first_stage_model, "decode", watched)
    return sizes, most


def area(size) -> int:
    return size[0] * size[1]


@pytest.fixture
def whole(vae, decoded):
    """Decoded in one piece, at working size and at the source's."""
    pictures = vae.decode(SAMPLES), decode_edit(vae, {"samples": SAMPLES}, SOURCE, OFF)
    decoded[0].clear()
    return pictures


def test_forced_tiles_give_the_sources_size_and_a_close_picture(vae, decoded, whole):
    sizes, _ = decoded
    tiled = decode_edit(vae, {"samples": SAMPLES}, SOURCE, ON)
    assert max(map(area, sizes)) <= 64 * 64 and len(sizes) > 3
    assert tiled.shape == SOURCE.shape == whole[1].shape
    assert (tiled - whole[1]).abs().mean() < 0.01 < whole[1].std()


def test_enough_memory_decodes_in_one_piece(vae, decoded, whole):
    sizes, _ = decoded
    assert torch.equal(decode_edit(vae, {"samples": SAMPLES}), whole[0]) and sizes == [WHOLE]


@pytest.mark.parametrize("tiling, tiled", [(AUTO, True), (OFF, False), (ON, True)])
def test_short_memory_by_the_hosts_estimate(vae, decoded, monkeypatch, caplog, tiling, tiled):
    sizes, _ = decoded
    needed = vae.memory_used_decode(SAMPLES.shape, vae.vae_dtype)
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: needed - 1)
    with caplog.at_level("INFO"):
        pictures = decode_edit(vae, {"samples": SAMPLES}, None, tiling)
    assert pictures.shape == (1, 640, 768, 3) and (WHOLE not in sizes) == tiled
    assert ("decodes in tiles" in caplog.text) == (tiling == AUTO)


@pytest.mark.parametrize(
    "tiling, limit, largest",
    [(AUTO, 64 * 64, 64 * 64), (AUTO, 32 * 32, 32 * 32), (ON, 32 * 32, 32 * 32), (OFF, 64 * 64, 64 * 64)],
)
def test_out_of_memory_falls_back_to_smaller_and_smaller_tiles(vae, decoded, whole, tiling, limit, largest):
    sizes, most = decoded
    most[0] = limit
    tiled = decode_edit(vae, {"samples": SAMPLES}, SOURCE, tiling)
    assert tiled.shape == SOURCE.shape and (tiled - whole[1]).abs().mean() < 0.02
    assert max(area(size) for size in sizes if area(size) <= limit) == largest


def test_what_fits_in_no_tile_is_an_error_and_other_errors_are_not_tried_again(vae, decoded, monkeypatch):
    sizes, most = decoded
    most[0] = 0
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        decode_edit(vae, {"samples": SAMPLES})
    sizes.clear()

    def broken(latent):
        sizes.append(tuple(latent.shape[-2:]))
        raise ValueError("broken")

    monkeypatch.setattr(vae.first_stage_model, "decode", broken)
    with pytest.raises(ValueError, match="broken"):
        decode_edit(vae, {"samples": SAMPLES})
    assert sizes == [WHOLE]
