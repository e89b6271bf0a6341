"""Pairs of pictures through the language model and the VAE, once: what is in the cache is not encoded again."""

import math
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...checks import check_finite
from ...errors import Step1XError
from ...files import content_key, picture_size
from ...images import to_size, working_size
from ...training.cache import CACHE_FOLDER, Cache, CachedPair, EditDataset, pack_conditioning
from ...training.dataset import EditPair, decode_picture
from ..prompts.encoding import LATENT_FACTOR, at_working_size, check_text_encoder, check_vae, encode_pictures

# The shape of source and target may differ by this share, which rounding to whole pixels can do.
ASPECT_TOLERANCE = 0.03
# Values of each weight that stand for all of it in a fingerprint.
SAMPLED = 16


def fingerprint(patcher, network: torch.nn.Module) -> str:
    """A name for a network's weights: shapes and some values of every tensor. Patched ones count as new with every
    loading."""
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
        raise Step1XError(f"{pair.target} has {target[0]}x{target[1]} pixels and its source {pair.source.name} "
                          f"{source[0]}x{source[1]}, but they must have the same aspect ratio. "
                          "Crop one of them, or remove the pair.")


def unchanged(path: Path, key: str, name: Callable[[bytes], str]) -> bytes:
    """The content of a file that had this key a moment ago. name: what the key is made by. Raises Step1XError where it
    was replaced meanwhile."""
    data = path.read_bytes()
    if name(data) != key:
        raise Step1XError(f"The image {path} was replaced while the dataset was read. Run the node again.")
    return data


class PairEncoder:
    """The two encoders of a dataset, and the cache of what they make. Everything is stored at once, so a cancelled run
    is resumed.

    size_level: as for editing. computed: how many tensors had to be computed so far.

    Raises Step1XError for models of another kind.
    """

    def __init__(self, clip, vae, cache: Cache, size_level: int):
        check_text_encoder(clip)
        check_vae(vae)
        self.clip, self.vae, self.cache, self.size_level = clip, vae, cache, size_level
        self.layout = clip.tokenizer.layout
        self.text_name = content_key(self.layout.name, size_level, fingerprint(clip.patcher, clip.cond_stage_model))
        self.vae_name = content_key(self.layout.name, size_level, fingerprint(vae.patcher, vae.first_stage_model))
        self.computed = 0

    def picture_key(self, data: bytes, size: tuple[int, int]) -> str:
        """The name of the latent of a picture file at size (width, height)."""
        return content_key(self.vae_name, data, *size)

    def encode_text(self, pair: EditPair, with_negative: bool) -> CachedPair:
        """A pair whose conditionings are in the cache, and its latents' names. with_negative: the one of the empty
        prompt, too.

        Raises Step1XError for pictures that cannot be read or do not fit each other, for NaN, and for a full disk.
        """
        files = [path.read_bytes() for path in pair.files]
        source, target = files[0], files[-1]
        sizes = [picture_size(data, str(path)) for data, path in zip(files, pair.files)]
        check_shapes(pair, sizes[0], sizes[-1])
        size = working_size(*sizes[0], self.size_level)
        source_key, target_key = (self.picture_key(data, size) for data in (source, target))
        texts = [pair.instruction, ""] if with_negative else [pair.instruction]
        names = [content_key(self.text_name, source, text) for text in texts]
        # One entry for an instruction that is empty itself.
        missing = {name: text for name, text in zip(names, texts) if name not in self.cache}
        if target_key not in self.cache:
            decode_picture(target, pair.files[-1])  # a damaged one is told before the encoders have worked for hours
        if missing:
            picture = decode_picture(source, pair.source)
            for name, text in missing.items():
                self.cache.store(name, pack_conditioning(self.conditioning(picture, text)))
        self.computed += len(missing)
        return CachedPair(pair, names[0], source_key, None if pair.target is None else target_key,
                          tuple(side // LATENT_FACTOR for side in reversed(size)), names[1] if with_negative else None,
                          content_key(*files, pair.instruction))

    def conditioning(self, picture: Tensor, text: str) -> list:
        """What the text encoder makes of a source, float32 [H, W, 3], and an instruction: a conditioning of the host.
        """
        if self.layout.shows_original:
            shown = picture
        else:
            shown = at_working_size(picture[None], self.layout, self.size_level)[0]
        tokens = self.clip.tokenize(text, images=[shown[None]], size_level=self.size_level)
        conditioning = self.clip.encode_from_tokens_scheduled(tokens)
        check_finite(conditioning[0][0], "The text encoder returned NaN or infinite values. Its file may be damaged. "
                                         "Download it again.")
        return conditioning

    def encode_latents(self, item: CachedPair) -> None:
        """Put the latents of source and target into the cache. Raises Step1XError as `unchanged` does, and for a full
        disk."""
        size = (item.size[1] * LATENT_FACTOR, item.size[0] * LATENT_FACTOR)
        for key, path in zip((item.source, item.target), item.pair.files):
            if key not in self.cache:
                picture = decode_picture(unchanged(path, key, lambda data: self.picture_key(data, size)), path)
                latent = encode_pictures(self.vae, to_size(picture, size, self.layout.resizes_floats)[None])
                self.cache.store(key, {"latent": latent.float().cpu()})
                self.computed += 1


def cache_pairs(clip, vae, pairs: list[EditPair], folder: Path, size_level: int,
                validation: int = 0) -> tuple[EditDataset, int]:
    """The pairs as a training reads them, and how many tensors had to be computed for that.

    folder: the dataset's; the cache lies in it. size_level: as for editing. validation: number of pairs held out at the
    end.

    All instructions are encoded first, then all pictures, so that on a small card each model is loaded once.

    Raises Step1XError as `PairEncoder` and its methods do, and where no pairs are left to train on.
    """
    if validation >= len(pairs):
        raise Step1XError(f"{validation} pairs for validation leave none of the {len(pairs)} to train on. "
                          "Lower 'validation', or add pairs.")
    encoder = PairEncoder(clip, vae, Cache(folder / CACHE_FOLDER), size_level)
    trained = len(pairs) - validation
    progress = comfy.utils.ProgressBar(2 * len(pairs))
    cached = []
    for number, pair in enumerate(pairs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        # A teacher without targets needs guidance.
        cached.append(encoder.encode_text(pair, with_negative=number >= trained or pair.target is None))
        progress.update(1)
    for item in cached:
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoder.encode_latents(item)
        progress.update(1)
    keys = {key for item in cached for key in (item.conditioning, item.negative, item.source, item.target)}
    encoder.cache.prune(keys - {None})
    return EditDataset(encoder.cache, cached[:trained], cached[trained:]), encoder.computed
