"""Decoding in one piece, or in tiles when memory is short."""

import logging

import comfy.model_management
from torch import Tensor

from ..status import show_status

log = logging.getLogger(__name__)

AUTO, OFF, ON = "auto", "off", "on"
TILING = (AUTO, OFF, ON)
# Sides of a tile in pixels of the latent: the host's own 512 pixels, and what is tried after running out of memory with
# them.
TILE, SMALL_TILE = 64, 32


def memory_is_short(vae, samples: Tensor) -> bool:
    """Whether one latent of [B, C, h, w] needs more to be decoded in one piece than is free once other models have made
    room.

    By the host's own estimate. Where that is too low, an out-of-memory error follows; on Windows a driver may instead
    move to main memory and become very slow, which is why the error is not waited for.
    """
    if not hasattr(vae, "memory_used_decode"):
        return False
    needed = vae.memory_used_decode(samples[:1].shape, vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed, force_full_load=vae.disable_offload)
    free = vae.patcher.get_free_memory(vae.device)
    if needed > free:
        log.info(
            "Step1X-Edit decodes in tiles: in one piece it would need %.1f GB, and %.1f GB are free",
            needed / 1e9,
            free / 1e9,
        )
    return needed > free


def decode_tiles(vae, samples: Tensor, tile: int) -> Tensor:
    """Latents [B, C, h, w] -> pixels [B, H, W, 3], decoded in overlapping tiles of about this side."""
    show_status("Decoding in tiles")
    return vae.decode_tiled(samples, tile_x=tile, tile_y=tile, overlap=tile // 4)


def decode(vae, samples: Tensor, tiling: str = AUTO) -> Tensor:
    """Latents [B, C, h, w] -> pixels [B, H, W, 3] of the host's VAE, in one piece or in tiles.

    tiling: ON, OFF, or AUTO for tiles when memory is short. The host's own decode takes tiles after running out of
    memory, also with OFF; with AUTO and ON smaller ones are tried if that fails, too.

    Raises what the VAE raises, the host's out-of-memory error among it.
    """
    tiles = tiling == ON or tiling == AUTO and memory_is_short(vae, samples)
    try:
        return decode_tiles(vae, samples, TILE) if tiles else vae.decode(samples)
    except Exception as error:
        if tiling == OFF or not comfy.model_management.is_oom(error):
            raise
        log.warning("Step1X-Edit ran out of memory while decoding and tries again with smaller tiles.")
    # Out of the except block, whose exception holds the tensors of the failed try.
    comfy.model_management.soft_empty_cache()
    return decode_tiles(vae, samples, SMALL_TILE)
