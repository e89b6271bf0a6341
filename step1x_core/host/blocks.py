"""FLUX blocks with fewer passes over memory: the host's weights and arithmetic, results written in place, fused kernels where there are any (docs/performance.md)."""

import functools
import logging

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, ModulationOut, QKNorm, SingleStreamBlock
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_management import cast_to_device
from comfy.ops import cast_bias_weight, uncast_bias_weight
from comfy.quant_ops import QuantizedTensor, ck, get_layout_class
from torch import Tensor

log = logging.getLogger(__name__)

FP8_LAYOUT = "TensorCoreFP8E4M3Layout"


def plain_needed(pe: Tensor | None, transformer_options: dict, *modulation_dims) -> bool:
    """Whether the host's own forward is the one to run: it computes gradients, shows q, k and v to patches and is what torch.compile fuses itself."""
    patches = transformer_options.get("patches", {})
    return (not hasattr(ck, "rms_rope_") or pe is None or torch.compiler.is_compiling() or torch.is_grad_enabled()
            or any(dims is not None for dims in modulation_dims) or "attn1_patch" in patches or "attn1_output_patch" in patches)


@functools.cache
def kernels_on(device: torch.device):
    """The module of Triton kernels where they run on this device, else None: they take an NVIDIA card, Triton, and a C compiler to build them."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        from .. import kernels

        x = torch.zeros((1, 1, 16), device=device)
        kernels.add_gated(x, x.clone(), x)
    except Exception as error:
        log.warning("Triton builds no kernels here (%s); sampling goes on without them, a little slower.", error)
        return None
    return kernels


def fp8_input_scale(linear: torch.nn.Module, x: Tensor) -> Tensor | None:
    """float32 [] by which the host would divide this layer's input to multiply it as e4m3 on tensor cores; None for all other layers."""
    if (getattr(linear, "layout_type", None) != FP8_LAYOUT or linear._full_precision_mm or linear.weight_function or linear.bias_function
            or getattr(linear, "comfy_force_cast_weights", False) or getattr(linear, "pre_quant_scale", None) is not None or "forward" in vars(linear)):
        return None
    scale = getattr(linear, "input_scale", None)
    return torch.ones((), device=x.device) if scale is None else cast_to_device(scale, x.device, torch.float32)


def as_fp8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """e4m3 [N, C] with its scale as the input of a layer that computes in dtype."""
    return QuantizedTensor(data, FP8_LAYOUT, get_layout_class(FP8_LAYOUT).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(data.shape)))


def modulated(linear: torch.nn.Module, x: Tensor, mod: ModulationOut) -> Tensor:
    """linear of x [B, S, C] after a layer norm without weights, times 1 + mod.scale, plus mod.shift ([B, 1, C] each) -> [B, S, N]."""
    kernels = kernels_on(x.device)
    if kernels is None:
        return linear(ck.adaln(x, mod.scale, mod.shift, 1e-6))
    scale = fp8_input_scale(linear, x)
    out = kernels.modulate(x, mod.shift, mod.scale, scale)
    return linear(out) if scale is None else linear(as_fp8(out.flatten(0, 1), scale, x.dtype)).unflatten(0, x.shape[:2])


def projected(linear: torch.nn.Module, parts: list[tuple[Tensor, bool]]) -> Tensor:
    """linear of the parts joined along their last axis -> [B, S, N]. A part is x [B, S, C], whose rows may lie apart, and whether to apply GELU (tanh)."""
    x = parts[0][0]
    kernels = kernels_on(x.device)
    if kernels is None:
        return linear(torch.cat([torch.nn.functional.gelu(part, approximate="tanh") if gelu else part for part, gelu in parts], dim=-1))
    scale = fp8_input_scale(linear, x)
    joined = torch.empty((x.shape[0] * x.shape[1], sum(part.shape[-1] for part, _ in parts)), device=x.device, dtype=x.dtype if scale is None else kernels.FP8)
    start = 0
    for part, gelu in parts:
        kernels.copy_rows(part, joined[:, start:start + part.shape[-1]], scale, gelu)
        start += part.shape[-1]
    return linear(joined if scale is None else as_fp8(joined, scale, x.dtype)).unflatten(0, x.shape[:2])


def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> None:
    """x + update * gate, written into x."""
    kernels = kernels_on(x.device)
    if kernels is not None and x.is_contiguous():
        kernels.add_gated(x, update, gate)
    else:
        x.addcmul_(update, gate)


def norm_and_rotate(qkv: Tensor, norm: QKNorm, pe: Tensor) -> None:
    """RMS norm and rotary positions of the queries and keys in qkv [B, S, 3, H, D], in place. pe float32 [B or 1, 1, S, D / 2, 2, 2]."""
    q, k, _ = qkv.unbind(2)
    q_weight, _, q_stream = cast_bias_weight(norm.query_norm, q, offloadable=True)
    k_weight, _, k_stream = cast_bias_weight(norm.key_norm, k, offloadable=True)
    kernels = kernels_on(qkv.device)
    if kernels is not None:
        kernels.norm_and_rotate(qkv, q_weight, k_weight, pe)
    else:
        ck.rms_rope_(q, k, pe.transpose(1, 2), q_weight.detach(), k_weight.detach(), 1e-6)
    uncast_bias_weight(norm.query_norm, q_weight, None, q_stream)
    uncast_bias_weight(norm.key_norm, k_weight, None, k_stream)


def attend(qkv: Tensor, transformer_options: dict, mask: Tensor | None) -> Tensor:
    """Attention of qkv [B, S, 3, H, D] whose positions are applied -> [B, S, H * D]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=transformer_options)


class FusedDoubleStreamBlock(DoubleStreamBlock):
    """Same parameters and result as the host's block."""

    def forward(self, img, txt, vec, pe, attn_mask=None, modulation_dims_img=None, modulation_dims_txt=None, transformer_options={}):
        """img [B, S_img, C], txt [B, S_txt, C], vec [B, C], pe float32 [B, 1, S_txt + S_img, D / 2, 2, 2] -> img, txt, changed in place."""
        if plain_needed(pe, transformer_options, modulation_dims_img, modulation_dims_txt):
            return super().forward(img, txt, vec, pe, attn_mask, modulation_dims_img, modulation_dims_txt, transformer_options)
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        tokens = txt.shape[1]

        qkv = torch.cat((modulated(self.txt_attn.qkv, txt, txt_mod1), modulated(self.img_attn.qkv, img, img_mod1)), dim=1)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        norm_and_rotate(qkv[:, :tokens], self.txt_attn.norm, pe[:, :, :tokens])
        norm_and_rotate(qkv[:, tokens:], self.img_attn.norm, pe[:, :, tokens:])
        attn = attend(qkv, transformer_options, attn_mask)
        del qkv

        add_gated(img, projected(self.img_attn.proj, [(attn[:, tokens:], False)]), img_mod1.gate)
        add_gated(txt, projected(self.txt_attn.proj, [(attn[:, :tokens], False)]), txt_mod1.gate)
        del attn
        add_gated(img, projected(self.img_mlp[2], [(modulated(self.img_mlp[0], img, img_mod2), True)]), img_mod2.gate)
        add_gated(txt, projected(self.txt_mlp[2], [(modulated(self.txt_mlp[0], txt, txt_mod2), True)]), txt_mod2.gate)
        if txt.dtype == torch.float16:
            torch.nan_to_num_(txt, nan=0.0, posinf=65504, neginf=-65504)
        return img, txt


class FusedSingleStreamBlock(SingleStreamBlock):
    """Same parameters and result as the host's block."""

    def forward(self, x, vec, pe, attn_mask=None, modulation_dims=None, transformer_options={}):
        """x [B, S, C], vec [B, C], pe float32 [B, 1, S, D / 2, 2, 2] -> x, changed in place."""
        if plain_needed(pe, transformer_options, modulation_dims):
            return super().forward(x, vec, pe, attn_mask, modulation_dims, transformer_options)
        mod, _ = self.modulation(vec)
        qkv, mlp = modulated(self.linear1, x, mod).split([3 * self.hidden_size, self.mlp_hidden_dim], dim=-1)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        norm_and_rotate(qkv, self.norm, pe)
        attn = attend(qkv, transformer_options, attn_mask)
        add_gated(x, projected(self.linear2, [(attn, False), (mlp, True)]), mod.gate)
        if x.dtype == torch.float16:
            torch.nan_to_num_(x, nan=0.0, posinf=65504, neginf=-65504)
        return x
