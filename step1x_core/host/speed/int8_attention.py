"""Attention with int8 queries and keys: the host's own, which `--use-ck-attention` chooses for all models, for one
model (ComfyUI 0.33.0 and newer, NVIDIA GPUs from the RTX 20 series on)."""

from comfy.ldm.modules import attention
from torch import Tensor

from ...errors import Step1XError

HOST_NAME = "comfy_kitchen_int8"


def attend_int8(exact, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """Compute attention of q, k, v [B, H, S, D] with the host's int8 kernel; returns [B, S, H * D]. The host's override
    hook. What is masked, the connector's few text tokens, goes to `exact`."""
    if mask is not None:
        return exact(q, k, v, heads, mask=mask, **kwargs)
    return attention.REGISTERED_ATTENTION_FUNCTIONS[HOST_NAME](q, k, v, heads, **kwargs)


def set_int8_attention(model):
    """Return a clone of a Step1X-Edit model whose blocks attend with int8 queries and keys. Raises Step1XError where
    the host has no such attention."""
    if HOST_NAME not in attention.REGISTERED_ATTENTION_FUNCTIONS:
        raise Step1XError(
            "The int8 attention of 'Step1X-Edit Speed' needs ComfyUI 0.33.0 or newer with its package comfy-kitchen, "
            "PyTorch for CUDA 13, and an NVIDIA GPU (RTX 20 series or newer). Update ComfyUI, or set attention to "
            "exact."
        )
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = attend_int8
    return model
