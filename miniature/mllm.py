"""The miniature Qwen2.5-VL in plain torch that can be trained: real tensor names, batches of square pictures of one size."""

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from step1x_core.images import VISION_CELL, VISION_PATCH, vision_sizes
from step1x_core.prompts.cut import PROMPT_DROP_TOKENS
from step1x_core.prompts.mllm import attention_mask, mrope_positions
from step1x_core.prompts.v11 import PICTURE_LABEL_IDS, prompt_head_ids

from .model import DemoSize

MERGE = 2
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@cache
def resize_matrix(before: int, after: int) -> Tensor:
    """Weights [after, before] of Pillow's bicubic resize along one side."""
    identity = Image.fromarray(np.eye(before, dtype=np.float32))
    return torch.from_numpy(np.array(identity.resize((after, before), Image.Resampling.BICUBIC))).T.contiguous()


def resize(pictures: Tensor, side: int) -> Tensor:
    """Whole values 0..255 as float [B, 3, h, w] -> the same of size [B, 3, side, side]. Both passes round to 8 bit, as Pillow does."""
    height, width = pictures.shape[2:]
    across, down = (resize_matrix(length, side).to(pictures) for length in (width, height))
    pictures = (pictures @ across.T).round_().clamp_(0, 255)
    return (down @ pictures).round_().clamp_(0, 255)


def vision_pictures(pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> whole values 0..255 as float [B, 3, s, s] at the vision tower's size."""
    # Half precision holds all whole numbers up to 2048; its weights move a value by less than the rounding does.
    dtype = torch.float16 if pictures.is_cuda else torch.float32
    side = pictures.shape[1]
    pictures = pictures.permute(0, 3, 1, 2).to(dtype).contiguous()
    for (width, _) in vision_sizes(side, side):
        if width != pictures.shape[-1]:
            with torch.autocast(pictures.device.type, enabled=False):
                pictures = resize(pictures, width)
    return pictures


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., d], the halves of the features being pairs; cos and sin [..., d] -> rotated, in x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    def __init__(self, width: int, intermediate: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=bias)
        self.up_proj = nn.Linear(width, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [N, L, C], N being pictures or windows; cos and sin [1, heads or 1, L, d] or one per window of a picture [windows, 1, L, d]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        per_picture = (-1, *cos.shape[:1])
        q, k = (rotate_halves(part.unflatten(0, per_picture), cos, sin).flatten(0, 1) for part in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    def __init__(self, size: DemoSize):
        super().__init__()
        self.norm1 = RMSNorm(size.vision)
        self.norm2 = RMSNorm(size.vision)
        self.attn = VisionAttention(size.vision, size.vision_heads)
        self.mlp = GatedMLP(size.vision, size.vision_intermediate, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (2, VISION_PATCH, VISION_PATCH), bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches [..., 3, 14, 14] -> [..., C]. Both frames of a still picture are alike, so their kernels add up."""
        kernel = self.proj.weight.sum(dim=2).flatten(1)
        return F.linear(patches.flatten(-3), kernel)


class Merger(nn.Module):
    def __init__(self, vision: int, text: int):
        super().__init__()
        self.ln_q = RMSNorm(vision)
        self.mlp = nn.Sequential(
            nn.Linear(MERGE**2 * vision, MERGE**2 * vision), nn.GELU(), nn.Linear(MERGE**2 * vision, text)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., 4, C] -> [..., text]."""
        return self.mlp(self.ln_q(x).flatten(-2))


class VisionTower(nn.Module):
    def __init__(self, size: DemoSize):
        super().__init__()
        self.window = size.vision_window // VISION_CELL
        self.full_attention = size.vision_full_attention
        self.head_dim = size.vision // size.vision_heads
        self.patch_embed = PatchEmbed(size.vision)
        self.blocks = nn.ModuleList(VisionBlock(size) for _ in range(size.vision_depth))
        self.merger = Merger(size.vision, size.text)

    def to_windows(self, x: Tensor) -> Tensor:
        """Patches in reading order [B, rows, columns, ...] -> [B, windows, patches of a window, ...], cell by cell within a window.

        Raises ValueError where the windows do not divide the picture.
        """
        cells = x.shape[1] // MERGE
        if cells % self.window:
            raise ValueError(
                f"Pictures of {cells}x{cells} cells do not divide into windows of {self.window}x{self.window}; "
                "the training code handles sizes such as 128x128 only."
            )
        count, w, m = cells // self.window, self.window, MERGE
        rest = x.shape[3:]
        x = x.reshape(-1, count, w, m, count, w, m, *rest)
        return x.permute(0, 1, 4, 2, 5, 3, 6, *range(7, x.ndim)).reshape(
            x.shape[0], count * count, w * w * m * m, *rest
        )

    def from_windows(self, cells: Tensor, count: int) -> Tensor:
        """Cells in window order [B, windows * w * w, C] -> in reading order."""
        w = self.window
        return cells.unflatten(1, (count, count, w, w)).transpose(2, 3).flatten(1, 4)

    def rope(self, side: int, device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [windows, 1, patches of a window, d] for side x side patches."""
        dim = self.head_dim // 2
        frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim)
        angles = torch.arange(side, device=device)[:, None] * frequencies
        angles = torch.cat((angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)), dim=-1)
        angles = self.to_windows(torch.cat((angles, angles), dim=-1)[None])[0][:, None]
        return angles.cos(), angles.sin()

    def forward(self, pictures: Tensor) -> Tensor:
        """Whole values 0..255 [B, 3, s, s] -> features [B, cells, text] in reading order."""
        batch, side = pictures.shape[0], pictures.shape[-1] // VISION_PATCH
        mean, std = (pictures.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pictures = pictures * (1 / (255 * std)) - mean / std
        patches = pictures.reshape(batch, 3, side, VISION_PATCH, side, VISION_PATCH).permute(0, 2, 4, 1, 3, 5)
        x = self.to_windows(self.patch_embed(patches))
        cos, sin = self.rope(side, x.device)
        whole = [values.transpose(0, 1).flatten(1, 2)[:, None] for values in (cos, sin)]
        windows = x.shape[1]
        for index, block in enumerate(self.blocks):
            if index in self.full_attention:
                x = block(x.flatten(1, 2), *whole).unflatten(1, (windows, -1))
            else:
                x = block(x.flatten(0, 1), cos, sin).unflatten(0, (batch, windows))
        cells = self.merger(x.flatten(1, 2).unflatten(1, (-1, MERGE**2)))
        return self.from_windows(cells, side // MERGE // self.window)


class TextAttention(nn.Module):
    def __init__(self, size: DemoSize):
        super().__init__()
        width = size.text // size.text_heads
        self.width, self.groups = width, size.text_heads // size.text_kv_heads
        self.q_proj = nn.Linear(size.text, size.text)
        self.k_proj = nn.Linear(size.text, size.text_kv_heads * width)
        self.v_proj = nn.Linear(size.text, size.text_kv_heads * width)
        self.o_proj = nn.Linear(size.text, size.text, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | None, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, L, C]; before: keys and values [1, heads, P, d] of a common beginning -> output, and x's keys and values [B, heads, L, d]."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_halves(q, *rope), rotate_halves(k, *rope)
        own = (k, v)
        if before is not None:
            k, v = (
                torch.cat((first.expand(x.shape[0], -1, -1, -1), then), dim=2)
                for first, then in zip(before, own, strict=True)
            )
        if self.groups > 1:
            k, v = (part.repeat_interleave(self.groups, dim=1) for part in (k, v))
        if bias is not None:
            bias = bias.to(q.dtype).expand(-1, q.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return self.o_proj(out.transpose(1, 2).flatten(2)), own


class TextLayer(nn.Module):
    def __init__(self, size: DemoSize):
        super().__init__()
        self.self_attn = TextAttention(size)
        self.mlp = GatedMLP(size.text, size.text_intermediate, bias=False)
        self.input_layernorm = RMSNorm(size.text)
        self.post_attention_layernorm = RMSNorm(size.text)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        before: tuple[Tensor, Tensor] | None = None,
    ):
        """As TextAttention, with the layer's output."""
        out, own = self.self_attn(self.input_layernorm(x), rope, bias, before)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), own


class TextModel(nn.Module):
    def __init__(self, size: DemoSize):
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocabulary, size.text)
        self.layers = nn.ModuleList(TextLayer(size) for _ in range(size.text_layers))
        self.norm = RMSNorm(size.text)


class DemoMLLM(nn.Module):
    """Qwen2.5-VL in miniature with Step1X-Edit's prompt layout, attention mask and positions."""

    def __init__(self, size: DemoSize):
        super().__init__()
        self.size = size
        self.model = TextModel(size)
        self.visual = VisionTower(size)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, worth compiling."""
        return [*self.model.layers, *self.visual.blocks]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, 3, L] -> cosines and sines [B, 1, L, d] in float32."""
        width = self.size.text // self.size.text_heads
        frequencies = 1.0 / 1e6 ** (torch.arange(0, width, 2, device=positions.device).float() / width)
        angles = positions[..., None].float() * frequencies
        sections = angles.split(self.size.mrope_section, dim=-1)
        angles = torch.cat([section[:, axis] for axis, section in enumerate(sections)], dim=-1)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, pictures: Tensor, ids: Tensor, lengths: Tensor, total: int = 640) -> tuple[Tensor, Tensor]:
        """uint8 pictures [B, S, S, 3], ids after the picture [B, F] (padded on the right) and how many of them count [B]
        -> conditioning [B, total, C], zero padded, and its mask [B, total].

        The text before the picture is always the same and sees nothing behind it, so it is computed once for the whole batch.
        """
        features = self.visual(vision_pictures(pictures))
        batch, cells = features.shape[:2]
        side = int(cells**0.5)
        head = torch.tensor([[*prompt_head_ids(), *PICTURE_LABEL_IDS]], device=ids.device)
        start = head.shape[1]

        counted = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        seen = torch.cat(
            (attention_mask(head).expand(batch, -1), ids.new_ones(batch, cells).long(), attention_mask(ids)), dim=1
        )
        first = mrope_positions(seen[0], start, (side, side))
        after = seen[:, start + cells:]
        # Behind the picture, positions count the tokens that are seen; the others have position 1.
        after = torch.where(after.bool(), after.cumsum(dim=1) - 1 + start + side, 1)[:, None].expand(-1, 3, -1)
        head_rope = self.rope(first[None, :, :start])
        rope = self.rope(torch.cat((first[None, :, start:start + cells].expand(batch, -1, -1), after), dim=2))

        causal = torch.ones(
            cells + ids.shape[1], start + cells + ids.shape[1], dtype=torch.bool, device=ids.device
        ).tril(start)
        hidden = ~(causal & seen[:, None, :].bool())
        bias = torch.zeros(hidden.shape, device=ids.device, dtype=autocast_dtype(ids.device)).masked_fill_(
            hidden, -1e4
        )[:, None]

        x_head = self.model.embed_tokens(head)
        x = torch.cat((features.to(x_head.dtype), self.model.embed_tokens(ids)), dim=1)
        for layer in self.model.layers:
            x_head, before = layer(x_head, head_rope)
            x, _ = layer(x, rope, bias, before)
        states = self.model.norm(torch.cat((x_head[:, PROMPT_DROP_TOKENS:].expand(batch, -1, -1), x), dim=1))

        mask = torch.cat((counted.new_ones(batch, states.shape[1] - ids.shape[1]), counted), dim=1)
        states = torch.where(mask[..., None], states, 0.0)
        padding = total - states.shape[1]
        return F.pad(states, (0, 0, 0, padding)), F.pad(mask.long(), (0, padding))


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which attention runs at the moment."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


@torch.no_grad()
def initialize(model: DemoMLLM) -> None:
    """Unit-variance linear layers, smaller ones where they add to the residual stream."""
    residual = (2 * len(model.model.layers)) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("o_proj", "down_proj", "attn.proj")):
                module.weight.mul_(residual)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
