"""LoRA through the host's own machinery."""

import logging
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.utils
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..checkpoint import check_file, check_types, is_safetensors
from ..config import Step1XError
from ..keys import EMBEDDERS
from ..lora import diffsynth_names, official_alphas
from .loading import naming

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."
# What trainers put in front of a layer's name.
PREFIXES = ("transformer.", PREFIX, "base_model.model.", "")
# Layers that FLUX does not have; they are called the same everywhere.
OWN_LAYERS = (f"{PREFIX}connector.", f"{PREFIX}text_token_mapping")


def lora_keys(model) -> dict:
    """Map from LoRA module names to the model's weights.

    The host's own map, which the stock loader uses, knows kohya's names, the original ones after "diffusion_model.", and FLUX's in diffusers. Added are the
    names that Step1X-Edit alone has in diffusers, DiffSynth's, and every name after each prefix.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    config = model.model.model_config.unet_config
    renamed = EMBEDDERS | diffsynth_names(config["depth"], config["depth_single_blocks"])
    names = {name: f"{PREFIX}{module}.weight" for name, module in renamed.items()}
    for name, target in keys.items():
        if name.startswith(OWN_LAYERS) and target.endswith(".weight"):
            names[name.removeprefix(PREFIX)] = target
        elif name.startswith("transformer."):
            names[name.removeprefix("transformer.")] = target
    return keys | {prefix + name: target for name, target in names.items() for prefix in PREFIXES}


def load_lora_file(path) -> dict[str, Tensor]:
    """The tensors of a file, which the log names.

    Raises Step1XError for a damaged file, for anything but safetensors, and for tensors that are no weights; the host's exception when the run was cancelled.
    """
    path = Path(path)
    if not is_safetensors(path):
        raise Step1XError(f"{path.name} is not a safetensors file. Only safetensors files are loaded; get the LoRA in that format.")
    check_file(path)
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    comfy.model_management.throw_exception_if_processing_interrupted()
    check_types(path.name, lora, lora)
    log.info("Step1X-Edit LoRA from %s", path)
    return lora


def target_shape(layers: dict, key: str | tuple) -> tuple[int, ...] | None:
    """Shape of what a patch is added to: a linear layer's weight or bias, or the part (axis, start, length) of it that is second in a tuple. None for other layers.

    layers: all layers of the model by name.
    """
    name, part = key[:2] if isinstance(key, tuple) else (key, None)
    module, _, kind = name.rpartition(".")
    # The host's names include layers that only FLUX has.
    layer = layers.get(module)
    if not hasattr(layer, "in_features"):
        return None
    shape = [layer.out_features, layer.in_features][:1 if kind == "bias" else 2]
    if part is not None:
        shape[part[0]] = part[2]
    return tuple(shape)


def check_patches(model, patches: dict) -> None:
    """Raise Step1XError for plain LoRA matrices and differences of another shape than their layer: the host would go on without them, or fail while sampling."""
    layers = dict(model.model.named_modules())
    for key, patch in patches.items():
        shape = target_shape(layers, key)
        if isinstance(patch, LoRAAdapter):
            up, down, _, middle, magnitude, reshaped = patch.weights
            fits = middle is None and reshaped is None and min(up.ndim, down.ndim) > 1 and up[0].numel() == down.shape[0] > 0
            if fits and shape is not None:
                fits = shape == (up.shape[0], down[0].numel()) and (magnitude is None or magnitude.numel() in shape)
            found = f"{list(up.shape)} and {list(down.shape)}"
        elif isinstance(patch, tuple):
            fits, found = shape in (None, tuple(patch[1][0].shape)), list(patch[1][0].shape)
        else:
            continue
        if not fits:
            raise Step1XError(f"This LoRA does not fit the Step1X-Edit model: for {key if isinstance(key, str) else key[0]} it has {found} where the layer is {list(shape or [])}. "
                              "It was made for another model, or is damaged; choose another file.")


def apply_lora(model, lora: dict[str, Tensor], strength: float):
    """A clone of the model with the LoRA's patches, applied by the host when the weights are loaded or used.

    Raises Step1XError when no module of the LoRA is in the model, and for one that does not fit.
    """
    with naming("This LoRA"):
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(official_alphas(lora)), lora_keys(model))
    check_patches(model, patches)
    model = model.clone()
    if not model.add_patches(patches, strength):
        raise Step1XError("This LoRA fits no layer of the Step1X-Edit model; it was made for another model. Choose another file.")
    return model
