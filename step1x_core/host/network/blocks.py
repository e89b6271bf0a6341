"""FLUX blocks with fewer passes over memory: the host's weights and arithmetic, results written in place, fused kernels
if available (docs/performance.md)."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, ModulationOut, QKNorm, SingleStreamBlock
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_management import cast_to_device
from comfy.ops import cast_bias_weight, disable_weight_init, manual_cast, uncast_bias_weight
from comfy.quant_ops import QuantizedTensor, ck, get_layout_class
from torch import Tensor
from torch.nn import functional

from ...errors import Step1XError
from .turns import in_turn

log = logging.getLogger(__name__)

FP8_LAYOUT = "TensorCoreFP8E4M3Layout"
# Entry of transformer_options: (T, R), where the last of the T text tokens stands for R further identical ones.
REPEATED_TEXT = "step1x_repeated_text"
# Entry of transformer_options: how many image tokens, from the first on, are read after the last block; None for all
# tokens.
TOKENS_READ = "step1x_tokens_read"
# Entry of transformer_options: an attention function for e4m3 q, k and v, laid out as in `attend`, with an e4m3 result
# on the scale of v.
FP8_ATTENTION = "step1x_fp8_attention"
# Entry of transformer_options: whether the batch holds two prompts of the same images, one in each half, whose inputs
# of fp8 layers are rounded as pairs (network/pair_kernels.py).
PAIRED = "step1x_paired_prompts"


def plain_needed(transformer_options: dict) -> bool:
    """Return whether the host's own forward must run, without the shortcuts below. It computes gradients, passes q, k
    and v to patches, and is what torch.compile fuses itself."""
    patches = transformer_options.get("patches", {})
    return (not hasattr(ck, "rms_rope_") or torch.compiler.is_compiling() or torch.is_grad_enabled()
            or "attn1_patch" in patches or "attn1_output_patch" in patches)


@functools.cache
def kernels_on(device: torch.device):
    """Return the module of Triton kernels if they run on this device, else None. They need an NVIDIA GPU, Triton, and a
    C compiler to build them."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        from ...network import kernels

        x = torch.zeros((1, 1, 16), device=device)
        kernels.add_gated(x, x.clone(), x)
    except Exception as error:
        log.warning(
            "Triton cannot build kernels on this machine (%s); sampling continues without them, slightly slower.",
            error,
        )
        return None
    return kernels


@functools.cache
def pair_kernels_on(device: torch.device):
    """Return the module of Triton kernels for paired prompts if they run on this device, else None."""
    if kernels_on(device) is None:
        return None
    try:
        from ...network import pair_kernels

        pair_kernels.check_agreement(device)
    except Exception as error:
        log.warning("The kernels for paired prompts do not work here (%s); they are rounded apart.", error)
        return None
    return pair_kernels


@functools.cache
def one_on(device: torch.device) -> Tensor:
    """Return 1 as float32 [], created once for each device."""
    return torch.ones((), device=device)


def fp8_input_scale(linear: torch.nn.Module, x: Tensor) -> Tensor | None:
    """Return the scale, float32 [], by which the host would divide this layer's input to multiply it as e4m3 on tensor
    cores; None for all other layers."""
    if (
        getattr(linear, "layout_type", None) != FP8_LAYOUT
        or linear._full_precision_mm
        or linear.weight_function
        or linear.bias_function
        or getattr(linear, "comfy_force_cast_weights", False)
        or getattr(linear, "pre_quant_scale", None) is not None
        or "forward" in vars(linear)
    ):
        return None
    scale = getattr(linear, "input_scale", None)
    return one_on(x.device) if scale is None else cast_to_device(scale, x.device, torch.float32)


def is_ready(layer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the host's cast_bias_weight would return a layer's weight and bias unchanged; checking this is
    faster than calling it."""
    return (
        not layer.weight_function
        and not layer.bias_function
        and all(x is None or (x.device == device and x.dtype == dtype) for x in (layer.weight, layer.bias))
    )


def ready_weight_and_bias(layer: torch.nn.Module, device: torch.device, dtype: torch.dtype, **options) -> tuple:
    """Return weight and bias on the device in dtype, and what uncast_bias_weight needs back. options: more options of
    the host's cast_bias_weight."""
    if is_ready(layer, device, dtype):
        return layer.weight, layer.bias, None
    return cast_bias_weight(layer, device=device, dtype=dtype, bias_dtype=dtype, offloadable=True, **options)


class Paired(NamedTuple):
    """A product of paired inputs, x [B, S, N]: of the means in its first half, of half the differences in its second;
    and the layer's bias [N], which is not added yet."""

    x: Tensor
    bias: Tensor

    def part(self, columns: slice) -> "Paired":
        return Paired(self.x[..., columns], self.bias[columns])


def multiplied_as_fp8(layer: torch.nn.Module, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply a layer to e4m3 x [N, C] times scale []; returns [N, out] in dtype."""
    return fp8_product(layer, x, scale, dtype)[0]


def multiplied_pairs(layer: torch.nn.Module, x: Tensor, scale: Tensor, dtype: torch.dtype, batch: int) -> Paired:
    """Apply a layer to paired e4m3 x [B * S, C] times scale []; returns B products of S rows."""
    out, bias = fp8_product(layer, x, scale, dtype, add_bias=False)
    return Paired(out.unflatten(0, (batch, -1)), bias)


def fp8_product(
    layer: torch.nn.Module, x: Tensor, scale: Tensor, dtype: torch.dtype, add_bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Multiply e4m3 x [N, C] times scale [] by a layer's weight; returns [N, out] in dtype, and the layer's bias [out].

    The host requests float32 accumulation, for which Hopper leaves its tensor cores. Their own 14 bits are far more
    than the 4 bits of the summands.
    """
    weight, bias, stream = ready_weight_and_bias(layer, x.device, dtype, compute_dtype=dtype, want_requant=True)
    # An fp8 product has no bias in float32.
    if isinstance(weight, QuantizedTensor) and hasattr(functional, "scaled_mm") and dtype != torch.float32:
        kind = functional.ScalingType.TensorWise
        out = functional.scaled_mm(
            x,
            weight._qdata.t(),
            scale,
            kind,
            weight._params.scale,
            kind,
            bias=bias if add_bias else None,
            output_dtype=dtype,
            use_fast_accum=True,
        )
    else:
        params = get_layout_class(FP8_LAYOUT).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(x.shape))
        out = functional.linear(QuantizedTensor(x, FP8_LAYOUT, params), weight, bias if add_bias else None)
    # A streamed bias lies in a buffer that the next layer may take.
    kept = bias if stream is None or add_bias else bias.clone()
    uncast_bias_weight(layer, weight, bias, stream)
    return out, kept


def pairs_prompts(layers: list[torch.nn.Module], x: Tensor, transformer_options: dict) -> bool:
    """Return whether the inputs x [B, S, C] of all these layers are rounded as pairs: if both prompts are in the batch,
    and kernels and fp8 tensor cores compute them."""
    return (
        bool(transformer_options.get(PAIRED))
        and x.shape[0] % 2 == 0
        and pair_kernels_on(x.device) is not None
        and all(layer.bias is not None and fp8_input_scale(layer, x) is not None for layer in layers)
    )


def is_plain(layer: torch.nn.Module) -> bool:
    """Return whether a layer is one of the host's that multiplies by its weight unchanged, so that parts of the weight
    can be multiplied separately."""
    return (
        type(layer) in (disable_weight_init.Linear, manual_cast.Linear)
        and layer.bias is not None
        and "forward" not in vars(layer)
    )


@contextmanager
def weight_and_bias(layer: torch.nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weight [N, C] and bias [N] of a plain layer, on the device and in the dtype of x, with its LoRAs
    applied."""
    weight, bias, stream = ready_weight_and_bias(layer, x.device, x.dtype)
    yield weight, bias
    uncast_bias_weight(layer, weight, bias, stream)


def gelu_of_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer and GELU (tanh) to x [B, S, C]; returns [B, S, N]. One kernel on a GPU."""
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(0, x.shape[:2])


def modulated(layer: torch.nn.Module, x: Tensor, mod: ModulationOut, paired: bool = False) -> Tensor | Paired:
    """Apply a layer norm without weights to x [B, S, C], multiply by 1 + mod.scale, add mod.shift ([B, 1, C] each),
    then apply the layer; returns [B, S, N]. paired: as `pairs_prompts` says for the layer."""
    kernels = kernels_on(x.device)
    if kernels is None:
        return layer(ck.adaln(x, mod.scale, mod.shift, 1e-6))
    scale = fp8_input_scale(layer, x)
    if paired:
        pairs = pair_kernels_on(x.device).modulate(x, mod.shift, mod.scale, scale)
        return multiplied_pairs(layer, pairs.flatten(0, 1), scale, x.dtype, x.shape[0])
    out = kernels.modulate(x, mod.shift, mod.scale, scale)
    return (
        layer(out)
        if scale is None
        else multiplied_as_fp8(layer, out.flatten(0, 1), scale, x.dtype).unflatten(0, x.shape[:2])
    )


class Part(NamedTuple):
    """Part of a layer's input: x [B, S, C], whose rows may be strided, times scale [], through GELU (tanh) if
    requested. bias [C]: x is the product of a Paired."""

    x: Tensor
    scale: Tensor | None = None
    gelu: bool = False
    bias: Tensor | None = None


def paired_projection(layer: torch.nn.Module, parts: list[Part], dtype: torch.dtype) -> Paired:
    """As `projected`, with the inputs rounded as pairs."""
    x, start = parts[0].x, 0
    scale = fp8_input_scale(layer, x)
    columns = sum(part.x.shape[-1] for part in parts)
    joined = torch.empty((x.shape[0] * x.shape[1], columns), device=x.device, dtype=kernels_on(x.device).FP8)
    for part in parts:
        out = joined[:, start:start + part.x.shape[-1]]
        pair_kernels_on(x.device).copy_rows(part.x, out, scale, part.bias, part.scale, part.gelu)
        start += part.x.shape[-1]
    return multiplied_pairs(layer, joined, scale, dtype, x.shape[0])


def projected(
    layer: torch.nn.Module, parts: list[Part], dtype: torch.dtype, paired: bool = False
) -> Tensor | Paired:
    """Apply a layer to the parts concatenated along their last axis; returns [B, S, N] in dtype. paired: as
    `pairs_prompts` says for the layer."""
    if paired:
        return paired_projection(layer, parts, dtype)
    x = parts[0].x
    kernels = kernels_on(x.device)
    if kernels is None:
        return layer(
            torch.cat([functional.gelu(part.x, approximate="tanh") if part.gelu else part.x for part in parts], dim=-1)
        )
    scale = fp8_input_scale(layer, x)
    if scale is not None and len(parts) == 1 and x.dtype == kernels.FP8:
        # The fp8 attention's result is used on its own scale, without rounding it again.
        return multiplied_as_fp8(layer, x.flatten(0, 1), parts[0].scale, dtype).unflatten(0, x.shape[:2])
    joined = torch.empty(
        (x.shape[0] * x.shape[1], sum(part.x.shape[-1] for part in parts)),
        device=x.device,
        dtype=dtype if scale is None else kernels.FP8,
    )
    start = 0
    for part in parts:
        kernels.copy_rows(part.x, joined[:, start:start + part.x.shape[-1]], part.scale, scale, part.gelu)
        start += part.x.shape[-1]
    return (layer(joined) if scale is None else multiplied_as_fp8(layer, joined, scale, dtype)).unflatten(
        0, x.shape[:2]
    )


def mlp_of_modulated(
    mlp: torch.nn.Sequential, x: Tensor, mod: ModulationOut, paired: bool = False
) -> Tensor | Paired:
    """Apply linear, GELU (tanh), linear to the modulated x [B, S, C]; returns [B, S, C]. paired: as `pairs_prompts`
    says for both layers."""
    kernels = kernels_on(x.device)
    if paired:
        hidden = modulated(mlp[0], x, mod, paired)
        return projected(mlp[2], [Part(hidden.x, gelu=True, bias=hidden.bias)], x.dtype, paired)
    if kernels is None or not is_plain(mlp[0]):
        return projected(mlp[2], [Part(modulated(mlp[0], x, mod), gelu=True)], x.dtype)
    normed = kernels.modulate(x, mod.shift, mod.scale)
    with weight_and_bias(mlp[0], normed) as (weight, bias):
        hidden = gelu_of_linear(normed, weight, bias)
    del normed
    return mlp[2](hidden)


def add_gated(x: Tensor, update: Tensor | Paired, gate: Tensor) -> None:
    """Add update * gate to x in place."""
    kernels = kernels_on(x.device)
    if isinstance(update, Paired):
        pair_kernels_on(x.device).add_gated(x, update.x, update.bias, gate)
    elif kernels is not None and x.is_contiguous():
        kernels.add_gated(x, update, gate)
    else:
        x.addcmul_(update, gate)


def with_repeats(x: Tensor, dim: int, text: int, repeats: int) -> Tensor:
    """Repeat entry text - 1 of an axis `repeats` more times, directly after itself."""
    return torch.cat(
        (x.narrow(dim, 0, text), *[x.narrow(dim, text - 1, 1)] * repeats, x.narrow(dim, text, x.shape[dim] - text)), dim
    )


def queries_keys_values(
    streams: list[tuple[Tensor | Paired, QKNorm]], heads: int, pe: Tensor, transformer_options: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Split projections [B, S_i, 3 * H * D] into q [B, S, H, D] and k, v [B, S + R, H, D], with norms and rotary
    positions applied. They may share the projections' memory.

    pe: float32 [B or 1, 1, S, D / 2, 2, 2]. Key and value of the last text token are repeated in place for each of the
    R identical tokens.
    For attention in e4m3 the outputs are e4m3, and the values are divided by a power of two [] that fits the largest
    into its range. It is returned last; None otherwise.
    """
    text, repeats = transformer_options.get(REPEATED_TEXT, (0, 0))
    kernels = kernels_on(pe.device)
    biases = [projection.bias if isinstance(projection, Paired) else None for projection, _ in streams]
    streams = [(projection.x if isinstance(projection, Paired) else projection, norm) for projection, norm in streams]
    dtype = streams[0][0].dtype if FP8_ATTENTION not in transformer_options else kernels.FP8
    v_scale = None
    paired = biases[0] is not None
    in_place = kernels is None or (
        not paired and len(streams) == 1 and not repeats and dtype == streams[0][0].dtype
    )
    if in_place:
        qkv = torch.cat([projection for projection, _ in streams], dim=1) if len(streams) > 1 else streams[0][0]
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    else:
        batch, _, width = streams[0][0].shape
        q = torch.empty((batch, pe.shape[2], heads, width // heads // 3), dtype=dtype, device=pe.device)
        k, v = (q.new_empty((batch, pe.shape[2] + repeats, *q.shape[2:])) for _ in range(2))
        if FP8_ATTENTION in transformer_options:
            values = [projection[..., 2 * width // 3:] for projection, _ in streams]
            values += [bias[None, None, 2 * width // 3:] for bias in biases if paired]
            # A paired value is the sum of three: 4 is the next power of two.
            v_scale = kernels.fp8_scale(values) * (4 if paired else 1)
    start = 0
    for number, (projection, norm) in enumerate(streams):
        end = start + projection.shape[1]
        q_weight, _, q_stream = ready_weight_and_bias(norm.query_norm, projection.device, projection.dtype)
        k_weight, _, k_stream = ready_weight_and_bias(norm.key_norm, projection.device, projection.dtype)
        if kernels is None:
            ck.rms_rope_(
                q[:, start:end],
                k[:, start:end],
                pe[:, :, start:end].transpose(1, 2),
                q_weight.detach(),
                k_weight.detach(),
                1e-6,
            )
        else:
            # The first stream starts with the text; the repeats follow it directly.
            own, before = ((0, 0), repeats) if number else ((text, repeats), 0)
            places = slice(start + before, end + repeats)
            rotate = (
                functools.partial(pair_kernels_on(pe.device).norm_and_rotate, bias=biases[number])
                if paired
                else kernels.norm_and_rotate
            )
            rotate(
                projection.unflatten(-1, (3, heads, -1)),
                q_weight=q_weight,
                k_weight=k_weight,
                pe=pe[:, :, start:end],
                q=q[:, start:end],
                k=k[:, places],
                v=None if in_place else v[:, places],
                v_scale=v_scale,
                text=own[0],
                repeats=own[1],
            )
        uncast_bias_weight(norm.query_norm, q_weight, None, q_stream)
        uncast_bias_weight(norm.key_norm, k_weight, None, k_stream)
        start = end
    if kernels is None and repeats:
        k, v = (with_repeats(x, 1, text, repeats) for x in (k, v))
    return q, k, v, v_scale


def attend(q: Tensor, k: Tensor, v: Tensor, transformer_options: dict, mask: Tensor | None) -> Tensor:
    """Compute attention of q [B, S, H, D], k and v [B, S + R, H, D]; returns [B, S, H * D]. mask: the host's for S
    keys."""
    if FP8_ATTENTION in transformer_options:
        if mask is not None:
            raise Step1XError(
                "The fp8 attention of 'Step1X-Edit Speed' cannot be combined with a node that masks the attention. "
                "Remove that node, or choose another mode with exact attention."
            )
        return transformer_options[FP8_ATTENTION](q, k, v)
    text, repeats = transformer_options.get(REPEATED_TEXT, (0, 0))
    if mask is not None and mask.shape[-1] > 1 and repeats:
        mask = with_repeats(mask, -1, text, repeats)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return optimized_attention(
        q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=transformer_options
    )


class FusedDoubleStreamBlock(DoubleStreamBlock):
    """The host's double block with fused operations; same parameters and result."""

    @in_turn
    def forward(
        self,
        img,
        txt,
        vec,
        pe,
        attn_mask=None,
        modulation_dims_img=None,
        modulation_dims_txt=None,
        transformer_options={},
    ):
        """Run on img [B, S_img, C], txt [B, S_txt, C], vec [B, C], pe float32 [B, 1, S_txt + S_img, D / 2, 2, 2];
        returns img and txt, changed in place."""
        if plain_needed(transformer_options) or modulation_dims_img is not None or modulation_dims_txt is not None:
            return super().forward(
                img, txt, vec, pe, attn_mask, modulation_dims_img, modulation_dims_txt, transformer_options
            )
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        tokens = txt.shape[1]

        paired = pairs_prompts(self.large_layers(), img, transformer_options)
        streams = [
            (modulated(self.txt_attn.qkv, txt, txt_mod1, paired), self.txt_attn.norm),
            (modulated(self.img_attn.qkv, img, img_mod1, paired), self.img_attn.norm),
        ]
        *qkv, scale = queries_keys_values(streams, self.num_heads, pe, transformer_options)
        del streams
        attn = attend(*qkv, transformer_options, attn_mask)
        del qkv

        for x, attention, mod, part in (
            (img, self.img_attn, img_mod1, attn[:, tokens:]),
            (txt, self.txt_attn, txt_mod1, attn[:, :tokens]),
        ):
            add_gated(x, projected(attention.proj, [Part(part, scale)], x.dtype, paired), mod.gate)
        del attn, part
        add_gated(img, mlp_of_modulated(self.img_mlp, img, img_mod2, paired), img_mod2.gate)
        add_gated(txt, mlp_of_modulated(self.txt_mlp, txt, txt_mod2, paired), txt_mod2.gate)
        if txt.dtype == torch.float16:
            torch.nan_to_num_(txt, nan=0.0, posinf=65504, neginf=-65504)
        return img, txt


    def large_layers(self) -> list[torch.nn.Module]:
        """Return the layers that are applied to every token."""
        layers = [self.img_attn.qkv, self.img_attn.proj, self.txt_attn.qkv, self.txt_attn.proj]
        return layers + [self.img_mlp[0], self.img_mlp[2], self.txt_mlp[0], self.txt_mlp[2]]


class FusedSingleStreamBlock(SingleStreamBlock):
    """The host's single block with fused operations; same parameters and result."""

    @in_turn
    def forward(self, x, vec, pe, attn_mask=None, modulation_dims=None, transformer_options={}):
        """Run on x [B, S, C], vec [B, C], pe float32 [B, 1, S, D / 2, 2, 2]; returns x, changed in place. The last
        block returns only the tokens that are read."""
        if plain_needed(transformer_options) or modulation_dims is not None:
            return super().forward(x, vec, pe, attn_mask, modulation_dims, transformer_options)
        mod, _ = self.modulation(vec)
        rows = self.rows_read(transformer_options)
        width = 3 * self.hidden_size
        kernels = kernels_on(x.device)
        split = kernels is not None and is_plain(self.linear1) and is_plain(self.linear2)
        paired = pairs_prompts([self.linear1, self.linear2], x, transformer_options)
        if paired:
            hidden = modulated(self.linear1, x, mod, paired)
            qkv, mlp = hidden.part(slice(width)), hidden.part(slice(width, None))
        elif split:
            normed = kernels.modulate(x, mod.shift, mod.scale)
            with weight_and_bias(self.linear1, normed) as (weight, bias):
                qkv = functional.linear(normed, weight[:width], bias[:width])
                mlp = gelu_of_linear(normed[:, rows], weight[width:], bias[width:])
            del normed
        else:
            qkv, mlp = modulated(self.linear1, x, mod).split([width, self.mlp_hidden_dim], dim=-1)
        q, k, v, scale = queries_keys_values([(qkv, self.norm)], self.num_heads, pe, transformer_options)
        del qkv
        attn = attend(
            q[:, rows],
            k,
            v,
            transformer_options,
            attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., rows, :],
        )
        del q, k, v
        if split:
            if scale is not None:
                rounded, attn = attn, torch.empty_like(attn, dtype=x.dtype)
                kernels.copy_rows(rounded, attn.flatten(0, 1), scale)
            with weight_and_bias(self.linear2, attn) as (weight, bias):
                update = torch.addmm(bias, attn.flatten(0, 1), weight[:, : self.hidden_size].t()).addmm_(
                    mlp.flatten(0, 1), weight[:, self.hidden_size :].t()
                )
            update = update.unflatten(0, attn.shape[:2])
        else:
            hidden = Part(mlp.x[:, rows], gelu=True, bias=mlp.bias) if paired else Part(mlp[:, rows], gelu=True)
            update = projected(self.linear2, [Part(attn, scale), hidden], x.dtype, paired)
        add_gated(x[:, rows], update, mod.gate)
        if x.dtype == torch.float16:
            torch.nan_to_num_(x, nan=0.0, posinf=65504, neginf=-65504)
        return x

    @staticmethod
    def rows_read(transformer_options: dict) -> slice:
        """Return the slice of tokens that are read after this block."""
        tokens = transformer_options.get(TOKENS_READ)
        if tokens is None or transformer_options["block_index"] + 1 < transformer_options["total_blocks"]:
            return slice(None)
        text = transformer_options["img_slice"][0]
        return slice(text, text + tokens)
