"""One step of the language model: one more token in each row of a fixed-size cache (docs/model.md, Text generation).

Both kinds of step take and give the same. They wait for nothing and keep all shapes, so they can be captured.
"""

import functools
import importlib.util
import logging

import torch
from comfy.text_encoders import llama
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...reasoning import decode_kernels as kernels
from ...reasoning.kv_cache import Cache
from .resident import Loan

log = logging.getLogger(__name__)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs) -> Tensor:
    """Attention [B, H, L, D] of tokens to themselves and those before, for the host's blocks; returns [B, L, H * D]."""
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2)


def masked_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of queries [N, heads, D] over places 0..lengths[row] of the cache [N, kv_heads, L, D]; returns
    [N, heads * D]."""
    rows, kv_heads, places, width = keys.shape
    # Heads that share a key stand where attention has tokens, so that no key is copied.
    mask = (torch.arange(places, device=q.device) <= lengths[:, None])[:, None, None]
    return scaled_dot_product_attention(q.view(rows, kv_heads, -1, width), keys, values, attn_mask=mask).flatten(1)


def hosts_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """`masked_attention` by the host's kernel for one token a row. It takes the whole cache."""
    import comfy_kitchen

    out = comfy_kitchen.flash_attention_decode(q[:, None], keys.transpose(1, 2), values.transpose(1, 2),
                                               (lengths + 1).int())
    return out.reshape(len(q), -1)


@functools.cache
def hosts_attention_agrees(device: torch.device, heads: int, kv_heads: int, width: int) -> bool:
    """Whether this host has that kernel and it computes what `masked_attention` does, on a small random cache in bf16.
    Hosts after 0.33 have it."""
    try:
        import comfy_kitchen

        if not comfy_kitchen.flash_attention_decode_is_available(device):
            return False
        random = torch.Generator().manual_seed(0)
        q, keys, values = (torch.randn(shape, generator=random).bfloat16().to(device)
                           for shape in ((2, heads, width), *[(2, 256, kv_heads, width)] * 2))
        lengths = torch.tensor([0, 150], device=device)
        call = q, keys.transpose(1, 2), values.transpose(1, 2), lengths
        return torch.allclose(hosts_attention(*call).float(), masked_attention(*call).float(), rtol=0.05, atol=0.05)
    except (ImportError, AttributeError):
        return False
    except Exception:  # whatever a changed host raises in there
        log.debug("Step1X-Edit: flash_attention_decode", exc_info=True)
        return False


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for this GPU; a failure is logged once."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        ones = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
        return bool((kernels.norm(ones, ones[0], 1e-6) == 1).all())
    except Exception as error:  # a missing C compiler, an unsupported GPU, a damaged installation
        log.debug("Step1X-Edit: Triton", exc_info=True)
        log.info("Step1X-Edit: Triton does not work here (%s), so text is written more slowly.", type(error).__name__)
        return False


class ModuleSteps:
    """The step through the host's modules, which bring weights to the device and convert them as they need to."""

    def __init__(self, model: llama.Llama2_, scores, dtype: torch.dtype):
        """scores: function from states [N, C] to scores [N, V]."""
        self.model, self.scores, self.dtype = model, scores, dtype
        self.heads = model.config.num_attention_heads

    def attention(self, cache: Cache):
        """The function that attends, and whether it must see the whole cache."""
        keys = cache.layers[0][0]
        if self.dtype == torch.bfloat16 and keys.device.type == "cuda" \
                and hosts_attention_agrees(keys.device, self.heads, keys.shape[1], keys.shape[3]):
            return hosts_attention, True
        return masked_attention, False

    def __call__(self, tokens: Tensor, cache: Cache, used: int | None = None) -> Tensor:
        """Process tokens [N], written to place cache.lengths of each row; returns states [N, C].

        used: places of the cache that can hold tokens, this one included; None for all.
        """
        config = self.model.config
        attend, whole = self.attention(cache)
        used = None if whole else used
        x = self.model.embed_tokens(tokens[:, None], out_dtype=self.dtype)
        rows = len(tokens)
        # A text token has the same position on all three axes.
        freqs = llama.precompute_freqs_cis(config.head_dim, cache.positions[:, None], config.rope_theta,
                                           config.rope_scale, None, device=x.device)
        place = cache.lengths[:, None, None, None]
        for layer, (keys, values) in zip(self.model.layers, cache.layers):
            own, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (part(normed).view(rows, 1, -1, config.head_dim).transpose(1, 2)
                       for part in (own.q_proj, own.k_proj, own.v_proj))
            q, k = llama.apply_rope(q, k, freqs)
            keys.scatter_(2, place.expand_as(k), k)
            values.scatter_(2, place.expand_as(v), v)
            x = x + own.o_proj(attend(q[:, :, 0], keys[:, :, :used], values[:, :, :used], cache.lengths)[:, None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.norm(x)[:, 0]


class KernelSteps:
    """The step on the pack's kernels, over weights that lie on the GPU."""

    def __init__(self, model: llama.Llama2_, loan: Loan, head: torch.nn.Module, dtype: torch.dtype):
        """loan: of the embedding, the head and all linear layers. head: the layer, or the embedding, that scores."""
        config = model.config
        self.heads, self.width, self.eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
        self.table = loan.weights[model.embed_tokens][0]
        self.dtype, self.norm = dtype, model.norm.weight
        self.head = loan.projection(head, dtype)
        self.layers = []
        for layer in model.layers:
            own, mlp = layer.self_attn, layer.mlp
            parts = [loan.projection(part, dtype) for part in (own.q_proj, own.k_proj, own.v_proj, own.o_proj,
                                                               mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
            self.layers.append((layer.input_layernorm.weight, parts[:3], parts[3:4],
                                layer.post_attention_layernorm.weight, parts[4:6], parts[6:]))
        self.inverse = 1 / config.rope_theta ** (torch.arange(0, self.width, 2, device=self.table.device).float()
                                                 / self.width)

    def fits(self) -> bool:
        """Whether the kernels take all of the weights."""
        groups = [[self.head], *(group for layer in self.layers for group in (layer[1], layer[2], layer[4], layer[5]))]
        norms = [self.norm, *(layer[place] for layer in self.layers for place in (0, 3))]
        return (self.width in (32, 64, 128, 256) and all(part is not None for group in groups for part in group)
                and all(len({(part.weight.dtype, part.bias is None) for part in group}) == 1 for group in groups)
                and all(tensor.dtype == self.dtype for tensor in (self.table, *norms)))

    def runs(self) -> bool:
        """Whether this GPU has the arithmetic that the weights need."""
        capability = torch.cuda.get_device_capability(self.table.device)
        fp8 = any(part.scale is not None for layer in self.layers for part in (*layer[1], *layer[5]))
        return capability >= ((8, 9) if fp8 else (8, 0))

    def scores(self, states: Tensor) -> Tensor:
        return kernels.project(states.contiguous(), [self.head], kernels.HEAD[self.head.weight.element_size()], self.dtype)[0]

    def __call__(self, tokens: Tensor, cache: Cache, used: int | None = None) -> Tensor:
        """As `ModuleSteps`. Places that hold no token take no time."""
        x = self.table.index_select(0, tokens)
        angles = cache.positions[:, None].float() * self.inverse
        cos, sin = angles.cos(), angles.sin()
        normed = kernels.norm(x, self.layers[0][0], self.eps)
        # Each layer ends with the norm of the next one.
        norms = [*(layer[0] for layer in self.layers[1:]), self.norm]
        for (_, qkv, out, mlp_norm, gates, down), next_norm, (keys, values) in zip(self.layers, norms, cache.layers):
            joined = kernels.project(normed, qkv, kernels.QKV[qkv[0].weight.element_size()])
            q = kernels.rotate(joined, cos, sin, keys, values, cache.lengths, self.heads)
            heads = kernels.attend(q, keys, values, cache.lengths)
            parts = kernels.project(heads, out, kernels.OUT[out[0].weight.element_size()])
            x, normed = kernels.add_norm(x, parts, mlp_norm, self.eps)
            inner = kernels.gate(normed, *gates, kernels.GATE[gates[0].weight.element_size()])
            parts = kernels.project(inner, down, kernels.DOWN[down[0].weight.element_size()])
            x, normed = kernels.add_norm(x, parts, next_norm, self.eps)
        return normed
