"""Checks on what comes in from other nodes: whether it is a picture, a mask, a latent or a conditioning at all, and holds numbers."""

import logging

import torch
from torch import Tensor

from .errors import Step1XError

log = logging.getLogger(__name__)

BAD_LATENT = "The latent holds values that are no numbers (NaN or infinity), so no picture can come of it. Look at the node that made it."


def describe(value) -> str:
    """For errors: what a value is."""
    return f"a tensor of shape {list(value.shape)} and type {value.dtype}" if torch.is_tensor(value) else f"'{type(value).__name__}'"


def check_pictures(pictures: Tensor, name: str) -> None:
    """Raise Step1XError unless the input `name` brings pictures: a floating-point tensor [B, H, W, C] without a side of length 0.

    Values that are no numbers are read as black (NaN) or cut to 0..1; a warning in the log tells.
    """
    if not torch.is_tensor(pictures) or pictures.ndim != 4 or not pictures.is_floating_point():
        raise Step1XError(f"The input '{name}' brings no picture but {describe(pictures)}; pictures are floating-point tensors [batch, height, width, channels]. "
                          "Connect an output of the type IMAGE.")
    if 0 in pictures.shape:
        raise Step1XError(f"There is no picture to edit: the image batch is empty, the input '{name}' has the shape {list(pictures.shape)}. Connect a picture.")
    broken = int((~torch.isfinite(pictures)).sum())
    if broken:
        log.warning("%d of the %d values that the input '%s' brings are no numbers (NaN or infinity); NaN is taken for black. Look at the node that made them; "
                    "a VAE whose precision is too low needs ComfyUI started with --fp32-vae.", broken, pictures.numel(), name)


def check_mask(mask: Tensor) -> None:
    """Raise Step1XError unless this is a mask [H, W], [M, H, W] or [M, 1, H, W]."""
    if not torch.is_tensor(mask) or mask.ndim not in (2, 3, 4) or mask.ndim == 4 and mask.shape[1] != 1 or 0 in mask.shape[1:]:
        raise Step1XError(f"The input 'mask' brings no mask but {describe(mask)}; masks are tensors [batch, height, width]. Connect an output of the type MASK.")


def check_conditioning(conditioning: list, name: str) -> None:
    """Raise Step1XError unless the input `name` brings the host's conditioning: entries of a tensor [B, L, C] and a dict."""
    if not isinstance(conditioning, list) or not conditioning or any(not torch.is_tensor(entry[0]) or entry[0].ndim != 3 for entry in conditioning):
        raise Step1XError(f"The input '{name}' brings no conditioning, or an empty one. Connect that of 'Step1X-Edit Encode'.")


def latent_samples(latent: dict) -> Tensor:
    """The samples of a latent dict, of any model. Raises Step1XError for anything without samples, and for empty ones."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    usable = torch.is_tensor(samples) and samples.ndim > 2 and samples.is_floating_point()
    if not usable and not getattr(samples, "is_nested", False):
        found = describe(latent if samples is None else samples)
        raise Step1XError(f"There is no latent in what is connected as one ({found}). Connect an output of the type LATENT.")
    if 0 in samples.shape:
        raise Step1XError(f"The latent is empty, its shape is {list(samples.shape)}. Connect a latent with at least one picture.")
    return samples


def check_kind(value, kind: type, name: str, nodes: str) -> None:
    """Raise Step1XError unless the input `name` brings a thing of this kind, which `nodes` hand out."""
    if not isinstance(value, kind):
        raise Step1XError(f"The input '{name}' brings {describe(value)}. Connect the output of {nodes}.")


def check_finite(values: Tensor, message: str) -> None:
    """Raise Step1XError with this message if there is NaN or an infinity among the values."""
    if not torch.isfinite(values).all():
        raise Step1XError(message)


def check_latent_shape(samples, channels: int) -> None:
    """Raise Step1XError unless these samples are [B, channels, h, w]."""
    if samples.is_nested or samples.ndim != 4 or samples.shape[1] != channels:
        raise Step1XError(f"A latent of shape {list(samples.shape)} belongs to another model; Step1X-Edit needs [batch, {channels}, height, width]. "
                          "Connect the latent from 'Step1X-Edit Encode', or an empty one from 'EmptySD3LatentImage'.")
