"""The formats of quantised layers that the converter and the loader can make, under the command's names."""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..rounding import multiple_up
from .plain_formats import FP8, FP8_MAX, INT8_MAX, quantise_fp8, quantise_int8, quantise_mxfp8, quantise_nvfp4
from .rotated_formats import group_size, quantise_int4_rotated, quantise_int8_rotated, quantise_w4a8

__all__ = ["FORMATS", "FP8", "FP8_MAX", "INT8_MAX", "Format", "fits", "is_packed", "marker"]


class Format(NamedTuple):
    """host: its name in ComfyUI. quantise: makes the stored tensors of a matrix [N, K], by the ends of their names.

    multiple: both sides of the matrix are multiples of it. rotated: whether groups of columns are rotated.
    rounds_inputs: whether ComfyUI rounds the layer's inputs even if told to compute in full precision.
    details: further entries of the marker.
    """

    host: str
    quantise: Callable[[Tensor], dict[str, Tensor]]
    multiple: int = 16
    rotated: bool = False
    rounds_inputs: bool = False
    details: dict = {}


# fp8 has one scale for each matrix, as the host supports no others.
FORMATS: dict[str, Format | None] = {
    "bf16": None,
    "fp8": Format("float8_e4m3fn", quantise_fp8),
    "mxfp8": Format("mxfp8", quantise_mxfp8, multiple=32),
    "int8": Format("int8_tensorwise", quantise_int8, rounds_inputs=True),
    "int8_convrot": Format(
        "int8_tensorwise", quantise_int8_rotated, rotated=True, rounds_inputs=True, details={"convrot": True}
    ),
    "w4a8": Format(
        "asym_w4a8_int8", quantise_w4a8, rotated=True, rounds_inputs=True, details={"group_size": 16}
    ),
    "w4a4": Format("convrot_w4a4", quantise_int4_rotated, multiple=64, rotated=True, rounds_inputs=True),
    "nvfp4": Format("nvfp4", quantise_nvfp4),
}


# ComfyUI's formats that pack two 4-bit values into an int8.
PACKED = ("asym_w4a8_int8", "convrot_w4a4")


def is_packed(key: str, tensor: Tensor, state_dict: dict[str, Tensor]) -> bool:
    """Return whether a weight holds two 4-bit values in a byte: a uint8 one, or int8 with the marker of a packed
    format. GGUF loaders also use uint8, but with a tensor class that reports the unpacked shape."""
    if not key.endswith(".weight") or type(tensor) is not Tensor or tensor.dtype not in (torch.uint8, torch.int8):
        return False
    mark = state_dict.get(key.removesuffix("weight") + "comfy_quant")
    packed = mark is not None and any(f'"{name}"' in bytes(mark.tolist()).decode("utf-8", "ignore") for name in PACKED)
    return tensor.dtype == torch.uint8 or packed


def fits(form: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape can be stored in a format."""
    return len(shape) == 2 and all(side % FORMATS[form].multiple == 0 for side in shape)


def marker(form: str, columns: int, full_precision: bool) -> Tensor:
    """Return the uint8 tensor that tells the host the format of a layer with so many columns.

    full_precision: the weight is dequantised before it is multiplied, and the input is not rounded.
    """
    known = FORMATS[form]
    entries = {"format": known.host, **known.details}
    if known.rotated:
        entries["convrot_groupsize"] = group_size(columns)
    if full_precision:
        entries["full_precision_matrix_mult"] = True
    text = json.dumps(entries)
    # Padded to whole words, so that the following data is aligned.
    return torch.tensor(list(text.ljust(multiple_up(len(text), 8)).encode()), dtype=torch.uint8)
