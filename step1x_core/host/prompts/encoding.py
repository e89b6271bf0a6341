"""Encodes images and prompts to conditioning and latents, and decodes latents to images, with the host's CLIP and VAE
objects."""

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...checks import BAD_LATENT, check_conditioning, check_finite, check_latent_shape, check_pictures, latent_samples
from ...errors import Step1XError
from ...images import to_output_size, to_working_size, to_working_size_v12
from ...prompts.image_memory import ImageMemory
from ...versions import LAYOUT_V11, LAYOUT_V12, LAYOUTS, PromptLayout
from ..left_out import left_out
from .text_encoder import Step1XTokenizer, resizing_device
from .tiling import AUTO, decode

LATENT_CHANNELS = 16
# Image pixels for each latent pixel, per side.
LATENT_FACTOR = 8
# Progress units for one image: two prompts and the VAE.
ENCODING_STEPS = 3

BAD_VAE = (
    "NaN or Inf values; its file may be damaged, or its precision too low. Download the VAE again, or start ComfyUI "
    "with --fp32-vae."
)

# Entry of the latent dict with the prompt layout, for the decoder; the host's samplers pass it on.
LAYOUT_KEY = "step1x_layout"


def check_vae(vae) -> None:
    """Raise Step1XError unless the VAE's latents are like FLUX's. Those of Wan and Qwen-Image also have 16 channels,
    but a time axis."""
    if vae is None:
        raise Step1XError(
            "Input 'vae' is empty: the model it comes from is a single file or a folder without a VAE. Connect the "
            "stock 'Load VAE' with ae.safetensors."
        )
    if not hasattr(vae, "latent_channels"):
        raise Step1XError(
            f"Expected a VAE, but found a value of type '{type(vae).__name__}'. Connect the stock 'Load VAE' with the "
            "FLUX VAE (ae.safetensors)."
        )
    if vae.latent_dim != 2:
        raise Step1XError(
            f"This VAE's latents have {vae.latent_dim} axes besides the channels; Step1X-Edit needs 2 (height and "
            "width). Load the FLUX VAE (ae.safetensors), not that of Qwen-Image or a video model."
        )
    if vae.latent_channels != LATENT_CHANNELS:
        raise Step1XError(
            f"This VAE's latents have {vae.latent_channels} channels; Step1X-Edit needs {LATENT_CHANNELS}. Load the "
            "FLUX VAE (ae.safetensors)."
        )


def check_text_encoder(clip) -> None:
    """Raise Step1XError unless the text encoder is from this pack."""
    if not isinstance(getattr(clip, "tokenizer", None), Step1XTokenizer):
        raise Step1XError(
            "This text encoder formats prompts for another model. Use the one from 'Load Step1X-Edit MLLM'."
        )


def check_latent(samples: Tensor, pictures: Tensor) -> None:
    """Raise Step1XError unless the latent has the shape that the VAE would produce for these images at working size [B,
    h, w, 3]."""
    batch, height, width = pictures.shape[:3]
    expected = [batch, LATENT_CHANNELS, height // LATENT_FACTOR, width // LATENT_FACTOR]
    if list(samples.shape) != expected:
        raise Step1XError(
            f"The latent has shape {list(samples.shape)}, but this image is edited at {expected}. Connect the "
            "sampler's latent of the previous turn, and the image that 'Step1X-Edit Decode' made from it with its "
            "source connected; keep the size level."
        )
    check_finite(samples, BAD_LATENT)


def at_working_size(images: Tensor, layout: PromptLayout, size_level: int) -> Tensor:
    """Resize images [B, H, W, C] in 0..1 to their working size [B, h, w, 3] on the CPU, as the layout's version does."""
    device = resizing_device()
    resize = to_working_size_v12 if layout.resizes_floats else to_working_size
    return torch.stack([resize(image, size_level, device) for image in images])


def encode_edit(
    clip,
    vae,
    image: Tensor,
    prompt: str,
    negative_prompt: str,
    size_level: int,
    latent: dict | None = None,
    progress=None,
    known: dict | None = None,
    with_negative: bool = True,
) -> tuple[list, list, dict]:
    """Encode images [B, H, W, C] in 0..1 and a prompt to positive and negative conditioning, and the images' latent.

    Every image is resized to its working size. The language model sees it with both prompts (for v1.2 resized from the
    original), and its latent (posterior mean) is the reference in both. The same latent is returned: at full denoise
    its content has no effect, below that sampling starts from it.

    latent: what an earlier turn sampled. It replaces the images' own latent, which avoids a round trip through the VAE.
    progress: object whose `update(1)` is called `ENCODING_STEPS` times for a single image; by default the host's
    progress bar.
    known: cache of what several prompts for the same image share, the negative conditioning, the latent, and what the
    language model sees. Read and filled here; all other arguments must be the same, the image the same tensor.
    with_negative: False if sampling will not read the negative prompt; it is then not encoded (`left_out`).

    Raises Step1XError for an invalid image, a foreign text encoder or VAE, a latent of another size, sizes that
    degenerate, and damaged weights.
    """
    check_text_encoder(clip)
    check_vae(vae)
    check_pictures(image, "image")
    layout = clip.tokenizer.layout
    known = {} if known is None else known
    if "pictures" not in known:
        known["pictures"] = at_working_size(image, layout, size_level)
    pictures = known["pictures"]
    shown = image if layout.shows_original else pictures
    if latent is not None:
        check_latent(latent_samples(latent), pictures)

    if progress is None:
        progress = comfy.utils.ProgressBar(2 * len(pictures) + 1)
    memory = known.setdefault("memory", ImageMemory())
    conditionings = []
    for text in (prompt, negative_prompt):
        if conditionings and not with_negative:
            conditionings.append(left_out(conditionings[0]))
            progress.update(len(pictures))
            continue
        if len(conditionings) == 1 and "negative" in known:
            conditionings.append(known["negative"])
            progress.update(len(pictures))
            continue
        parts = []
        for picture in shown:
            comfy.model_management.throw_exception_if_processing_interrupted()
            part = clip.encode_from_tokens_scheduled(clip.tokenize(
                text, images=[picture[None]], size_level=size_level, memory=memory))
            check_finite(
                part[0][0],
                "The text encoder returned NaN or Inf values; its file may be damaged. Download the file of 'Load "
                "Step1X-Edit MLLM' again.",
            )
            parts.append(part)
            progress.update(1)
        conditionings.append(merge_batch(parts))
    comfy.model_management.throw_exception_if_processing_interrupted()
    if "samples" not in known:
        known["samples"] = encode_pictures(vae, pictures) if latent is None else latent["samples"]
    if with_negative:
        known["negative"] = conditionings[1]
    samples = known["samples"]
    progress.update(1)
    positive, negative = (
        [[cond, {**extra, "reference_latents": [samples]}] for cond, extra in c] for c in conditionings
    )
    return positive, negative, {"samples": samples, LAYOUT_KEY: layout.name}


def encode_pictures(vae, pictures: Tensor) -> Tensor:
    """Encode images [B, H, W, 3] in 0..1 to latents. Raises Step1XError if they contain NaN or Inf."""
    samples = vae.encode(pictures.clone())  # a copy, because the host may work in place
    check_finite(samples, f"The VAE encoder returned {BAD_VAE}")
    return samples


def add_references(conditionings: list[list], vae, images: list[Tensor], size_level: int) -> list[list]:
    """Append the latents of further images [B, H, W, C] to the references of the conditionings. Only the transformer
    sees them (experimental).

    They are resized like the edited image, by the rule of the conditionings' version.

    Raises Step1XError for a foreign VAE, an invalid conditioning or image, and sizes that degenerate.
    """
    check_vae(vae)
    for name, conditioning in zip(("positive", "negative"), conditionings):
        check_conditioning(conditioning, name)
    for image in images:
        check_pictures(image, "references")
    # This entry of the conditioning identifies the layout; each version resizes all its references in the same way.
    layout = (
        LAYOUT_V12
        if any("text_ids" in extra for conditioning in conditionings for _, extra in conditioning)
        else LAYOUT_V11
    )
    latents = [encode_pictures(vae, at_working_size(image, layout, size_level)) for image in images]
    return [
        [
            [cond, {**extra, "reference_latents": [*extra.get("reference_latents", []), *latents]}]
            for cond, extra in conditioning
        ]
        for conditioning in conditionings
    ]


def merge_batch(parts: list[list]) -> list:
    """Merge conditionings of single images of one size, with tensors [1, L, C] and one-row tensors beside them, into
    one of B rows."""
    if len(parts) == 1:
        return parts[0]
    merged = []
    for entries in zip(*parts):
        extra = {
            name: torch.cat([e[1][name] for e in entries]) if torch.is_tensor(value) else value
            for name, value in entries[0][1].items()
        }
        merged.append([torch.cat([e[0] for e in entries]), extra])
    return merged


def decode_edit(vae, latent: dict, source: Tensor | None = None, tiling: str = AUTO) -> Tensor:
    """Decode a latent dict to images [B, H, W, 3] in 0..1, resized to the size of the source image if given.

    tiling: one of `tiling.TILING`.

    The resize works on 8-bit values as the official code does. A result that already has the size keeps its full
    precision.

    Raises Step1XError for a foreign VAE, a latent of another model, an invalid source image, and damaged weights.
    """
    if source is not None:
        check_pictures(source, "source")
    pictures = decode_at_working_size(vae, latent, tiling)
    return pictures if source is None else at_source_size(pictures, source, latent)


def decode_at_working_size(vae, latent: dict, tiling: str = AUTO) -> Tensor:
    """Decode a latent dict to images [B, h, w, 3] in 0..1; raises what `decode_edit` raises."""
    check_vae(vae)
    samples = latent_samples(latent)
    check_latent_shape(samples, LATENT_CHANNELS)
    check_finite(samples, BAD_LATENT)
    pictures = decode(vae, samples.clone(), tiling)
    check_finite(pictures, f"The VAE decoder returned {BAD_VAE}")
    return pictures


def layout_of(latent: dict) -> PromptLayout:
    """Return the prompt layout that a latent dict was encoded with; v1.1's for a latent from elsewhere."""
    return LAYOUTS.get(latent.get(LAYOUT_KEY), LAYOUT_V11)


def at_source_size(pictures: Tensor, source: Tensor, latent: dict) -> Tensor:
    """Resize decoded images [B, h, w, 3] to the size of the source [S, H, W, C], as the version of the latent dict
    does."""
    if source.shape[1:3] == pictures.shape[1:3]:
        return pictures
    size = (source.shape[2], source.shape[1])
    truncate = layout_of(latent).truncates
    return torch.stack([to_output_size(picture, size, truncate=truncate) for picture in pictures])
