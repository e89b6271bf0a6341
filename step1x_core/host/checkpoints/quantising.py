"""Quantises a transformer while it is loaded, to the formats that this ComfyUI has."""

import comfy.model_management
import torch
from comfy.quant_ops import QUANT_ALGOS

from ...checkpoints.conversion import INSTEAD, MODEL_LAYERS, MODULATION_LAYERS, SCALES, converted, fitting
from ...checkpoints.formats import FORMATS, fits
from ...checkpoints.markers import MARKER
from ...errors import Step1XError

# Maximum number of float32 copies of a matrix while it is converted.
FLOATS_AT_A_TIME = 4
# What the loader offers, and the formats for it: the first that the host has is taken. Not w4a4: its error in the
# difference of the two prompts is larger than the difference (docs/conversion.md).
CHOICES = {"fp8": ("fp8",), "int8": ("int8_convrot",), "int4": ("w4a8",)}
# Formats of the modulation layers, which are unpacked for use; others stay as they are.
MODULATION = {"int4": "fp8"}


def available_format(choice: str) -> str:
    """Return the format for a name in CHOICES. Raises Step1XError if this ComfyUI has none of them."""
    for form in CHOICES[choice]:
        needed = (form, INSTEAD.get(form, form))
        if all(FORMATS[one].host in QUANT_ALGOS for one in needed):
            return form
    names = " or ".join(FORMATS[form].host for form in CHOICES[choice])
    raise Step1XError(
        f"Input 'weight_dtype' is {choice}, but this ComfyUI has no {names} layers. Update ComfyUI, or choose "
        "fp8_scaled."
    )


def quantised(state_dict: dict[str, torch.Tensor], choice: str) -> dict[str, torch.Tensor]:
    """Convert the large matrices of a bf16 or plain fp8 transformer to a format of the host. Weights that already have
    scales are returned unchanged.

    choice: a name in CHOICES. Raises Step1XError as `available_format` and `converted` do.
    """
    form = available_format(choice)
    if any(key.split(".")[-1] in SCALES for key in state_dict):
        return state_dict
    device = comfy.model_management.get_torch_device()
    # Frees memory for the float32 copies of one matrix at a time, which the host does not track.
    largest = max((tensor.numel() for name, tensor in state_dict.items() if MODEL_LAYERS.fullmatch(name)), default=0)
    comfy.model_management.free_memory(largest * FLOATS_AT_A_TIME * 4, device)
    out = {}
    for name, tensor in state_dict.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        one, unpacked = format_of(name, tensor, form, MODULATION.get(choice))
        if one:
            parts = converted(name, tensor.to(device), one, unpacked)
            # The host reads the marker as numpy, wherever the weights are.
            out |= {
                key: value if key.endswith(MARKER) else value.to(tensor.device) for key, value in parts.items()
            }
        else:
            out[name] = (
                tensor.to(torch.bfloat16) if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else tensor
            )
    return out


def format_of(name: str, tensor: torch.Tensor, form: str, modulation: str | None) -> tuple[str | None, bool]:
    """Return the format of a tensor, or None to leave it, and whether it is unpacked to be multiplied."""
    if MODEL_LAYERS.fullmatch(name):
        return fitting(form, tensor), False
    if modulation and MODULATION_LAYERS.fullmatch(name) and fits(modulation, tensor.shape):
        return modulation, True
    return None, False
