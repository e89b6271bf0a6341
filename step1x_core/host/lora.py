"""LoRA through the host's own machinery."""

from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.utils
from torch import Tensor

from ..checkpoint import check_file, is_safetensors
from ..config import Step1XError
from ..keys import EMBEDDERS
from ..lora import official_alphas

PREFIX = "diffusion_model."


def lora_keys(model) -> dict:
    """The host's map from LoRA module names, in every layout it knows, to the model's weights, and the diffusers names that FLUX does not have."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    connector = [name.removeprefix(PREFIX) for name in keys if name.startswith(PREFIX + "connector.")]
    for name, module in {**EMBEDDERS, **dict(zip(connector, connector))}.items():
        for prefix in ("transformer.", PREFIX, ""):
            keys[prefix + name] = f"{PREFIX}{module}.weight"
    return keys


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
