"""Editing a part of a picture: cut it out, edit it at full resolution, paste it back. No pixel outside the mask
changes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check_mask, check_pictures
from ..errors import Step1XError
from ..images import resize_tensor, to_rgb

# A cut-out of at least this share of the picture becomes the whole picture.
WHOLE_SHARE = 0.75
# A mask of another size must have the picture's aspect ratio to within this factor.
RATIO_TOLERANCE = 1.05


@dataclass(frozen=True)
class Cutout:
    """Where a part came from.

    source: the pictures [B, H, W, C]. mask: [1 or B, H, W] in 0..1, above 0 where they may change. box: (left, top,
    width, height).
    """

    source: Tensor
    mask: Tensor
    box: tuple[int, int, int, int]

    def part(self, pictures: Tensor) -> Tensor:
        """The box of [B, H, W] or [B, H, W, C], as a view."""
        left, top, width, height = self.box
        return pictures[:, top:top + height, left:left + width]


def fit_mask(mask: Tensor, image: Tensor) -> Tensor:
    """Mask [H, W], [M, H, W] or [M, 1, H, W] -> float32 [M, H, W] in 0..1 at the size of the pictures [B, H, W, C].

    A mask of another size but the same aspect ratio is scaled.

    Raises Step1XError for what is no mask, an empty one, one of another aspect ratio, and any number of masks but one
    or one for each picture.
    """
    check_mask(mask)
    mask = mask.reshape(-1, *mask.shape[-2:]).to(image.device, torch.float32).nan_to_num(0.0).clamp(0, 1)
    if not mask.any():
        raise Step1XError("The mask is empty: there is nothing to edit. Paint over the part that is to change, "
                          "or leave out the crop to edit the whole picture.")
    batch, height, width = image.shape[:3]
    if len(mask) not in (1, batch):
        raise Step1XError(
            f"There are {len(mask)} masks for {batch} pictures. Connect one mask for all, or one for each picture."
        )
    if mask.shape[1:] == (height, width):
        return mask
    stretch = mask.shape[2] * height / (mask.shape[1] * width)
    if not 1 / RATIO_TOLERANCE <= stretch <= RATIO_TOLERANCE:
        raise Step1XError(
            f"The mask is {mask.shape[2]}x{mask.shape[1]} pixels, the picture {width}x{height}: they have different shapes. "
            "Connect a mask made for this picture."
        )
    return resize_tensor(mask.movedim(0, -1), (width, height), "bilinear").movedim(-1, 0)


def region(mask: Tensor) -> tuple[int, int, int, int]:
    """The smallest box (left, top, width, height) around all that is above 0 in masks [M, H, W]."""
    inside = (mask > 0).any(dim=0)
    rows, columns = inside.any(dim=1).nonzero(), inside.any(dim=0).nonzero()
    left, top = columns[0].item(), rows[0].item()
    return left, top, columns[-1].item() + 1 - left, rows[-1].item() + 1 - top


def _grown(start: int, length: int, margin: int, least: int, side: int) -> tuple[int, int]:
    """A stretch with a margin at both ends and at least so long, moved into 0..side: its (start, length)."""
    grown = min(max(length + 2 * margin, least), side)
    start -= (grown - length) // 2
    return min(max(start, 0), side - grown), grown


def cut_box(
    inner: tuple[int, int, int, int], size: tuple[int, int], context: float, min_size: int
) -> tuple[int, int, int, int]:
    """The box to cut out around a region of a picture of size (width, height).

    context: what is added on every side, in lengths of the region's longer side, at least one pixel. min_size: least
    length of both sides. At the picture's border the box is moved, not made smaller; a box that is most of the picture
    becomes all of it.
    """
    left, top, width, height = inner
    # Feathering needs to see where the mask ends.
    margin = max(round(context * max(width, height)), 1)
    left, width = _grown(left, width, margin, min_size, size[0])
    top, height = _grown(top, height, margin, min_size, size[1])
    if width * height >= WHOLE_SHARE * size[0] * size[1]:
        return 0, 0, *size
    return left, top, width, height


def cut_out(image: Tensor, mask: Tensor, context: float, min_size: int) -> Cutout:
    """Pictures [B, H, W, C] and what may change in them (see `fit_mask`) -> the cut-out around the masks of all of them
    (see `cut_box`).

    Raises Step1XError for a mask that is empty or does not fit.
    """
    check_pictures(image, "image")
    mask = fit_mask(mask, image)
    return Cutout(image, mask, cut_box(region(mask), (image.shape[2], image.shape[1]), context, min_size))


def feathered(mask: Tensor, feather: int) -> Tensor:
    """Mask [h, w] -> the share [h, w] of the edited picture: 0 outside as before, rising to the mask's value over
    `feather` pixels inside its edge.

    Where the mask is too thin for that, it rises to its middle. The picture's border is no edge.
    """
    from scipy.ndimage import distance_transform_edt, maximum_filter

    inside = mask.cpu().numpy() > 0
    if feather == 0 or inside.all():
        return mask
    depth = distance_transform_edt(inside).astype(np.float32)
    full = np.minimum(maximum_filter(depth, size=2 * feather + 1), feather + 1)
    return mask * torch.from_numpy(np.minimum(depth / np.maximum(full, 1), 1)).to(mask.device)


def paste(result: Tensor, cutout: Cutout, feather: int) -> Tensor:
    """Edited parts [R, h, w, 3] in 0..1, of any size -> whole pictures [R, H, W, C]: the source wherever the mask is 0,
    to the last bit.

    R is the number of source pictures, or any number of versions of a single one. An alpha channel stays the source's.
    Raises Step1XError for another number.
    """
    if not isinstance(cutout, Cutout):
        raise Step1XError(
            f"Input 'stitch' is a value of type {type(cutout).__name__}. Connect the output 'stitch' of 'Step1X-Edit Crop to Mask'."
        )
    check_pictures(result, "image")
    count = cutout.source.shape[0]
    if count not in (1, len(result)):
        raise Step1XError(
            f"{len(result)} edited pictures came back for {count} that were cropped. Connect the result of the crop that 'stitch' comes from."
        )
    # Grey pictures become RGB, as they do for editing.
    source = cutout.source if cutout.source.shape[-1] >= 3 else cutout.source[..., :1].expand(-1, -1, -1, 3)
    out = source.expand(len(result), -1, -1, -1).clone()
    target = cutout.part(out)[..., :3]
    width, height = cutout.box[2:]
    masks = [feathered(mask, feather) for mask in cutout.part(cutout.mask)]
    for index, picture in enumerate(result):
        picture = to_rgb(picture)
        if picture.shape[:2] != (height, width):
            picture = resize_tensor(picture, (width, height), "bicubic").clamp(0, 1)
        share = masks[index % len(masks)][..., None]
        target[index] = torch.lerp(target[index].float(), picture.to(out.device), share).to(out.dtype)
    return out
