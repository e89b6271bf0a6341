"""Chooses which of torch's attention kernels runs (docs/performance.md)."""

import inspect

import comfy.model_management
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..relied_on import ATTENTION, intact

CAN_SET_PRIORITY = "set_priority" in inspect.signature(sdpa_kernel).parameters
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def torch_attention_chosen() -> bool:
    """Return whether the host computes attention with torch's own function, i.e. none of the alternatives that it
    checks first is enabled.

    Its attention functions do not reveal this; its settings do.
    """
    others = (
        "sage_attention_enabled",
        "flash_attention_enabled",
        "comfy_kitchen_attention_enabled",
        "xformers_enabled",
    )
    management = comfy.model_management
    return management.pytorch_attention_enabled() and not any(
        getattr(management, name)() for name in others if hasattr(management, name)
    )


def cudnn_is_fastest(device: torch.device) -> bool:
    """Return True on data-centre GPUs from Hopper on, unless the user chose another attention than torch's. The host
    asks torch for flash attention first."""
    return (
        torch_attention_chosen()
        and CAN_SET_PRIORITY
        and intact(ATTENTION)
        and device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0), (10, 3))
    )


def cudnn_first(
    attention, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, skip_reshape=False, **kwargs
) -> Tensor:
    """Compute attention of q, k, v [B, H, S, D] with cuDNN; returns [B, S, H * D]. The host's override hook.

    Inputs that cuDNN does not support, or in another layout, are passed to `attention`.
    """
    if mask is not None or not skip_reshape:
        return attention(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **kwargs)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    elif torch.backends.cuda.can_use_cudnn_attention(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)):
        # Not through torch's priorities, which are global to the process: two threads of MultiGPU CFG Split would
        # change them for each other.
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    else:
        return attention(q, k, v, heads, skip_reshape=True, **kwargs)
    return out.transpose(1, 2).flatten(2)
