"""LoRA through the host's own machinery."""

from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.utils
from torch import Tensor

from ..checkpoint import check_file, is_safetensors
from ..config import Step1XError
from ..keys import EMBEDDERS
from ..lora import diffsynth_names, official_alphas

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
    """Raises Step1XError for a damaged file and for anything but safetensors."""
    path = Path(path)
    if not is_safetensors(path):
        raise Step1XError(f"{path.name} is not a safetensors file. Only safetensors files are loaded; get the LoRA in that format.")
    check_file(path)
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def apply_lora(model, lora: dict[str, Tensor], strength: float):
    """A clone of the model with the LoRA's patches, applied by the host when the weights are loaded or used.

    Raises Step1XError when no module of the LoRA is in the model.
    """
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(official_alphas(lora)), lora_keys(model))
    model = model.clone()
    if not model.add_patches(patches, strength):
        raise Step1XError("This LoRA fits no layer of the Step1X-Edit model; it was made for another model. Choose another file.")
    return model
