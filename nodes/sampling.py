from comfy_api.latest import io

from ..step1x_core.checks import latent_samples
from ..step1x_core.errors import Step1XError
from ..step1x_core.host.sampling.few_steps import model_version, reads_negative, version_defaults
from ..step1x_core.host.sampling.sampler import (
    SAMPLERS,
    check_model,
    fit_latent,
    model_sigmas,
    sample,
    set_norm_limiter,
    show_settings,
    with_norm_limiter,
)
from ..step1x_core.sampling.guidance import NormLimiter
from ..step1x_core.versions import GUIDANCE_NORM_POWER
from .categories import EDIT_ALIASES, MAIN
from .widgets import cfg_input, check_widgets, seed_input, steps_input


class Step1XEditSampler(io.ComfyNode):
    """The official sampling in one node: resolution-dependent schedule, norm-limited guidance, Euler steps."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditSampler",
            display_name="Step1X-Edit Sampler",
            category=MAIN,
            description="Edits with the schedule and guidance of the official code. KSampler works as well; its "
                        "schedulers do not know the picture's size.",
            search_aliases=["step1x", *EDIT_ALIASES, "ksampler", "sampler", "edit sampler"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model from 'Load Step1X-Edit Model', with any LoRA or model patch."
                ),
                io.Conditioning.Input("positive", tooltip="The instruction."),
                io.Conditioning.Input(
                    "negative",
                    lazy=True,
                    tooltip="The negative prompt. Not computed where sampling does not read it: at "
                    "CFG 1 with a few-step LoRA or v1.2.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent from 'Step1X-Edit Encode', or an empty latent for text to image.",
                ),
                seed_input("The random seed: same seed and inputs, same picture."),
                steps_input(),
                cfg_input(),
                io.Combo.Input(
                    "sampler_name",
                    options=SAMPLERS,
                    default="euler",
                    advanced=True,
                    tooltip="The official code uses euler.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 only the last part of the schedule is run, starting from the picture itself: less "
                            "change. 0 returns the latent unchanged.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def check_lazy_status(cls, model, steps, cfg, negative=None, **inputs) -> list[str]:
        try:
            check_widgets(cls, steps=steps, cfg=cfg)
            check_model(model)
        except Step1XError:
            return []  # `execute` reports it
        return ["negative"] if negative is None and reads_negative(with_norm_limiter(model), cfg) else []

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, denoise) -> io.NodeOutput:
        check_widgets(cls, seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name, denoise=denoise)
        check_model(model)
        show_settings(model, steps, cfg)
        steps, cfg = version_defaults(model, steps, cfg)
        latent = fit_latent(model, latent_image)
        sigmas = model_sigmas(model, steps, latent["samples"], denoise)
        return io.NodeOutput(
            sample(with_norm_limiter(model), positive, negative, latent, sigmas, cfg, seed, sampler_name)
        )


class Step1XEditScheduler(io.ComfyNode):
    """The official schedule for 'SamplerCustomAdvanced'. The stock schedulers do not depend on the picture's size."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditScheduler",
            display_name="Step1X-Edit Scheduler",
            category=MAIN,
            description="Noise levels of the official code for a latent's size, for the custom samplers.",
            search_aliases=["sigmas", "flux shift", "scheduler"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will be sampled; its version decides the default number of steps."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent that will be sampled; its size decides the shift of the schedule.",
                ),
                steps_input(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The part of the schedule that is run, counted from its end.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, latent_image, steps, denoise) -> io.NodeOutput:
        check_widgets(cls, steps=steps, denoise=denoise)
        check_model(model)
        samples = latent_samples(latent_image)
        show_settings(model, steps)
        steps, _ = version_defaults(model, steps, 0.0)
        return io.NodeOutput(model_sigmas(model, steps, samples, denoise))


class Step1XEditGuidance(io.ComfyNode):
    """Norm-limited guidance as a pre-CFG hook; it combines with the other guidance nodes."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditGuidance",
            display_name="Step1X-Edit Guidance",
            category=MAIN,
            description="Sets the norm limiter of Step1X-Edit's guidance. 'Load Step1X-Edit Model' switches the "
                        "official one on; "
            "add this node to change it, or to give it to a model from the stock loader.",
            search_aliases=["cfg norm", "norm limiter", "process norm"],
            inputs=[
                io.Model.Input("model", tooltip="A Step1X-Edit model."),
                io.Float.Input(
                    "truncate",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Guidance is limited while the noise level is above this value. -1 takes the version's: "
                            "0.93, for v1.2 every step. "
                    "1 switches the limiter off, as the first official release had it; 0 limits every step.",
                ),
                io.Float.Input(
                    "power",
                    default=GUIDANCE_NORM_POWER,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Strong guidance of norm n is divided by n to this power.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, truncate, power) -> io.NodeOutput:
        check_widgets(cls, truncate=truncate, power=power)
        check_model(model)
        limit = model_version(model).guidance_truncate if truncate < 0 else truncate
        return io.NodeOutput(set_norm_limiter(model, NormLimiter(limit, power)))
