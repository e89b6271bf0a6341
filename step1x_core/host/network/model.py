"""Step1X-Edit as one of the host's model families: detection, model class, registration."""

import functools
import logging

import comfy.conds
import comfy.model_base
import comfy.model_detection
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.hunyuan_video import llama_detect

from ...checkpoints.detection import CONFIG_KEY, CONNECTOR_KEY, config_tensor, detect_config, stored_config
from ...checkpoints.language_model import detect_mllm_config
from ...checkpoints.quantised import check_stock
from ...checks import check_latent_shape
from ...errors import Step1XError
from ...network.connector import distinct_tokens
from ...versions import LAYOUT_V11, LAYOUT_V12, VERSIONS
from ..left_out import LEFT_OUT, CONDLeftOut
from ..prompts.text_encoder import TEXT_ENCODER_NAME, Step1XTEModel, Step1XTokenizer
from .foreign import check_own_forward
from .transformer import Step1XTransformer, position_bits

log = logging.getLogger(__name__)


def check_sampling(model_sampling) -> None:
    """Raise Step1XError for times outside the flow's 0..1, and for predictions that are not read as the velocity from
    image to noise."""
    one = torch.ones(1)
    time = float(torch.as_tensor(model_sampling.timestep(one)).flatten()[0])
    # At noise level 1, the denoised value is 1 minus the prediction 0.25.
    denoised = float(model_sampling.calculate_denoised(one, torch.full((1, 1, 1, 1), 0.25), torch.ones(1, 1, 1, 1)))
    if abs(time - 1) > 1e-3 or abs(denoised - 0.75) > 1e-3:
        raise Step1XError(
            f"The model's sampling was changed to {type(model_sampling).__bases__[0].__name__} with times up to "
            f"{time:g}; Step1X-Edit expects a flow with times from 0 to 1 and would return only noise. Remove the "
            "ModelSampling node before the sampler ('ModelSamplingSD3', 'ModelSamplingDiscrete' or similar); "
            "'ModelSamplingFlux' works."
        )


def on_device(conditioning: dict) -> dict:
    """Return the conditioning's tensors on the sampling device, its entry "device". The host would copy them in every
    step and wait for the previous one."""
    device = conditioning["device"]
    out = {
        name: conditioning[name].to(device)
        for name in ("cross_attn", "attention_mask", "text_ids", "text_embeds", "text_mask")
        if conditioning.get(name) is not None
    }
    if conditioning.get("reference_latents"):
        out["reference_latents"] = [latent.to(device) for latent in conditioning["reference_latents"]]
    return out


class CONDTextTokens(comfy.conds.CONDConstant):
    """The number of distinct text tokens; a batch uses the largest."""

    def can_concat(self, other):
        return True

    def concat(self, others):
        return max(cond.cond for cond in (self, *others))


class Step1XEditModel(comfy.model_base.Flux):
    def __init__(self, model_config, device=None):
        super().__init__(model_config, device=device, unet_model=Step1XTransformer)

    @property
    def latent_channels(self) -> int:
        return self.model_config.unet_config["out_channels"]

    def encode_adm(self, **kwargs):
        # The pooled vector comes from the connector.
        return None

    def extra_conds(self, **kwargs):
        """Return the host's Flux conds without guidance, plus the text mask, or for v1.2 the text's positions and input
        embeddings. For a prompt that was left out, returns only what refuses a pass over it.

        Raises Step1XError if the conditioning is not from a Step1X-Edit text encoder of the model's layout or was
        concatenated, and as `check_inputs` does.
        """
        self.check_inputs(**kwargs)
        if kwargs.get(LEFT_OUT):
            return {LEFT_OUT: CONDLeftOut()}
        if kwargs.get("prompt_type") == "positive":
            if not kwargs.get("reference_latents") and not VERSIONS[self.diffusion_model.version].draws:
                log.warning(
                    "Step1X-Edit %s only edits images; it was not trained for text to image. Connect an image, or "
                    "use v1.1.",
                    self.diffusion_model.version,
                )
            version = self.diffusion_model.version
            if len(kwargs.get("reference_latents") or []) > 1 and not VERSIONS[version].reference_offset[0]:
                log.warning(
                    "Step1X-Edit %s gives all reference images the same positions and cannot tell them apart. Use one "
                    "image, or v1.1 or v1.2.",
                    version,
                )
            if kwargs.get("guidance") is not None:
                log.warning(
                    "FluxGuidance has no effect on Step1X-Edit, which has no distilled guidance. Use the sampler's CFG "
                    "instead."
                )
        kwargs |= on_device(kwargs)
        out = super().extra_conds(**kwargs)
        out.pop("guidance", None)
        context = kwargs.get("cross_attn", None)
        expected = self.diffusion_model.connector.S.c_embedder.linear_1.in_features
        if context is None or context.shape[-1] != expected:
            found = "none" if context is None else f"{context.shape[-1]} channels"
            raise Step1XError(
                f"This conditioning does not fit the Step1X-Edit model: it has {found}, expected {expected}. Encode "
                "the prompt with the text encoder from 'Load Step1X-Edit MLLM'."
            )
        mask = kwargs.get("attention_mask", None)
        if mask is not None:
            if mask.shape[1] != context.shape[1]:
                raise Step1XError(
                    f"This conditioning has {context.shape[1]} text tokens, but a mask of {mask.shape[1]}: "
                    "conditionings of Step1X-Edit cannot be concatenated. Write everything into one prompt."
                )
            out["text_mask"] = comfy.conds.CONDRegular(mask)
            if kwargs.get("text_ids") is None:
                out["text_tokens"] = CONDTextTokens(distinct_tokens(context, mask))
        return out | self.layout_conds(context, **kwargs)

    def check_inputs(
        self, noise, reference_latents=None, reference_latents_method=None, area=None, control=None, **kwargs
    ) -> None:
        """Raise Step1XError for latents of another model, and for settings of other nodes that the host would apply
        wrongly or ignore."""
        check_own_forward(self.diffusion_model)
        check_sampling(self.model_sampling)
        check_latent_shape(noise, self.latent_channels)
        references = reference_latents or []
        for latent in references:
            if latent.ndim != 4 or latent.shape[1] != self.latent_channels:
                raise Step1XError(
                    f"The reference latent has shape {list(latent.shape)}; Step1X-Edit needs [batch, "
                    f"{self.latent_channels}, height, width]. It belongs to another model. Encode the image with "
                    "'Step1X-Edit Encode', or with the FLUX VAE."
                )
        if reference_latents_method is not None:
            raise Step1XError(
                "'Edit Model Reference Method' (FluxKontextMultiReferenceLatentMethod) places reference images as in "
                "FLUX Kontext; Step1X-Edit places them itself. Remove that node."
            )
        if references and self.diffusion_model.params.default_ref_method != FluxParams.default_ref_method:
            raise Step1XError(
                "'Flux KV Cache' keeps the reference image of the first step, but Step1X-Edit recomputes it in every "
                "step. Remove that node; 'Step1X-Edit Speed' and 'EasyCache' make sampling faster."
            )
        if references and area is not None:
            raise Step1XError(
                "This conditioning is limited to an area, which would crop the image but not its reference. Use "
                "'Conditioning (Set Mask)' with set_cond_area set to default instead of 'Conditioning (Set Area)'."
            )
        if control is not None:
            raise Step1XError(
                "A ControlNet is applied to this conditioning, but none exists for Step1X-Edit; those of FLUX expect "
                "another text encoder. Remove 'Apply ControlNet'."
            )

    def layout_conds(self, context, text_ids=None, text_embeds=None, text_mask=None, **kwargs) -> dict:
        """Return the additional conds of the v1.2 layout; {} for the other one. Raises Step1XError for a conditioning
        of the other layout."""
        version = self.diffusion_model.version
        layout = VERSIONS[version].layout
        if (text_ids is not None) != layout.text_positions:
            raise Step1XError(
                f"The model was loaded as {version}, but the prompt was encoded for "
                f"{(LAYOUT_V11 if text_ids is None else LAYOUT_V12).owners}. Set the version of 'Load Step1X-Edit "
                f"MLLM' to {layout.name}, or correct the version of 'Load Step1X-Edit Model'."
            )
        if text_ids is None:
            return {}
        if text_ids.shape[1] != context.shape[1]:
            raise Step1XError(
                f"This conditioning has {context.shape[1]} text tokens, but ids for {text_ids.shape[1]}: conditionings "
                "of Step1X-Edit cannot be concatenated. Write everything into one prompt."
            )
        out = {"text_ids": comfy.conds.CONDRegular(position_bits(text_ids))}
        if self.diffusion_model.text_token_mapping is not None:
            out |= {
                "text_embeds": comfy.conds.CONDRegular(text_embeds),
                "quoted_mask": comfy.conds.CONDRegular(text_mask),
            }
        return out


class Step1XEdit(comfy.supported_models.Flux):
    """Model family entry. A Step1X-Edit file is a FLUX file plus a connector, so it must be checked before FLUX."""

    unet_config = {"image_model": "flux"}
    # Measured: 1.2 at 1024x1024, 1.5 at 512x512 (docs/performance.md); references count as much as the image.
    memory_usage_factor = 1.6

    @classmethod
    def matches(cls, unet_config, state_dict=None, unet_key_prefix=""):
        # Not through `required_keys`, because older hosts look those up without the prefix.
        return (
            super().matches(unet_config)
            and state_dict is not None
            and any(k.endswith(CONNECTOR_KEY) for k in state_dict)
        )

    def get_model(self, state_dict, prefix="", device=None):
        self.stored = stored_config(state_dict, prefix)
        config = detect_config(state_dict, prefix)
        self.unet_config.update(config.transformer_params())
        return Step1XEditModel(self, device=device)

    def process_unet_state_dict(self, state_dict):
        check_stock(state_dict, "Load Step1X-Edit Model")
        state_dict.pop(CONFIG_KEY, None)
        return super().process_unet_state_dict(state_dict)

    def process_clip_state_dict(self, state_dict):
        state_dict = super().process_clip_state_dict(state_dict)
        check_stock(state_dict, "Load Step1X-Edit MLLM")
        return state_dict

    def process_unet_state_dict_for_saving(self, state_dict):
        # What the file contained is passed on, but not a guessed version: v1.1 and a v1.2-preview can have the same
        # tensors.
        if self.stored:
            state_dict[CONFIG_KEY] = config_tensor(self.stored)
        return super().process_unet_state_dict_for_saving(state_dict)

    def clip_target(self, state_dict={}):
        prefix = f"{self.text_encoder_key_prefix[0]}{TEXT_ENCODER_NAME}.transformer."
        weights = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if not weights:
            return None
        # Unknown if the host loads only the text encoder; the transformer's tensors are still there then.
        version = (
            self.unet_config.get("version")
            or detect_config(state_dict, comfy.model_detection.unet_prefix_from_state_dict(state_dict)).version
        )
        tokenizer = functools.partial(Step1XTokenizer, layout=VERSIONS[version].layout)
        return ClipTarget(
            tokenizer, functools.partial(Step1XTEModel, config=detect_mllm_config(weights, {}), **llama_detect(weights))
        )


def register() -> None:
    """Put the family at the head of the host's list, once. A host with a family of this name keeps its own."""
    models = comfy.supported_models.models
    if not any(model.__name__ == Step1XEdit.__name__ for model in models):
        models.insert(0, Step1XEdit)
