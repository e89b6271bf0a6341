"""The Step1X-Edit transformer: the host's Flux preceded by a connector (docs/model.md, Transformer; v1.2
conditioning)."""

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.attention import optimized_attention_masked
from torch import Tensor

from ...network.connector import Connector
from ...rounding import divided_up, multiple_up
from ...versions import TIME_FACTOR, VERSIONS
from ..relied_on import BLOCKS, TRANSFORMER, check_intact, intact
from .attention import cudnn_first, cudnn_is_fastest
from .blocks import (
    FP8_ATTENTION,
    PAIRED,
    REPEATED_TEXT,
    TOKENS_READ,
    FusedDoubleStreamBlock,
    FusedSingleStreamBlock,
    plain_needed,
)
from .foreign import check_alone, runs_own_blocks

# Text tokens are computed in multiples of this number, so that fewer different shapes occur.
TEXT_STEP = 16


def position_bits(text_ids: Tensor) -> Tensor:
    """Reinterpret float32 positions [B, T, 3] as int32.

    The host casts floating-point conditions to the model's dtype, and fractional positions must not be rounded to
    bfloat16.
    """
    return text_ids.float().contiguous().view(torch.int32)


def official_time(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the time 0..1 as v1.2's pipeline passes it to the network: rounded to the latent's dtype over 0..1000
    (docs/model.md, v1.2 sampling).

    In bfloat16, neighbouring times near 1000 are 4 apart: 993.58 becomes 992.
    """
    return (t.float() * TIME_FACTOR).to(dtype) / TIME_FACTOR


def keeps_text(transformer_options: dict) -> bool:
    """Return whether no patch between the embedders and the blocks adds text tokens; a patch that adds none declares it
    with `keeps_text`."""
    patches = transformer_options.get("patches", {}).get("post_input", [])
    return all(getattr(getattr(patch, "__self__", None), "keeps_text", False) for patch in patches)


class Step1XTransformer(Flux):
    """The blocks and key names of FLUX.1 without guidance embedding, plus `connector.*`.

    version: determines the positions of reference tokens and how times are rounded; it may be changed after
    construction.
    connector: keyword arguments of the Connector.
    text_token_mapping: whether the layer of v1.2 exists that gives the transformer the language model's embeddings of
    quoted characters.
    """

    def __init__(
        self,
        version,
        connector,
        depth,
        depth_single_blocks,
        text_token_mapping=False,
        dtype=None,
        device=None,
        operations=None,
        **kwargs,
    ):
        super().__init__(dtype=dtype, device=device, operations=operations, depth=0, depth_single_blocks=0, **kwargs)
        self.params.depth, self.params.depth_single_blocks = depth, depth_single_blocks
        check_intact(TRANSFORMER)
        double, single = (
            (FusedDoubleStreamBlock, FusedSingleStreamBlock)
            if intact(BLOCKS)
            else (DoubleStreamBlock, SingleStreamBlock)
        )
        block = {"mlp_ratio": self.params.mlp_ratio, "dtype": dtype, "device": device, "operations": operations}
        self.double_blocks = torch.nn.ModuleList(
            [double(self.hidden_size, self.num_heads, qkv_bias=self.params.qkv_bias, **block) for _ in range(depth)]
        )
        self.single_blocks = torch.nn.ModuleList(
            [single(self.hidden_size, self.num_heads, **block) for _ in range(depth_single_blocks)]
        )
        self.version = version
        self.connector = Connector(
            **connector, attention=optimized_attention_masked, dtype=dtype, device=device, operations=operations
        )
        self.text_token_mapping = None
        if text_token_mapping:
            self.text_token_mapping = operations.Linear(
                connector["in_channels"], connector["hidden_size"], dtype=dtype, device=device
            )

    def process_reference(self, latent: Tensor, index: int, transformer_options={}) -> tuple[Tensor, Tensor]:
        """Convert latent [B, C, h, w] of reference number `index` (from 0) to tokens [B, N, C*4] and position ids [B,
        N, 3].

        The model was trained with one reference; further ones are offset along the time axis (experimental).
        """
        t, y, x = VERSIONS[self.version].reference_offset
        # A copy: in float32 on the CPU, this is the conditioning's own tensor.
        return self.process_img(
            latent.clone(),
            index=t * (index + 1),
            h_offset=y * self.patch_size,
            w_offset=x * self.patch_size,
            transformer_options=transformer_options,
        )

    def forward(self, x, timestep, *args, **kwargs):
        # EasyCache modifies its input in place, and in float32 that is the sampler's own tensor, as are the times.
        return super().forward(x.clone(), timestep.clone(), *args, **kwargs)

    def _forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},
        text_mask=None,
        text_tokens=None,
        text_ids=None,
        text_embeds=None,
        quoted_mask=None,
        **kwargs,
    ):
        """Predict the velocity [B, C, h, w] for the noisy latent x [B, C, h, w] at timestep [B] in 0..1.

        context: language-model states [B, T, C_llm]. text_mask: [B, T] of 0/1. ref_latents: list of [B, C, h, w].
        text_tokens: number of text tokens after which all are identical (`distinct_tokens`), or None if unknown.

        v1.2 only: text_ids [B, T, 3], positions as the bits of float32 (see `position_bits`); text_embeds [B, T,
        C_llm], input embeddings of the language model; quoted_mask [B, T] of 0/1.

        y and guidance belong to the host's interface and are ignored: the pooled vector comes from the connector.
        """
        check_alone(self, transformer_options)
        height, width = x.shape[-2:]
        transformer_options = transformer_options.copy()
        if "optimized_attention_override" in transformer_options or not cudnn_is_fastest(x.device):
            transformer_options.pop(FP8_ATTENTION, None)  # another node has to see q, k and v
        else:
            transformer_options["optimized_attention_override"] = cudnn_first
        if transformer_options.get(PAIRED) and "cond_or_uncond" in transformer_options:
            # Without guidance, or with one prompt at a time, there are no pairs.
            transformer_options[PAIRED] = sorted(transformer_options["cond_or_uncond"]) == [0, 1]
        if VERSIONS[self.version].coarse_time:
            timestep = official_time(timestep, x.dtype)
        img, img_ids = self.process_img(x, transformer_options=transformer_options)
        img_tokens = img.shape[1]
        if ref_latents is not None:
            transformer_options["reference_image_num_tokens"] = []
            for index, latent in enumerate(ref_latents):
                ref, ref_ids = self.process_reference(latent, index, transformer_options)
                img = torch.cat((img, ref), dim=1)
                img_ids = torch.cat((img_ids, ref_ids), dim=1)
                transformer_options["reference_image_num_tokens"].append(ref.shape[1])

        if text_mask is None:
            text_mask = torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        if not plain_needed(transformer_options) and runs_own_blocks(self):
            if text_tokens is not None and keeps_text(transformer_options):
                # Identical tokens at identical positions stay identical in every block, so one is computed for all.
                text_tokens = min(multiple_up(text_tokens, TEXT_STEP), context.shape[1])
                transformer_options[REPEATED_TEXT] = (text_tokens, context.shape[1] - text_tokens)
                context, text_mask = context[:, :text_tokens], text_mask[:, :text_tokens]
            if not transformer_options.get("patches_replace", {}).get("dit") and control is None:
                transformer_options.setdefault(TOKENS_READ, img_tokens)
        txt, vec = self.connector(context, timestep, text_mask, transformer_options)
        if self.text_token_mapping is not None and quoted_mask is not None:
            txt = txt + quoted_mask[..., None] * self.text_token_mapping(text_embeds)
        if text_ids is None:
            txt_ids = torch.zeros((*txt.shape[:2], 3), device=x.device, dtype=torch.float32)
        else:
            txt_ids = text_ids.view(torch.float32).clone()  # not the conditioning's own
        # Padded text takes part in the transformer's attention, so there is no mask here.
        out = self.forward_orig(
            img, img_ids, txt, txt_ids, timestep, vec, control=control, transformer_options=transformer_options
        )
        return self.unpack(out[:, :img_tokens], height, width)

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Convert tokens [B, N, C*4] to a latent [B, C, height, width], without the padding of odd sides."""
        p = self.patch_size
        rows, columns = divided_up(height, p), divided_up(width, p)
        latent = tokens.reshape(tokens.shape[0], rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return latent.reshape(tokens.shape[0], -1, rows * p, columns * p)[:, :, :height, :width]
