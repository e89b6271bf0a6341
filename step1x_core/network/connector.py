"""The connector (token refiner) between the language model and the transformer (docs/model.md, Connector)."""

import math

import torch
from torch import Tensor, nn

from ..versions import TIME_FACTOR

TIME_FEATURES = 256
MAX_PERIOD = 10000


def scale_time(t: Tensor) -> Tensor:
    """Scale the time from 0..1 to 0..1000, in t's own dtype as the official code does (bf16 0.9824 gives 980, not
    982.4)."""
    return t * TIME_FACTOR


def time_features(t: Tensor) -> Tensor:
    """Return the sinusoidal features of a scaled time [B] as [B, 256] in float32, cosines first."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, dtype=None, device=None, operations=None):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(TIME_FEATURES, hidden_size, dtype=dtype, device=device),
            nn.SiLU(),
            operations.Linear(hidden_size, hidden_size, dtype=dtype, device=device),
        )

    def features(self, t: Tensor) -> Tensor:
        """Return the sinusoidal features as they enter the first linear layer.

        The official code casts them to that layer's storage dtype, so plain fp8 weights round them to e4m3.
        """
        features = time_features(t)
        stored = self.mlp[0].weight.dtype
        # GGUF nodes store weights as raw uint8, which is not a dtype to round to.
        return features.to(stored) if stored.is_floating_point else features

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(self.features(t).to(dtype))


class ContextEmbedder(nn.Module):
    def __init__(self, in_channels, hidden_size, dtype=None, device=None, operations=None):
        super().__init__()
        self.linear_1 = operations.Linear(in_channels, hidden_size, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(hidden_size, hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


class RefinerMLP(nn.Module):
    def __init__(self, hidden_size, mlp_size, dtype=None, device=None, operations=None):
        super().__init__()
        self.fc1 = operations.Linear(hidden_size, mlp_size, dtype=dtype, device=device)
        self.fc2 = operations.Linear(mlp_size, hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.silu(self.fc1(x)))


class RefinerBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, attention, dtype=None, device=None, operations=None):
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        self.norm1 = operations.LayerNorm(hidden_size, eps=1e-6, dtype=dtype, device=device)
        self.self_attn_qkv = operations.Linear(hidden_size, hidden_size * 3, dtype=dtype, device=device)
        self.self_attn_proj = operations.Linear(hidden_size, hidden_size, dtype=dtype, device=device)
        self.norm2 = operations.LayerNorm(hidden_size, eps=1e-6, dtype=dtype, device=device)
        self.mlp = RefinerMLP(hidden_size, hidden_size * 4, dtype=dtype, device=device, operations=operations)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(hidden_size, hidden_size * 2, dtype=dtype, device=device)
        )

    def forward(self, x: Tensor, c: Tensor, attn_bias: Tensor, transformer_options={}) -> Tensor:
        gate_attn, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).chunk(3, dim=-1)
        attn = self.attention(q, k, v, self.num_heads, mask=attn_bias, transformer_options=transformer_options)
        x = x + gate_attn * self.self_attn_proj(attn)
        return x + gate_mlp * self.mlp(self.norm2(x))


class TokenRefinerBlocks(nn.Module):
    def __init__(self, depth, **kwargs):
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(**kwargs) for _ in range(depth))


class TokenRefiner(nn.Module):
    def __init__(self, in_channels, hidden_size, num_heads, depth, attention, dtype=None, device=None, operations=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.input_embedder = operations.Linear(in_channels, hidden_size, dtype=dtype, device=device)
        self.t_embedder = TimestepEmbedder(hidden_size, **factory)
        self.c_embedder = ContextEmbedder(in_channels, hidden_size, **factory)
        self.individual_token_refiner = TokenRefinerBlocks(
            depth, hidden_size=hidden_size, num_heads=num_heads, attention=attention, **factory
        )

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor, mask: Tensor, transformer_options={}) -> Tensor:
        c = self.t_embedder(t, x.dtype) + self.c_embedder(pooled)
        bias = attention_bias(mask, x.dtype)
        x = self.input_embedder(x)
        for block in self.individual_token_refiner.blocks:
            x = block(x, c, bias, transformer_options)
        return x


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a token mask [B, T] to an additive attention bias [B, 1, T, T].

    Position i attends to j if both are valid. Column 0 is open to every row, so padded rows attend only to token 0 and
    no row is empty (docs/model.md, Connector).
    """
    valid = mask.bool()
    allowed = valid[:, :, None] & valid[:, None, :]
    allowed[:, :, 0] = True
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill_(~allowed, torch.finfo(dtype).min)[
        :, None
    ]


def distinct_tokens(x: Tensor, mask: Tensor) -> int:
    """Return how many text tokens of x [B, T, C] with mask [B, T] of 0/1 are distinct: those before the padding at the
    end, and one of the padding.

    Padding attends only to token 0 and nothing attends to it, so equal padding stays equal in the connector's output
    (docs/model.md, Connector).
    """
    padding = (mask == 0) & (x == x[:, -1:]).all(dim=-1)
    told_apart = (~padding).any(dim=0).nonzero()
    return min(int(told_apart.max()) + 2 if len(told_apart) else 1, x.shape[1])


class Connector(nn.Module):
    """Converts language-model states to the transformer's text tokens and pooled vector.

    attention: the host's masked attention function, `(q, k, v, heads, mask=, transformer_options=)`.
    scale_factor: whether there is a learned factor on the pooled vector, as in v1.0 checkpoints.
    """

    def __init__(
        self,
        in_channels,
        hidden_size,
        num_heads,
        depth,
        vec_in_dim,
        scale_factor,
        attention,
        dtype=None,
        device=None,
        operations=None,
    ):
        super().__init__()
        self.S = TokenRefiner(
            in_channels, hidden_size, num_heads, depth, attention, dtype=dtype, device=device, operations=operations
        )
        self.global_proj_out = operations.Linear(in_channels, vec_in_dim, dtype=dtype, device=device)
        if scale_factor:
            self.scale_factor = nn.Parameter(torch.empty(1, dtype=dtype, device=device))
        else:
            self.register_parameter("scale_factor", None)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, transformer_options={}) -> tuple[Tensor, Tensor]:
        """Convert x [B, T, C], t [B] in 0..1 and mask [B, T] of 0/1 to text tokens [B, T, hidden] and a pooled vector
        [B, vec_in_dim].

        Padded positions keep their (non-zero) output, because the transformer attends to them.
        """
        t = scale_time(t)
        pooled = (x.float() * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        # Only the output vector is scaled; the refiner's context is the unscaled mean in both versions.
        scaled = pooled
        if self.scale_factor is not None:
            scaled = pooled * (1 + self.scale_factor.to(device=x.device, dtype=x.dtype))
        tokens = self.S(x, t, pooled.to(x.dtype), mask, transformer_options)
        return tokens, self.global_proj_out(scaled.to(x.dtype))
