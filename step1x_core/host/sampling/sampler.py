"""Sampling through the host's own sampler machinery."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...checks import BAD_LATENT, check_conditioning, check_finite, check_latent_shape, latent_samples
from ...errors import Step1XError
from ...sampling.guidance import NormLimiter
from ...sampling.schedule import image_to_image_start, latent_tokens, sigma_schedule
from ...versions import describe_settings
from ..left_out import is_left_out, left_out
from ..network.foreign import foreign_parts, refuse_shared, stand_alone
from ..network.model import Step1XEditModel
from ..status import show_status
from .few_steps import few_steps, model_version, reads_negative

log = logging.getLogger(__name__)

HOOKS = "sampler_pre_cfg_function"
CFG1_KEY = "step1x_cfg1"
COND_BATCH = "sampler_calc_cond_batch_function"
INTERVAL_NODE = "Step1X-Edit Speed (guided part)"
SAMPLERS = comfy.samplers.SAMPLER_NAMES


def check_model(model) -> None:
    """Raise Step1XError unless this is a Step1X-Edit model."""
    network = getattr(model, "model", model)
    if not isinstance(network, Step1XEditModel):
        raise Step1XError(
            f"Expected a Step1X-Edit model, but found {type(network).__name__}. Connect the model from 'Load "
            "Step1X-Edit Model'."
        )


@dataclass(frozen=True)
class Cfg1Saving:
    """Wrapper of the guided prediction: at CFG 1, skips the unconditional pass in the steps in which the limiter is
    inactive.

    Those steps are bit-identical to the host's own at CFG 1. If another hook is set, which may need that pass, the
    model's options decide.
    """

    limiter: NormLimiter

    def __call__(self, executor, x, timestep, model_options={}, seed=None) -> Tensor:
        cfg = getattr(executor.class_obj, "cfg", None)
        alone = [type(hook) for hook in model_options.get(HOOKS, [])] == [NormLimiter] and not has_cfg_functions(
            model_options
        )
        if alone and isinstance(cfg, (int, float)) and math.isclose(cfg, 1.0):
            if not self.limiter.active(timestep).any():
                model_options = model_options | {"disable_cfg1_optimization": False}
        return executor(x, timestep, model_options, seed)


def has_cfg_functions(model_options: dict) -> bool:
    return "sampler_post_cfg_function" in model_options or "sampler_cfg_function" in model_options


def set_norm_limiter(model, limiter: NormLimiter):
    """Return a clone of the model with this norm limiter as a pre-CFG hook, in place of any earlier one.

    At CFG 1 the unconditional pass still runs in the steps in which the limiter is active, because in v1.0 and v1.1 it
    shapes the early steps. A LoRA that was distilled for CFG 1 was trained without that pass.
    """
    model = model.clone()
    options = model.model_options
    options[HOOKS] = [hook for hook in options.get(HOOKS, []) if not isinstance(hook, NormLimiter)]
    if not (options[HOOKS] or has_cfg_functions(options)):
        # Set by an earlier limiter; no other hook requires it.
        options.pop("disable_cfg1_optimization", None)
    distilled = few_steps(model) is not None and math.isclose(few_steps(model).cfg, 1.0)
    shapes_cfg1 = limiter.truncate < 1 and model_version(model).uncond_at_cfg1 and not distilled
    model.set_model_sampler_pre_cfg_function(limiter, disable_cfg1_optimization=shapes_cfg1)
    model.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, CFG1_KEY)
    if shapes_cfg1:
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, CFG1_KEY, Cfg1Saving(limiter))
    return model


def norm_limiter(model) -> NormLimiter | None:
    """Return the model's norm limiter, if it has one."""
    return next((hook for hook in model.model_options.get(HOOKS, []) if isinstance(hook, NormLimiter)), None)


def official_limiter(model) -> NormLimiter:
    """Return the norm limiter of the official code for the model's version."""
    return NormLimiter(model_version(model).guidance_truncate)


def with_norm_limiter(model):
    """Return the model if it has a norm limiter, else a clone with its version's. A model from a stock loader has
    none."""
    return model if norm_limiter(model) is not None else set_norm_limiter(model, official_limiter(model))


@dataclass(frozen=True)
class GuidanceInterval:
    """Replacement of the host's `calc_cond_batch`: outside the interval only the conditional pass runs and is used for
    both, which is CFG 1.

    start, end: fractions of the schedule, 0 <= start <= end <= 1, counted in steps. other: the function it replaces, or
    None.
    """

    start: float
    end: float
    other: Callable | None

    def __call__(self, args: dict) -> list[Tensor]:
        """Return the denoised latents [B, C, H, W] of the conditional and the unconditional pass. args: the host's
        arguments."""
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"]
        done = int((sigmas > args["sigma"].max()).sum()) / (len(sigmas) - 1)
        guided = self.start <= done < self.end or len(args["conds"]) < 2
        args = args | {"model_options": self.guarded(args["model"].diffusion_model, args["model_options"])}
        if not guided:
            args = args | {"conds": [args["conds"][0], *(None for _ in args["conds"][1:])]}
        out = (
            self.other(args)
            if self.other
            else comfy.samplers.calc_cond_batch(
                args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
            )
        )
        # Separate tensors, because the host may modify one in place.
        return out if guided else [out[0], *(out[0].clone() for _ in out[1:])]

    def guarded(self, transformer, model_options: dict) -> dict:
        """Return options that refuse a call which runs another pack's cache; it stores the results of two prompts and
        adds them to one.

        Functions that replace parts of the transformer permanently, such as raylight's, store nothing. A compiled model
        is traced once, and not checked.
        """
        if "torch_compile_kwargs" in model_options:
            return model_options
        lasting, wrapper = foreign_parts(transformer), model_options.get("model_function_wrapper")
        model_options = stand_alone(model_options, INTERVAL_NODE, lasting)
        if wrapper is not None:
            def watched(apply_model, params):
                def apply(*args, **kwargs):
                    refuse_shared(INTERVAL_NODE, foreign_parts(transformer) - lasting)
                    return apply_model(*args, **kwargs)
                return wrapper(apply, params)
            model_options["model_function_wrapper"] = watched
        return model_options


def set_guidance_interval(model, start: float, end: float):
    """Return a clone of the model that applies guidance only in this part of the steps, in place of an earlier
    interval.

    Raises Step1XError if start is greater than end.
    """
    if start > end:
        raise Step1XError(
            f"Guidance starts at {start:g} of the steps and ends at {end:g}; start must not exceed end. Lower "
            "start_percent or raise end_percent."
        )
    model = model.clone()
    other = model.model_options.get(COND_BATCH)
    model.set_model_sampler_calc_cond_batch_function(
        GuidanceInterval(start, end, other.other if isinstance(other, GuidanceInterval) else other)
    )
    return model


def renew_norm_limiter(model):
    """Return a clone whose norm limiter follows the model's present settings; the model itself if it has none."""
    limiter = norm_limiter(model)
    return model if limiter is None else set_norm_limiter(model, limiter)


def show_settings(model, steps: int, cfg: float | None = None) -> None:
    """Tell in the log and on the running node which steps and CFG are used; 0 stands for the default of the version or
    of a few-step LoRA, None leaves CFG out."""
    text = describe_settings(model.model.diffusion_model.version, steps, cfg, few_steps(model))
    log.info("Step1X-Edit samples with %s", text)
    show_status(text)


def flow_sigmas(steps: int, latent: Tensor, denoise: float = 1.0) -> Tensor:
    """Return the official schedule for a latent [B, C, h, w]: [remaining steps + 1] sigmas in float32."""
    sigmas = sigma_schedule(steps, latent_tokens(*latent.shape[-2:]))
    return sigmas[image_to_image_start(steps, denoise):]


def model_sigmas(model, steps: int, latent: Tensor, denoise: float = 1.0) -> Tensor:
    """Return the schedule of this many steps for a latent [B, C, h, w]: [remaining steps + 1] sigmas in float32.

    A few-step LoRA may have its own for the steps that it was distilled for; otherwise it is the official one.
    """
    settings = few_steps(model)
    if settings is None or settings.schedule is None or settings.steps != steps:
        return flow_sigmas(steps, latent, denoise)
    return torch.tensor(settings.schedule, dtype=torch.float32)[image_to_image_start(steps, denoise):]


def fit_latent(model, latent: dict) -> dict:
    """Return a copy of the latent dict with samples [B, C, h, w] for this model. An empty latent of another layout is
    adapted, as the host's samplers do.

    Raises Step1XError for any other latent of another model, for an empty batch, and for NaN or Inf values.
    """
    samples = latent_samples(latent)
    out = latent.copy()
    # The host's other factor applies to latents with a time axis, which are refused below.
    out["samples"] = samples = comfy.sample.fix_empty_latent_channels(
        model, samples, out.pop("downscale_ratio_spacial", None)
    )
    check_latent_shape(samples, model.model.latent_channels)
    check_finite(samples, BAD_LATENT)
    return out


def check_references(model, positive: list, negative: list, cfg: float) -> None:
    """Raise Step1XError if one prompt has a reference image and another has none; their difference, which guidance
    amplifies, would not be an edit.

    At CFG 1 the negative prompt is not checked, unless the model's options require it.
    """
    if not reads_negative(model, cfg):
        return
    width = model.model.diffusion_model.connector.S.c_embedder.linear_1.in_features
    if any(entry[0].shape[-1] != width for entry in (*positive, *negative)):
        return  # of another model: `extra_conds` reports it
    lacking = [
        name
        for name, prompts in (("positive", positive), ("negative", negative))
        if not all(entry[1].get("reference_latents") for entry in prompts)
    ]
    if lacking and any(entry[1].get("reference_latents") for entry in (*positive, *negative)):
        raise Step1XError(
            f"Input '{lacking[0]}' has no reference image, but another prompt of this edit has one; the result would "
            "be a dark or wrong image. Connect both prompts of 'Step1X-Edit Encode', or add 'ReferenceLatent' to each; "
            "for text to image, use neither. A node that encodes its own prompt, such as a detailer's wildcard, omits "
            "the reference."
        )


def copied(value):
    """Copy the tensors of a conditioning, including those in lists and dicts; anything else is returned unchanged."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def sample(
    model,
    positive,
    negative,
    latent: dict,
    sigmas: Tensor,
    cfg: float,
    seed: int,
    sampler_name: str = "euler",
    callback=None,
) -> dict:
    """Denoise a latent dict with the host's sampler; returns a new latent dict.

    Noise is drawn on the CPU from `seed`. With fewer than two sigmas nothing is run and the latent is returned
    unchanged. negative: None if this sampling does not read it (`reads_negative`).
    callback: the host's step callback `(step, denoised, x, total_steps)`; by default progress bar and live preview.

    Raises Step1XError for a latent or a conditioning of another model, and if the result contains NaN or Inf.
    """
    check_conditioning(positive, "positive")
    if negative is None and not reads_negative(model, cfg):
        negative = left_out(positive)
    check_conditioning(negative, "negative")
    check_references(model, positive, negative, cfg)
    out = fit_latent(model, latent)
    samples, mask = out["samples"], latent.get("noise_mask")
    if mask is not None and (0 in mask.shape or not torch.isfinite(mask).all()):
        raise Step1XError(
            f"The noise mask of the latent, of shape {list(mask.shape)}, is empty or contains NaN or Inf values. Check "
            "the mask of 'Set Latent Noise Mask'."
        )
    if sigmas.shape[0] < 2:
        return out
    if callback is None:
        callback = latent_preview.prepare_callback(model, sigmas.shape[0] - 1)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    # Copies of tensors that other nodes share, because a host may write into them. What no pass reads needs none.
    positive = copied(positive)
    negative = left_out(positive) if is_left_out(negative) else copied(negative)
    out["samples"] = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object(sampler_name),
        sigmas.clone(),
        positive,
        negative,
        samples.clone(),
        noise_mask=None if mask is None else mask.clone(),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    check_finite(
        out["samples"],
        "Sampling returned NaN or Inf values, which would be a black image. The file of the model or of a LoRA may be "
        "damaged, or CFG or LoRA strength may be too high, or float16 may overflow. Try without these, or download the "
        "file again.",
    )
    return out
