"""Many edits in one go: an item that fails does not cost the others."""

import comfy.model_management
import comfy.utils
import latent_preview
from torch import Tensor

from ...editing.batches import Item, describe
from ...errors import Step1XError
from ..prompts.encoding import ENCODING_STEPS, check_text_encoder, check_vae, decode_edit, encode_edit
from ..reasoning.rounds import Failure, attempt
from ..sampling.few_steps import reads_negative, version_defaults
from ..sampling.sampler import check_model, model_sigmas, sample, show_settings, with_norm_limiter

PREVIEW_FORMAT = "JPEG"
# Edits that are encoded, sampled and decoded together. Their conditionings wait in main memory, some 20 MB for each at
# 1024x1024.
TOGETHER = 32


def check_parts(model, clip, vae, steps: int, cfg: float) -> None:
    """Refuse models of another kind with a Step1XError and show what sampling with steps and cfg comes to."""
    check_model(model)
    check_text_encoder(clip)
    check_vae(vae)
    show_settings(model, steps, cfg)


def edit_batch(
    node_id: str,
    model,
    clip,
    vae,
    items: list[Item],
    negative_prompt: str,
    size_level: int,
    steps: int,
    cfg: float,
    sampler_name: str,
) -> tuple[list[Tensor], str]:
    """The edited pictures [1, H, W, 3] at the sizes of their sources, without those that failed, and a report on all.

    Many items are encoded first, then sampled, then decoded, so that on a small card each model is loaded seldom; of a
    picture's instructions only the first encodes the picture itself and the negative prompt.
    node_id: the node on whose account failures are put. steps, cfg: 0 takes the default of the version, or of a
    few-step LoRA.

    Raises Step1XError for models of another kind and if all items failed, and the host's exception when the run is
    cancelled.
    """
    check_parts(model, clip, vae, steps, cfg)
    steps, cfg = version_defaults(model, steps, cfg)
    model = with_norm_limiter(model)
    with_negative = reads_negative(model, cfg)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    progress = comfy.utils.ProgressBar(len(items) * (ENCODING_STEPS + steps + 1))

    # Of the latest picture, by its number: the instructions of one picture follow each other.
    encoded = {}

    def encode(item: Item, _):
        shared = encoded.pop(item.number, {})
        encoded.clear()
        encoded[item.number] = shared
        return encode_edit(clip, vae, item.picture, item.prompt, negative_prompt, size_level, progress=progress,
                           known=shared, with_negative=with_negative)

    def denoise(item: Item, encoded):
        start = progress.current

        def show(step, denoised, x, total):
            progress.update_absolute(
                start + step + 1,
                preview=previewer and previewer.decode_latent_to_preview_image(PREVIEW_FORMAT, denoised),
            )

        sigmas = model_sigmas(model, steps, encoded[2]["samples"])
        return sample(model, *encoded, sigmas, cfg, item.seed, sampler_name, show)

    def decode(item: Item, latent):
        return decode_edit(vae, latent, item.picture)

    states, position = [None] * len(items), 0
    for first in range(0, len(items), TOGETHER):
        for stage, units in ((encode, ENCODING_STEPS), (denoise, steps), (decode, 1)):
            for index, item in enumerate(items[first:first + TOGETHER], first):
                comfy.model_management.throw_exception_if_processing_interrupted()
                if not isinstance(states[index], Failure):
                    task = f"{stage.__name__} {index} {item.number} {item.seed} {item.prompt}"
                    states[index] = attempt(node_id, task, stage, item, states[index])
                position += units
                progress.update_absolute(position)
    report = describe(items, [state.reason if isinstance(state, Failure) else None for state in states])
    pictures = [state for state in states if not isinstance(state, Failure)]
    if not pictures:
        raise Step1XError(f"None of the edits could be made. {report}")
    return pictures, report
