"""Keeps what was not edited: the source's own pixels, bit for bit, wherever an edit changed nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..images import resize_tensor, to_rgb
from .changes import Change, find_change

OFF, ON, MATCHED = "off", "on", "on, colours matched"
KEEP = (OFF, ON, MATCHED)


@dataclass(frozen=True)
class Kept:
    """pictures: float32 [B, H, W, C], with the source's alpha channel if it has one. mask: float32 [B, H, W], the share
    of each pixel that is the edit's; 0 where it is the source's own. share: the mean of the mask. reports: a line for
    each image."""

    pictures: Tensor
    mask: Tensor
    share: float
    reports: list[str]


def report(change: Change) -> str:
    """Say in a line what was found."""
    if change.whole:
        return f"the edit is left whole: {change.whole}"
    moved = f"; colours of the whole image had shifted by up to {100 * change.shift.size:.1f} %" if change.shift.size else ""
    return f"{100 * float(change.share.mean()):.1f} % of the image edited, the rest kept{moved}"


def fitted_share(share: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a share [h, w] to the size (width, height) of the source. What is 0 or 1 in a neighbourhood stays so."""
    if tuple(share.shape) == size[::-1]:
        return share
    return resize_tensor(share[..., None], size, "bilinear")[..., 0].clamp(0, 1)


def blended(source: Tensor, edited: Tensor, share: Tensor) -> Tensor:
    """Mix images [H, W, C] and [H, W, 3] by a share [H, W] -> float32 [H, W, C]: exactly the source where it is 0,
    exactly the edit where it is 1. An alpha channel stays the source's."""
    out = source.float().clone()
    share = share[..., None]
    mixed = torch.lerp(out[..., :3], edited, share)
    out[..., :3] = torch.where(share <= 0, out[..., :3], torch.where(share >= 1, edited, mixed))
    return out


def keep_unedited(source: Tensor, working: Tensor, round_trip: Tensor, decoded: Tensor, edited: Tensor,
                  match: bool = False) -> Kept:
    """Give the source's own pixels wherever an edit changed nothing.

    source: [S, H, W, C] in 0..1. working, round_trip: it at the size it was edited at, before and after the VAE, float32
    [S, h, w, 3]. decoded: the edit at that size, [B, h, w, 3]. edited: the edit at the source's size, [B, H, W, 3].
    Image i of the batch belongs to source i modulo S. match: whether to undo a shift of the whole image's colours
    inside of the edited area, too.
    """
    if source.shape[-1] < 3:
        source = source[..., :1].expand(-1, -1, -1, 3)
    pictures, masks, reports = [], [], []
    for index, picture in enumerate(edited):
        own = index % len(source)
        change = find_change(working[own], round_trip[own], to_rgb(decoded[index]))
        share = fitted_share(change.share, (source.shape[2], source.shape[1]))
        picture = picture.float()
        if match and not change.whole:
            picture = change.shift.undone(picture).clamp(0, 1)
        pictures.append(blended(source[own].to(picture.device), picture, share.to(picture.device)))
        masks.append(share)
        reports.append(report(change))
    mask = torch.stack(masks)
    return Kept(torch.stack(pictures), mask, float(mask.mean()), reports)
