"""The miniature transformer in plain torch that can be trained: real tensor names, same results as the host's modules.

The sizes of all miniature networks are in `DemoSize`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from step1x_core.checkpoints.detection import default_axes_dim
from step1x_core.network.connector import Connector, scale_time, time_features
from step1x_core.prompts.cut import PROMPT_MAX_TOKENS
from step1x_core.versions import HEAD_DIM, VERSIONS

VERSION = "v1.1"
THETA = 10000
PATCH = 2


@dataclass(frozen=True)
class DemoSize:
    """Widths and depths. `text` is the language model's width; a head of the connector is 128 wide in every Step1X-Edit model."""

    hidden: int = 160
    head_dim: int = 32
    depth: int = 2
    depth_single: int = 5
    mlp_ratio: int = 4
    connector: int = 128
    connector_depth: int = 2
    vector: int = 64
    channels: int = 16

    text: int = 48
    text_layers: int = 4
    text_heads: int = 2
    text_kv_heads: int = 2
    text_intermediate: int = 128
    vocabulary: int = 152064
    mrope_section: tuple[int, ...] = (4, 4, 4)

    vision: int = 48
    vision_depth: int = 3
    vision_heads: int = 2
    vision_intermediate: int = 96
    vision_window: int = 112
    vision_full_attention: tuple[int, ...] = (2,)

    def mllm_config(self) -> dict:
        """The language model's configuration in the form of a Hugging Face config.json."""
        return {
            "hidden_size": self.text,
            "intermediate_size": self.text_intermediate,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.text_heads,
            "num_key_value_heads": self.text_kv_heads,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "vision_config": {
                "hidden_size": self.vision,
                "intermediate_size": self.vision_intermediate,
                "depth": self.vision_depth,
                "num_heads": self.vision_heads,
                "window_size": self.vision_window,
                "fullatt_block_indexes": list(self.vision_full_attention),
                "out_hidden_size": self.text,
            },
        }


# Small enough for a test on a CPU.
SMOKE_SIZE = DemoSize(
    hidden=64,
    depth=1,
    depth_single=2,
    connector=64,
    connector_depth=1,
    vector=32,
    text_layers=2,
    vision_depth=2,
    vision_full_attention=(1,),
)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q, k, v [B, heads, L, d], bias [B, 1, 1, L] per key -> [B, heads, L, d]."""
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v)
    if q.is_cuda:
        return folded_attention(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(-1, q.shape[1], q.shape[2], -1))


def folded_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As `attention`, with the bias as two more features of the keys: the GPU's kernels without a bias argument are several times faster.

    Two, because one in half precision would round it by up to 1 %.
    """
    width = q.shape[-1]
    extra = 8  # those kernels want multiples of 8 features
    bias = bias.transpose(-1, -2).float() * width**0.5
    coarse = bias.to(k.dtype)
    columns = torch.cat((coarse, (bias - coarse.float()).to(k.dtype)), dim=-1).expand(-1, k.shape[1], -1, -1)
    k = F.pad(torch.cat((k, columns), dim=-1), (0, extra - 2))
    q = F.pad(F.pad(q, (0, 2), value=1.0), (0, extra - 2))
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, extra)), scale=width**-0.5)[..., :width]


def connector_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor, transformer_options={}) -> Tensor:
    """q, k, v [B, T, heads * d], additive mask [B, 1, T, T] as `step1x_core.connector.attention_bias` makes it -> [B, T, heads * d]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)).transpose(1, 2).flatten(2)
    # Row 0 is valid and shows which tokens are; a padded row sees token 0 alone.
    bias = mask[:, :, :1].float().clamp(min=-1e4)
    valid = bias.transpose(-1, -2) == 0
    return torch.where(valid, attention(q, k, v, bias), v[:, :, :1]).transpose(1, 2).flatten(2)


def rope_table(ids: Tensor, axes_dim: list[int]) -> tuple[Tensor, Tensor]:
    """Position ids [L, 3] -> cosines and sines [L, head_dim / 2] in float32, computed in float64."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(ids[:, axis, None].double() * omega)
    angles = torch.cat(angles, dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate_pairs(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, heads, L, d] in float32, neighbouring features being pairs -> rotated."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS norm over the last dimension, in float32."""
    return F.rms_norm(x.float(), scale.shape, scale.float(), eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def attend(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """q, k [B, heads, L, d] in float32 before rope, v [B, heads, L, d], bias [B, 1, 1, L] per key -> [B, L, heads * d]."""
    return (
        attention(rotate_pairs(q, rope).to(v.dtype), rotate_pairs(k, rope).to(v.dtype), v, bias)
        .transpose(1, 2)
        .flatten(2)
    )


class Embedder(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.in_layer = nn.Linear(width_in, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class QKNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query_norm = Scale(width)
        self.key_norm = Scale(width)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, 3 * heads * d] -> normalised q and k in float32, and v, each [B, heads, L, d]."""
        width = self.query_norm.scale.shape[0]
        q, k, v = qkv.unflatten(-1, (3, -1, width)).permute(2, 0, 3, 1, 4)
        return rms_norm(q, self.query_norm.scale), rms_norm(k, self.key_norm.scale), v


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(width, width)


class Modulation(nn.Module):
    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(width, parts * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B, C] -> tensors [B, 1, C]: shift, scale, gate, once or twice."""
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)


def mlp(width: int, ratio: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


class DoubleBlock(nn.Module):
    def __init__(self, size: DemoSize):
        super().__init__()
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(size.hidden, 6))
            setattr(self, f"{stream}_attn", Attention(size.hidden, size.head_dim))
            setattr(self, f"{stream}_mlp", mlp(size.hidden, size.mlp_ratio))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        img_qkv = self.img_attn.norm.split(self.img_attn.qkv(modulate(img, img_mod[0], img_mod[1])))
        txt_qkv = self.txt_attn.norm.split(self.txt_attn.qkv(modulate(txt, txt_mod[0], txt_mod[1])))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        txt_out, img_out = attend(q, k, v, rope, bias).split((txt.shape[1], img.shape[1]), dim=1)
        img = img + img_mod[2] * self.img_attn.proj(img_out)
        img = img + img_mod[5] * self.img_mlp(modulate(img, img_mod[3], img_mod[4]))
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod[5] * self.txt_mlp(modulate(txt, txt_mod[3], txt_mod[4]))
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, size: DemoSize):
        super().__init__()
        self.widths = (3 * size.hidden, size.mlp_ratio * size.hidden)
        self.linear1 = nn.Linear(size.hidden, sum(self.widths))
        self.linear2 = nn.Linear(size.hidden + self.widths[1], size.hidden)
        self.norm = QKNorm(size.head_dim)
        self.modulation = Modulation(size.hidden, 3)

    def forward(self, x: Tensor, vec: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, hidden = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        attention = attend(*self.norm.split(qkv), rope, bias)
        return x + gate * self.linear2(torch.cat((attention, F.gelu(hidden, approximate="tanh")), dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


def to_tokens(latent: Tensor) -> Tensor:
    """[B, C, h, w] with even sides -> [B, h/2 * w/2, 4 * C], channel-major."""
    batch, channels, height, width = latent.shape
    latent = latent.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return latent.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, h/2 * w/2, 4 * C] -> [B, C, h, w]."""
    latent = tokens.reshape(tokens.shape[0], height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return latent.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


def position_ids(text: int, height: int, width: int, device) -> Tensor:
    """Ids [text + 2 * h/2 * w/2, 3] of text, target and reference tokens."""
    rows, columns = (torch.arange(side // PATCH, device=device) for side in (height, width))
    grid = torch.cartesian_prod(torch.zeros(1, device=device, dtype=torch.long), rows, columns)
    offset = torch.tensor(VERSIONS[VERSION].reference_offset, device=device)
    return torch.cat((grid.new_zeros(text, 3), grid, grid + offset))


def padding_bias(mask: Tensor) -> Tensor | None:
    """Text mask [B, T] -> bias [B, T] on attention to each text token; None where T is all of the 640 positions.

    The transformer has no mask, and padding takes part. But padded positions are all alike in every layer (same input, same position
    id), so fewer of them with more weight give the same result: the logarithm of how many positions each one stands for.
    """
    length = mask.shape[1]
    if length == PROMPT_MAX_TOKENS:
        return None
    valid = mask.sum(dim=1, keepdim=True)
    weight = (PROMPT_MAX_TOKENS - valid) / (length - valid).clamp(min=1)
    return torch.where(mask.bool(), 0.0, weight.log())


class DemoTransformer(nn.Module):
    """Step1X-Edit v1.1 in miniature, for one reference of the target's size."""

    def __init__(self, size: DemoSize):
        super().__init__()
        channels = size.channels * PATCH * PATCH
        self.axes_dim = default_axes_dim(size.head_dim)
        self.img_in = nn.Linear(channels, size.hidden)
        self.time_in = Embedder(256, size.hidden)
        self.vector_in = Embedder(size.vector, size.hidden)
        self.txt_in = nn.Linear(size.connector, size.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(size) for _ in range(size.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(size) for _ in range(size.depth_single))
        self.final_layer = FinalLayer(size.hidden, channels)
        self.connector = Connector(
            size.text,
            size.connector,
            max(1, size.connector // HEAD_DIM),
            size.connector_depth,
            size.vector,
            scale_factor=False,
            attention=connector_attention,
            operations=nn,
        )

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, worth compiling."""
        return [*self.connector.S.individual_token_refiner.blocks, *self.double_blocks, *self.single_blocks]

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, mask: Tensor, ref: Tensor) -> Tensor:
        """Noisy latents x and references ref [B, 16, h, w] with even sides, t [B] in 0..1, cond [B, T, C], mask [B, T] of 0/1
        -> velocity [B, 16, h, w].

        T is 640, or less with at least one padded position in every row: those then stand for all 640 - valid ones.
        """
        return self.run(x, t, cond, mask, ref)[0]

    def run(self, x: Tensor, t: Tensor, cond: Tensor, mask: Tensor, ref: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`; beside the velocity the connector's tokens [B, T, connector] and, half-way through the single blocks, the
        reference's tokens [B, h/2 * w/2, hidden]."""
        height, width = x.shape[-2:]
        tokens, pooled = self.connector(cond, t, mask)
        txt = self.txt_in(tokens)
        img = self.img_in(torch.cat((to_tokens(x), to_tokens(ref)), dim=1))
        vec = self.time_in(time_features(scale_time(t))) + self.vector_in(pooled)

        rope = rope_table(position_ids(txt.shape[1], height, width, x.device), self.axes_dim)
        bias = padding_bias(mask)
        if bias is not None:
            bias = F.pad(bias, (0, img.shape[1]))[:, None, None]
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope, bias)
        both = torch.cat((txt, img), dim=1)
        half = txt.shape[1] + img.shape[1] // 2
        for index, block in enumerate(self.single_blocks):
            both = block(both, vec, rope, bias)
            if index == len(self.single_blocks) // 2:
                seen = both[:, half:]
        return from_tokens(self.final_layer(both[:, txt.shape[1]:half], vec), height, width), tokens, seen


class GroundingHeads(nn.Module):
    """Where does the edit take place? Read off the connector's picture tokens and the transformer's reference tokens, in training only.

    The answer in every cell teaches the networks to find the object that an instruction means far sooner than the picture's own error does.
    """

    def __init__(self, size: DemoSize):
        super().__init__()
        self.connector = nn.Linear(size.connector, 1)
        self.reference = nn.Linear(size.hidden, PATCH * PATCH)

    def forward(self, tokens: Tensor, seen: Tensor, region: Tensor) -> Tensor:
        """Connector tokens of the picture [B, N, connector], reference tokens [B, h/2 * w/2, hidden], region [B, h, w] of 0/1
        -> mean cross-entropy of each pair [B]. The picture's tokens are pooled to the latent's grid where theirs is finer."""
        height, width = region.shape[-2:]
        side = round(tokens.shape[1] ** 0.5)
        first = F.adaptive_avg_pool2d(self.connector(tokens).float().reshape(-1, 1, side, side), (height, width))[:, 0]
        second = from_tokens(self.reference(seen).float(), height, width)[:, 0]
        return sum(
            F.binary_cross_entropy_with_logits(logits, region, reduction="none").mean(dim=(1, 2))
            for logits in (first, second)
        )


@torch.no_grad()
def initialize(model: DemoTransformer) -> None:
    """Unit-variance linear layers; small modulation with open gates, so that the text gets gradients from the first step; a small output."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    blocks = model.blocks()
    for block in blocks:
        for name, module in block.named_modules():
            if name.endswith(("_attn.proj", "_mlp.2", "linear2", "self_attn_proj", "mlp.fc2")):
                module.weight.mul_((2 * len(blocks)) ** -0.5)
            elif name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1")):
                module.weight.mul_(0.2)
                for gate in gates(module.bias, block, name):
                    gate.fill_(1)
    model.final_layer.linear.weight.mul_(0.1)
    model.final_layer.adaLN_modulation[1].weight.mul_(0.2)


def gates(bias: Tensor, block: nn.Module, name: str) -> tuple[Tensor, ...]:
    """The slices of a modulation's bias that are gates."""
    if isinstance(block, (DoubleBlock, SingleBlock)):
        parts = bias.chunk(6 if isinstance(block, DoubleBlock) else 3)
        return parts[2::3]
    return (bias,)


def parameter_bytes(*models: nn.Module) -> int:
    """Size of the models' tensors in half precision."""
    return sum(math.prod(tensor.shape) * 2 for model in models for tensor in model.state_dict().values())
