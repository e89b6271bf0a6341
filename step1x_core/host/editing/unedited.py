"""Decodes an edit and keeps what it did not change."""

import logging

import comfy.model_management
import torch
from torch import Tensor

from ...checks import check_pictures
from ...editing.unedited import MATCHED, keep_unedited
from ...errors import Step1XError
from ...images import to_size
from ..prompts.encoding import at_source_size, check_vae, decode_at_working_size, encode_pictures, layout_of
from ..prompts.tiling import decode
from ..status import show_status

log = logging.getLogger(__name__)

NO_SOURCE = "keep_unedited needs 'source': nothing was kept. Connect the image that was edited"


def decode_kept(vae, latent: dict, source: Tensor | None, tiling: str, keep: str) -> tuple[Tensor, Tensor, float]:
    """Decode a latent dict to images [B, H, W, C] that have the source's own pixels wherever the edit changed nothing;
    also returns the mask of what is the edit's [B, H, W] and the share it covers.

    keep: `unedited.ON` or `unedited.MATCHED`. Without a source, nothing is kept and the log says so. The VAE runs once
    more on the source, since what it does by itself is no edit.

    Raises what `decode_edit` raises, and Step1XError for a number of edits that is no multiple of that of the sources.
    """
    check_vae(vae)
    if source is not None:
        check_pictures(source, "source")
    decoded = decode_at_working_size(vae, latent, tiling)
    if source is None:
        log.warning("Step1X-Edit Decode: %s.", NO_SOURCE)
        show_status(NO_SOURCE)
        return decoded, decoded.new_ones(decoded.shape[:3]), 1.0
    if len(decoded) % len(source):
        raise Step1XError(
            f"Input 'source' has {len(source)} images, but {len(decoded)} edits came back. Connect the images that "
            "were edited, or one image for all."
        )
    comfy.model_management.throw_exception_if_processing_interrupted()
    size, floats = (decoded.shape[2], decoded.shape[1]), layout_of(latent).resizes_floats
    working = torch.stack([to_size(image, size, floats) for image in source])
    round_trip = decode(vae, encode_pictures(vae, working), tiling).float().cpu()
    kept = keep_unedited(
        source.nan_to_num(0.0), working, round_trip, decoded, at_source_size(decoded, source, latent), keep == MATCHED
    )
    for number, line in enumerate(kept.reports, 1):
        log.info("Step1X-Edit Decode, keep_unedited, image %d of %d: %s", number, len(kept.reports), line)
    show_status(kept.reports[0] if len(kept.reports) == 1 else f"keep_unedited: {100 * kept.share:.1f} % edited on average")
    return kept.pictures, kept.mask, kept.share
