"""What a quantised format makes of a matrix, and of the inputs that are multiplied with it: for measuring its error.

Only arithmetic of this pack and torch; the tests compare it with the host's.
"""

import torch
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def nibbles(data: Tensor) -> Tensor:
    """Unpack int8 [N, K / 2] into 4-bit codes 0 to 15, int64 [N, K]; the low halves first."""
    return torch.stack((data & 15, data >> 4 & 15), dim=2).flatten(1).long()


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return block scales [rows, columns] from the tiles of 128 rows and 4 columns that tensor cores read."""
    row, column = torch.arange(rows, device=scales.device)[:, None], torch.arange(columns, device=scales.device)[None]
    tile = row // 128 * (scales.shape[1] // 4) + column // 4
    return scales.flatten()[512 * tile + 16 * (row % 32) + 4 * (row // 32 % 4) + column % 4]


def restored(form: str, parts: dict[str, Tensor]) -> Tensor:
    """Return the float32 matrix [N, K] that the stored tensors of a format stand for."""
    from step1x_core.checkpoints.rotated_formats import rotated

    weight = parts["weight"]
    if form == "w4a4":
        return rotated((nibbles(weight) + 8) % 16 - 8.0) * parts["weight_scale"][:, None]
    if form == "w4a8":
        scales = parts["weight_s_rel"].float().repeat_interleave(16, dim=1)
        whole = (parts["weight_codebook"][nibbles(weight)] * scales).round().clamp(-127, 127)
        return rotated(whole) * parts["weight_s_channel"][:, None]
    if form == "mxfp8":
        powers = untiled(parts["weight_scale"], weight.shape[0], weight.shape[1] // 32).float() - 127
        return weight.float() * torch.exp2(powers).repeat_interleave(32, dim=1)
    if form == "nvfp4":
        scales = untiled(parts["weight_scale"].view(torch.uint8), weight.shape[0], weight.shape[1] // 8)
        codes = torch.stack((weight >> 4, weight & 15), dim=2).flatten(1).long()
        values = torch.tensor(FP4, device=weight.device)[codes]
        return values * scales.view(parts["weight_scale"].dtype).float().repeat_interleave(16, 1) * parts["weight_scale_2"]
    values = weight.float() * parts["weight_scale"]
    return rotated(values) if form == "int8_convrot" else values


def rounded_weight(form: str, weight: Tensor) -> Tensor:
    """Return what a format keeps of a matrix [N, K], as float32. fp8_rows and fp8_convrot: e4m3 with a scale for each
    row, without and with rotated columns, which no host has."""
    from step1x_core.checkpoints.formats import FORMATS
    from step1x_core.checkpoints.rotated_formats import rotated

    if form == "fp8_convrot":
        return rotated(rounded_weight("fp8_rows", rotated(weight)))
    if form == "fp8_rows":
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 448
        return (weight.float() / scale).to(torch.float8_e4m3fn).float() * scale
    return restored(form, FORMATS[form].quantise(weight))


def rounded_inputs(form: str, x: Tensor) -> Tensor:
    """Return what tensor cores are given of inputs [M, K] by a format, as float32."""
    from step1x_core.checkpoints.rotated_formats import rotated

    if form.endswith("_convrot") or form in ("w4a8", "w4a4"):
        plain = {"fp8_convrot": "fp8_rows", "w4a4": "int4"}.get(form, "int8")
        return rotated(rounded_inputs(plain, rotated(x)))
    x = x.float()
    if form in ("int8", "int4"):
        steps = 127 if form == "int8" else 7
        scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / steps
        return (x / scale).round() * scale
    # The host's scale for inputs of fp8 layers is 1; for rows it is the power of two that fits.
    scale = 1.0
    if form == "fp8_rows":
        scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 448)))
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
