"""Pairs of pictures through the language model and the VAE, once: what is in the cache is not encoded again."""

import math
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ...checks import check_finite
from ...errors import Step1XError
from ...files import content_key
from ...images import from_uint8, resize, resize_tensor, to_rgb, to_uint8, working_size
from ...training.cache import CACHE_FOLDER, Cache, CachedPair, EditDataset, pack_conditioning
from ...training.dataset import EditPair, decode_picture, picture_size
from ...versions import PromptLayout
from ..prompts.encoding import LATENT_FACTOR, check_text_encoder, check_vae, encode_pictures

# The shape of source and target may differ by this share, which rounding to whole pixels can do.
ASPECT_TOLERANCE = 0.03
# Values of each weight that stand for all of it in a fingerprint.
SAMPLED = 16


def fingerprint(patcher, network: torch.nn.Module) -> str:
    """A name for a network's weights: shapes and some values of every tensor. Patched ones count as new with every loading."""
    parts = [str(patcher.patches_uuid)] if patcher.patches else []
    for name, tensor in network.state_dict().items():
        parts.append(f"{name}{tuple(tensor.shape)}{tensor.dtype}")
        # With dynamic VRAM a weight that no file had is on the meta device.
        if tensor.numel() and not tensor.is_meta:
            parts.append(tensor.flatten()[:SAMPLED].float().cpu().numpy().tobytes())
    return content_key(*parts)


def check_shapes(pair: EditPair, source: tuple[int, int], target: tuple[int, int]) -> None:
    """Raise Step1XError where one picture cannot lie over the other. source, target: width and height."""
    ratios = [width / height for width, height in (source, target)]
    if abs(math.log(ratios[0] / ratios[1])) > ASPECT_TOLERANCE:
        raise Step1XError(f"{pair.target} has {target[0]}x{target[1]} pixels and its source {pair.source.name} {source[0]}x{source[1]}: "
                          "they must have the same shape. Crop one of them, or take the pair out.")


def unchanged(path: Path, key: str, name: Callable[[bytes], str]) -> bytes:
    """The content of a file that had this key a moment ago. name: what the key is made by. Raises Step1XError where it was replaced meanwhile."""
    data = path.read_bytes()
    if name(data) != key:
        raise Step1XError(f"The picture {path} was replaced while the dataset was read. Run the node again.")
    return data


def to_size(picture: Tensor, size: tuple[int, int], layout: PromptLayout) -> Tensor:
    """Picture [H, W, 3] -> [h, w, 3] at size (width, height), as the layout's version resizes what it edits."""
    if layout.resizes_floats:
        return resize_tensor(to_rgb(picture), size, "bilinear")
    return from_uint8(resize(to_uint8(picture), size, Image.Resampling.LANCZOS))


def cache_pairs(clip, vae, pairs: list[EditPair], folder: Path, size_level: int, validation: int = 0) -> tuple[EditDataset, int]:
    """The pairs as a training reads them, and how many tensors had to be computed for that.

    folder: the dataset's; the cache lies in it. size_level: as for editing. validation: so many pairs from the end are kept from training.

    All instructions are encoded first, then all pictures, so that on a small card each model is loaded once. Everything is stored at once; a second run goes on.

    Raises Step1XError for models of another kind, pictures that cannot be read or do not fit each other, and a full disk.
    """
    check_text_encoder(clip)
    check_vae(vae)
    if validation >= len(pairs):
        raise Step1XError(f"{validation} pairs for validation leave none of the {len(pairs)} to train on. Lower validation, or add pairs.")
    cache = Cache(folder / CACHE_FOLDER)
    layout = clip.tokenizer.layout
    text_name = content_key(layout.name, size_level, fingerprint(clip.patcher, clip.cond_stage_model))
    vae_name = content_key(layout.name, size_level, fingerprint(vae.patcher, vae.first_stage_model))
    progress = comfy.utils.ProgressBar(2 * len(pairs))

    def encode_instruction(key: str, picture: Tensor, text: str) -> None:
        shown = picture if layout.shows_original else to_size(picture, working_size(picture.shape[1], picture.shape[0], size_level), layout)
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text, images=[shown[None]], size_level=size_level))
        check_finite(conditioning[0][0], "The text encoder gave values that are no numbers (NaN or infinity): its file is damaged. Download it again.")
        cache.store(key, pack_conditioning(conditioning))

    cached, computed = [], 0
    for number, pair in enumerate(pairs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        source, target = pair.source.read_bytes(), pair.target.read_bytes()
        sizes = picture_size(source, pair.source), picture_size(target, pair.target)
        check_shapes(pair, *sizes)
        size = working_size(*sizes[0], size_level)
        keys = [content_key(vae_name, data, *size) for data in (source, target)]
        texts = [pair.instruction, ""] if number >= len(pairs) - validation else [pair.instruction]
        conditionings = {content_key(text_name, source, text): text for text in texts}
        missing = [key for key in conditionings if key not in cache]
        if keys[1] not in cache:
            decode_picture(target, pair.target)  # a damaged one is told before the encoders have worked for hours
        if missing:
            picture = decode_picture(source, pair.source)
            for key in missing:
                encode_instruction(key, picture, conditionings[key])
        computed += len(missing)
        names = [content_key(text_name, source, text) for text in texts]
        cached.append(CachedPair(pair, names[0], *keys, (size[1] // LATENT_FACTOR, size[0] // LATENT_FACTOR), names[1] if len(names) > 1 else None,
                                 content_key(source, target, pair.instruction)))
        progress.update(1)
    for item in cached:
        comfy.model_management.throw_exception_if_processing_interrupted()
        for key, path in ((item.source, item.pair.source), (item.target, item.pair.target)):
            if key not in cache:
                size = [side * LATENT_FACTOR for side in reversed(item.size)]
                data = unchanged(path, key, lambda data: content_key(vae_name, data, *size))
                cache.store(key, {"latent": encode_pictures(vae, to_size(decode_picture(data, path), tuple(size), layout)[None]).float().cpu()})
                computed += 1
        progress.update(1)
    cache.prune({key for item in cached for key in (item.conditioning, item.negative, item.source, item.target) if key})
    return EditDataset(cache, cached[:len(pairs) - validation], cached[len(pairs) - validation:]), computed
