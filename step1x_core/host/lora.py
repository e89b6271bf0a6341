"""LoRA through the host's own machinery."""


import comfy.lora
import comfy.lora_convert
import comfy.utils
from torch import Tensor

from ..checkpoint import check_file, find_checkpoint
from ..config import Step1XError
from ..lora import official_alphas


def lora_keys(model) -> dict:
    """The host's map from LoRA module names, in every layout it knows, to the model's weights."""
    return comfy.lora.model_lora_keys_unet(model.model, {})


def load_lora_file(path) -> dict[str, Tensor]:
    """Raises Step1XError for a damaged file and for anything but safetensors."""
    for file in find_checkpoint(path, "").files:
        check_file(file)
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
