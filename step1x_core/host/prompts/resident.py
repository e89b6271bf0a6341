"""Holds the weights of the host's modules in place on the GPU while something reads them by address."""

from contextlib import contextmanager

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...reasoning.decode_kernels import FP8, Projection


class Loan:
    """Weights of modules, by module, at addresses that stay until `give_back`."""

    def __init__(self):
        self.weights: dict[torch.nn.Module, tuple[Tensor, Tensor | None]] = {}
        self.pinned = []

    def take(self, module: torch.nn.Module, device: torch.device) -> bool:
        """Whether the module's weights lie on the device, as they are used, and were taken.

        Not so where the host copies them for each use, or patches them in passing.
        """
        if any(getattr(module, f"{kind}_{name}", None) for kind in ("weight", "bias")
               for name in ("function", "lowvram_function")):
            return False
        weight, bias = module.weight, getattr(module, "bias", None)
        if hasattr(module, "_v") and weight.device != device:
            weight, bias, stream = comfy.ops.cast_bias_weight(
                module, dtype=weight.dtype, device=device, bias_dtype=None if bias is None else bias.dtype,
                offloadable=True,
            )
            self.pinned.append((module, weight, bias, stream))
            # The host names the device only for memory that it keeps for this module.
            if not stream[1]:
                return False
        self.weights[module] = weight, bias
        return weight.device == device and (bias is None or bias.device == device)

    def give_back(self) -> None:
        for entry in self.pinned:
            comfy.ops.uncast_bias_weight(*entry)
        self.weights, self.pinned = {}, []

    def projection(self, module: torch.nn.Module, dtype: torch.dtype) -> Projection | None:
        """The weights of a linear layer for kernels that compute in this dtype; None if they are stored otherwise or
        if somebody changed what the layer does."""
        if (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
                or getattr(module, "pre_quant_scale", None) is not None):
            return None
        weight, bias = self.weights[module]
        scale = None
        if isinstance(weight, QuantizedTensor):
            scale = getattr(weight._params, "scale", None)
            if weight._qdata.dtype != FP8 or not isinstance(scale, Tensor) or scale.numel() != 1:
                return None
            weight = weight._qdata
            scale = scale.float().reshape(())
        elif weight.dtype == FP8:
            scale = torch.ones((), device=weight.device)
        elif weight.dtype != dtype:
            return None
        part = Projection(weight, scale, None if bias is None else bias.to(dtype))
        return part if part.fits() else None


def lend(modules: list[torch.nn.Module], device: torch.device) -> Loan | None:
    """Take the weights of all modules, or None if not all of them are in place on the device."""
    loan = Loan()
    try:
        taken = all(loan.take(module, device) for module in modules)
    except BaseException:
        loan.give_back()
        raise
    if not taken:
        loan.give_back()
        return None
    return loan


@contextmanager
def converted(modules: list[torch.nn.Module], dtype: torch.dtype):
    """Within this context, the fp8 weights of linear layers lie there in dtype, for several inputs that each layer would
    convert them for. Nothing else changes: not the results, nor layers whose weights the host moves, patches in passing
    or multiplies as they are.
    """
    kept = []
    try:
        for module in modules:
            weight = module.weight
            quantised = isinstance(weight, QuantizedTensor)
            if (hasattr(module, "_v") or module.weight_function or not (quantised or weight.dtype == FP8)
                    or quantised and not (getattr(module, "_full_precision_mm", False)
                                          or getattr(module, "comfy_force_cast_weights", False))):
                continue
            # As the layer itself does for each input.
            plain, bias, stream = comfy.ops.cast_bias_weight(module, dtype=dtype, device=weight.device, bias_dtype=dtype,
                                                             offloadable=True, compute_dtype=dtype)
            comfy.ops.uncast_bias_weight(module, plain, bias, stream)
            kept.append((module, weight))
            module.weight = torch.nn.Parameter(plain.detach(), requires_grad=False)
        yield
    finally:
        for module, weight in kept:
            module.weight = weight
