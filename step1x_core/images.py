"""Image sizes and resizing, bit-exact with the official code, which uses Pillow and torch (docs/model.md, Image sizes;
v1.2 images; Text generation)."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import Step1XError
from .exact_resize import resize_exactly

# Working sizes are multiples of 16 pixels: VAE factor 8 times patch size 2.
SIZE_MULTIPLE = 16

# Qwen2.5-VL: 14-pixel patches merged 2x2 (docs/model.md, Image sizes).
VISION_PATCH = 14
VISION_CELL = 28
MAX_ASPECT_RATIO = 200

# Minimum and maximum pixels: of the image helper library, of the processors the models were trained with, and of the
# one for reading and judging images.
HELPER_LIMITS = (4 * VISION_CELL**2, 16384 * VISION_CELL**2)
PROCESSOR_LIMITS = (256 * VISION_CELL**2, 324 * VISION_CELL**2)
PROCESSOR_LIMITS_V12 = (256 * VISION_CELL**2, 400 * VISION_CELL**2)
THINKER_LIMITS = (512**2, 1024 * VISION_CELL**2)
# Images to read and judge are first scaled down to at most this size on both sides.
THINKER_SIDE = 1024

# Pixels up to which an image is resized on a GPU, in 50 bytes of its memory for each.
MAX_ON_GPU = 4_000_000

# For text to image, the language model gets a black image of this size (docs/model.md, Image sizes).
BLACK_PICTURE = 1024


def working_size(width: int, height: int, size_level: int) -> tuple[int, int]:
    """Return the size (width, height) at which an image is edited: about size_level**2 pixels at the same aspect ratio,
    sides in multiples of 16.

    Raises Step1XError if a side would become 0.
    """
    ratio = width / height
    if width > height:
        w = math.ceil(math.sqrt(size_level * size_level * ratio))
        h = math.ceil(w / ratio)
    else:
        h = math.ceil(math.sqrt(size_level * size_level / ratio))
        w = math.ceil(h * ratio)
    w, h = (side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in (w, h))
    if w == 0 or h == 0:
        raise Step1XError(
            f"An image of {width}x{height} pixels is too narrow to edit at size level {size_level}: one side would be "
            f"smaller than {SIZE_MULTIPLE} pixels. Crop the image or raise the size level."
        )
    return w, h


def _fit_cells(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    w, h = (max(VISION_CELL, round(side / VISION_CELL) * VISION_CELL) for side in (width, height))
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        w, h = (max(VISION_CELL, math.floor(side / shrink / VISION_CELL) * VISION_CELL) for side in (width, height))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        w, h = (math.ceil(side * grow / VISION_CELL) * VISION_CELL for side in (width, height))
    return w, h


def vision_sizes(width: int, height: int, limits=(HELPER_LIMITS, PROCESSOR_LIMITS)) -> list[tuple[int, int]]:
    """Return the sizes (width, height) an image is resized to on its way to the vision tower, one for each pair of
    limits.

    limits: (minimum, maximum) number of pixels of each resize.

    Raises Step1XError for aspect ratios above 200, which every resize rejects. Rounding in the first resize can also
    exceed it.
    """
    sizes, size = [], (width, height)
    for low, high in limits:
        if max(size) / min(size) > MAX_ASPECT_RATIO:
            raise Step1XError(
                f"An image of {width}x{height} pixels is too elongated for the language model, which accepts aspect "
                f"ratios up to {MAX_ASPECT_RATIO}. Crop the image."
            )
        size = _fit_cells(*size, low, high)
        sizes.append(size)
    return sizes


def picture_grid(picture: Tensor) -> tuple[int, int]:
    """Return the rows and columns of vision tokens of an image [h, w, 3] whose sides are multiples of 28."""
    return picture.shape[0] // VISION_CELL, picture.shape[1] // VISION_CELL


def three_channels(image: Tensor) -> Tensor:
    """View an image [H, W, C] as [H, W, 3]: grey becomes RGB, alpha is dropped."""
    return image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)


def to_rgb(image: Tensor) -> Tensor:
    """Convert an image [H, W, C] to float32 [H, W, 3] in 0..1 on the CPU. Grey becomes RGB, alpha is dropped, NaN
    becomes black."""
    return three_channels(image).float().nan_to_num(0.0).clamp_(0, 1).cpu()


def to_uint8(image: Tensor) -> np.ndarray:
    """Convert an image [H, W, C] in 0..1 to uint8 [H, W, 3]; `to_rgb` says how other channels and values are
    treated."""
    # `to_rgb` and a rounding on one thread: torch's threads have to wait for each other after each operation, and its
    # nan_to_num alone takes longer than all of this. fmax turns NaN into 0.
    pixels = np.fmax(three_channels(image).detach().float().cpu().numpy(), 0)
    np.fmin(pixels, 1, out=pixels)
    pixels *= 255
    return np.rint(pixels, out=pixels).astype(np.uint8)


def from_uint8(pixels: np.ndarray) -> Tensor:
    """Convert uint8 [H, W, 3] to a float32 tensor [H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(pixels)).float().div_(255)


def resize(pixels: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Resize uint8 [H, W, 3] to size (width, height). An image that already has that size is returned unchanged."""
    if pixels.shape[1::-1] == tuple(size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, resample))


def resize_tensor(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize [H, W, 3] to size (width, height) with antialiasing. For uint8, torch's own 8-bit arithmetic is used: up
    to 2 levels from Pillow's."""
    batch = image.movedim(-1, 0)[None]
    return torch.nn.functional.interpolate(batch, size[::-1], mode=mode, antialias=True)[0].movedim(0, -1).contiguous()


def to_uint8_on(image: Tensor, device: torch.device) -> Tensor:
    """`to_uint8` on a device."""
    pixels = three_channels(image).detach().float().to(device).nan_to_num(0.0)
    return pixels.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def resized(image: Tensor, steps: list[tuple[tuple[int, int], str]], device: torch.device | None = None) -> np.ndarray:
    """Resize an image [H, W, C] in 0..1, as 8-bit values, from size to size; returns uint8 [h, w, 3].

    steps: sizes (width, height), each with "lanczos" or "bicubic" for Pillow's filters or "torch" for torch's bicubic.
    device: where to compute the same; a GPU without room for it leaves it to the CPU.
    """
    if device is not None and image.shape[0] * image.shape[1] <= MAX_ON_GPU:
        try:
            pixels = to_uint8_on(image, device)
            for size, kind in steps:
                pixels = resize_exactly(pixels, size, "bicubic" if kind == "torch" else kind, pillow=kind != "torch")
            return pixels.cpu().numpy()
        except torch.cuda.OutOfMemoryError:
            pass
    pixels = to_uint8(image)
    for size, kind in steps:
        if kind == "torch":
            pixels = resize_tensor(torch.from_numpy(np.array(pixels)), size, "bicubic").numpy()
        else:
            pixels = resize(pixels, size, Image.Resampling[kind.upper()])
    return pixels


def to_size(image: Tensor, size: tuple[int, int], floats: bool, device: torch.device | None = None) -> Tensor:
    """Resize an image [H, W, C] in 0..1 to size (width, height), [h, w, 3] in 0..1: bilinearly on floats, else with
    Lanczos on 8-bit values. device: for the latter, as for `resized`."""
    if floats:
        return resize_tensor(to_rgb(image), size, "bilinear")
    return from_uint8(resized(image, [(size, "lanczos")], device))


def to_working_size(image: Tensor, size_level: int, device: torch.device | None = None) -> Tensor:
    """Resize an image [H, W, C] in 0..1 to its working size [h, w, 3] in 0..1, with Lanczos on 8-bit values."""
    return to_size(image, working_size(image.shape[1], image.shape[0], size_level), floats=False, device=device)


def to_vision_size(image: Tensor, device: torch.device | None = None) -> Tensor:
    """Resize an image [H, W, C] in 0..1 to uint8 [h, w, 3] with sides in multiples of 28, with the two bicubic resizes
    of the official code. device: where to compute them (`resized`)."""
    steps = [(size, "bicubic") for size in vision_sizes(image.shape[1], image.shape[0])]
    return torch.from_numpy(np.array(resized(image, steps, device)))


def to_working_size_v12(image: Tensor, size_level: int, device: torch.device | None = None) -> Tensor:
    """Resize an image [H, W, C] in 0..1 to its working size [h, w, 3] in 0..1 for the VAE of v1.2, bilinearly on
    floats, which is done on the CPU whatever the device."""
    return to_size(image, working_size(image.shape[1], image.shape[0], size_level), floats=True)


def to_vision_size_v12(image: Tensor, size_level: int, device: torch.device | None = None) \
        -> tuple[Tensor, tuple[int, int]]:
    """Resize an image [H, W, C] in 0..1 for the language model of v1.2. device: where to compute it (`resized`).

    Returns uint8 [h, w, 3] with sides in multiples of 28, and the working size (width, height) that it was resized to
    in between. Raises Step1XError for sizes that degenerate.
    """
    working = working_size(image.shape[1], image.shape[0], size_level)
    (size,) = vision_sizes(*working, limits=[PROCESSOR_LIMITS_V12])
    return torch.from_numpy(np.array(resized(image, [(working, "lanczos"), (size, "torch")], device))), working


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Scale uint8 [H, W, 3] down to at most 1024 pixels on the longer side."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((THINKER_SIDE, THINKER_SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(picture)


def thumbnail_size(width: int, height: int) -> tuple[int, int]:
    """Return the size that `thumbnail` gives an image of this size, by Pillow's own rounding."""
    picture = Image.new("1", (width, height))
    picture.thumbnail((THINKER_SIDE, THINKER_SIDE))
    return picture.size


def to_thinker_size(image: Tensor, device: torch.device | None = None) -> Tensor:
    """Resize an image [H, W, C] in 0..1 to uint8 [h, w, 3] with sides in multiples of 28, for the language model to
    read and judge (docs/model.md, Text generation). device: where to compute it (`resized`).

    Raises Step1XError for aspect ratios above 200.
    """
    small = thumbnail_size(image.shape[1], image.shape[0])
    if any(before // (2 * after) > 1 for before, after in zip(image.shape[1::-1], small)):
        # Pillow averages blocks of pixels first.
        image = from_uint8(thumbnail(to_uint8(image)))
    loaded, size = vision_sizes(*small, limits=[HELPER_LIMITS, THINKER_LIMITS])
    steps = [(small, "bicubic"), (loaded, "bicubic"), (size, "torch")]
    return torch.from_numpy(np.array(resized(image, steps, device)))


def truncate_uint8(image: Tensor) -> Tensor:
    """Convert a decoded image in 0..1 to uint8 by truncation, as the official code writes its results (docs/model.md,
    Decode)."""
    return image.float().clamp(0, 1).mul_(255).to(torch.uint8)


def to_output_size(image: Tensor, size: tuple[int, int], truncate: bool = True) -> Tensor:
    """Resize a decoded image [H, W, 3] in 0..1 to [h, w, 3] at size (width, height), bicubically on 8-bit values.

    truncate: whether to truncate to 8-bit values, as the official code of v1.0 and v1.1 does, or to round, as that of
    v1.2 does.
    """
    pixels = truncate_uint8(image).cpu().numpy() if truncate else to_uint8(image)
    return from_uint8(resize(pixels, size, Image.Resampling.BICUBIC))
