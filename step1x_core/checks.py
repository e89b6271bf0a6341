"""Checks of node inputs: whether a value is an image, a mask, a latent or a conditioning, and whether it is finite."""

import logging

import torch
from torch import Tensor

from .errors import Step1XError

log = logging.getLogger(__name__)

BAD_LATENT = "The latent contains NaN or Inf values, so it cannot be decoded to an image. Check the node that made it."


def describe(value) -> str:
    """Describe a value for an error text: shape and dtype of a tensor, the type of anything else."""
    if torch.is_tensor(value):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    return f"a value of type '{type(value).__name__}'"


def check_pictures(pictures: Tensor, name: str) -> None:
    """Raise Step1XError unless input `name` is a floating-point image tensor [B, H, W, C] with no side of length 0.

    NaN is read as black and Inf is clamped to 0..1; either is logged as a warning.
    """
    if not torch.is_tensor(pictures) or pictures.ndim != 4 or not pictures.is_floating_point():
        raise Step1XError(
            f"Input '{name}' is {describe(pictures)}; expected a floating-point image tensor [batch, height, width, "
            "channels]. Connect an output of the type IMAGE."
        )
    if 0 in pictures.shape:
        raise Step1XError(
            f"Input '{name}' is an empty image batch of shape {list(pictures.shape)}; expected at least one image. "
            "Connect an image."
        )
    broken = 0 if all_finite(pictures) else int((~torch.isfinite(pictures)).sum())
    if broken:
        log.warning(
            "Input '%s': %d of %d values are NaN or Inf; NaN is read as black, Inf is clamped. Check the node that "
            "made the image. If it is a VAE with too little precision, start ComfyUI with --fp32-vae.",
            name, broken, pictures.numel(),
        )


def check_mask(mask: Tensor) -> None:
    """Raise Step1XError unless this is a mask [H, W], [M, H, W] or [M, 1, H, W]."""
    if (
        not torch.is_tensor(mask)
        or mask.ndim not in (2, 3, 4)
        or mask.ndim == 4
        and mask.shape[1] != 1
        or 0 in mask.shape[1:]
    ):
        raise Step1XError(
            f"Input 'mask' is {describe(mask)}; expected a mask tensor [batch, height, width]. Connect an output of "
            "the type MASK."
        )


def check_conditioning(conditioning: list, name: str) -> None:
    """Raise Step1XError unless input `name` is a host conditioning: a list of pairs of a tensor [B, L, C] and a
    dict."""
    if (
        not isinstance(conditioning, list)
        or not conditioning
        or any(not torch.is_tensor(entry[0]) or entry[0].ndim != 3 for entry in conditioning)
    ):
        raise Step1XError(
            f"Input '{name}' is not a conditioning, or is empty. Connect a conditioning from 'Step1X-Edit Encode'."
        )


def latent_samples(latent: dict) -> Tensor:
    """Return the samples of a latent dict, of any model. Raises Step1XError if there are none or they are empty."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    usable = torch.is_tensor(samples) and samples.ndim > 2 and samples.is_floating_point()
    if not usable and not getattr(samples, "is_nested", False):
        found = describe(latent if samples is None else samples)
        raise Step1XError(f"Expected a latent, but found {found}. Connect an output of the type LATENT.")
    if 0 in samples.shape:
        raise Step1XError(
            f"The latent is empty: its shape is {list(samples.shape)}. Connect a latent of at least one image."
        )
    return samples


def check_kind(value, kind: type, name: str, nodes: str) -> None:
    """Raise Step1XError unless input `name` is an instance of `kind`. nodes: which nodes output it, for the error."""
    if not isinstance(value, kind):
        raise Step1XError(f"Input '{name}' is {describe(value)}. Connect the output of {nodes}.")


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or Inf.

    The sum tells in one pass without further memory: it is finite only if all values are. Where it is not, as when
    large numbers overflow, each value is looked at.
    """
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())


def check_finite(values: Tensor, message: str) -> None:
    """Raise Step1XError with this message if any value is NaN or Inf."""
    if not all_finite(values):
        raise Step1XError(message)


def check_latent_shape(samples, channels: int) -> None:
    """Raise Step1XError unless the samples are [B, channels, h, w]."""
    if samples.is_nested or samples.ndim != 4 or samples.shape[1] != channels:
        raise Step1XError(
            f"The latent has shape {list(samples.shape)}; Step1X-Edit needs [batch, {channels}, height, width]. It "
            "belongs to another model. Connect the latent from 'Step1X-Edit Encode', or an empty one from "
            "'EmptySD3LatentImage'."
        )
