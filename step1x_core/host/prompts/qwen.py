"""The host's Qwen2.5-VL with sizes taken from the checkpoint: hidden states and text generation (docs/model.md, Language model; The 217 rule; Text generation)."""

import itertools
import math

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention_for_device
from comfy.text_encoders import llama, qwen_vl
from torch import Tensor

from ...checkpoints.language_model import MLLMConfig
from ...images import picture_grid
from ...prompts.mllm import attention_mask, mrope_positions, rope_positions
from ...prompts.v11 import IMAGE_PAD_ID
from ...reasoning.token_sampling import Sampling
from ..relied_on import TEXT_ENCODER, check_intact
from .writing import PREFILL_TOKENS, REPLY_TOKENS, Writer, write_replies


class VisionTransformer(qwen_vl.Qwen2VLVisionTransformer):
    def __init__(self, config: MLLMConfig, device=None, dtype=None, ops=None):
        super().__init__(
            hidden_size=config.vision_hidden_size, output_hidden_size=config.hidden_size, intermediate_size=config.vision_intermediate_size,
            num_heads=config.vision_heads, num_layers=config.vision_depth, window_size=config.vision_window_size, device=device, dtype=dtype, ops=ops,
        )
        self.fullatt_block_indexes = config.vision_full_attention

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Encode the patches [N, 1176] of one image, grid [1, 3], to features [N / 4, C] in row-major order of the
        merged grid.

        The host's own forward in 0.18 returns the features in window order; Hugging Face and later hosts restore the
        order.
        """
        attention = optimized_attention_for_device(pixel_values.device, mask=False, small_input=True)
        x = self.patch_embed(pixel_values)
        tokens, merge = x.shape[0], self.spatial_merge_size**2

        window_index, window_ends = self.get_window_index(image_grid_thw)
        windows = torch.unique_consecutive(torch.tensor(window_ends, device=x.device))
        whole = torch.tensor([0, tokens], device=x.device)

        def to_windows(values):
            return values.reshape(tokens // merge, merge, -1)[window_index].reshape(tokens, -1)

        angles = to_windows(self.get_position_embeddings(image_grid_thw, x.device))
        angles = torch.cat((angles, angles), dim=-1)
        rope = (angles.cos(), angles.sin())
        x = to_windows(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, whole if i in self.fullatt_block_indexes else windows, optimized_attention=attention)
        return self.merger(x)[torch.argsort(window_index)]


class Qwen25VL(llama.BaseLlama, torch.nn.Module):
    """The host's Qwen2.5-VL with sizes taken from the checkpoint and the official attention mask and positions."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__()
        check_intact(TEXT_ENCODER)
        config = MLLMConfig(**config_dict)
        text = llama.Qwen25_7BVLI_Config(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta, lm_head=config.lm_head,
        )
        text.head_dim = config.head_dim
        text.rope_dims = config.mrope_section
        self.num_layers = text.num_hidden_layers
        self.model = llama.Llama2_(text, device=device, dtype=dtype, ops=operations)
        self.visual = VisionTransformer(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype
        self.can_generate = config.lm_head or config.tie_word_embeddings

    def encode_image(self, image: Tensor, device) -> tuple[Tensor, tuple[int, int]]:
        """Encode uint8 [h, w, 3] with sides in multiples of 28 to features [rows * columns, C] in float32; also returns
        (rows, columns)."""
        patches, grid = qwen_vl.process_qwen2vl_images(image[None].float() / 255)
        features = self.visual(patches.to(device), grid)
        return features.float(), picture_grid(image)

    def encode(self, sequence: list, device, hide_zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Run a sequence (see `embed`) with one image; returns hidden states after the final norm and input embeddings,
        both [1, L, C] in float32, and rope positions [3, L].

        hide_zeros: whether tokens with id 0 are masked, as in v1.0 and v1.1. In every version they get the positions of
        padding.
        """
        embeds, _, ids = self.embed(sequence, device, torch.float32)
        start = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
        mask = attention_mask(ids)
        positions = mrope_positions(mask, start, picture_grid(sequence[start]["data"]))
        # Copies, because from 0.33 on the host's blocks write their result into their input.
        states = self.model(None, attention_mask=mask[None] if hide_zeros else None, embeds=embeds.clone(), dtype=torch.float32,
                            position_ids=positions.clone())[0]
        return states.float(), embeds, positions

    def embed(self, sequence: list, device, dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Embed token ids and images (dicts with uint8 [h, w, 3] under "data"); returns embeddings [1, L, C], rope
        positions [3, L] and ids [L]."""
        parts, runs, ids = [], [], []
        for is_picture, group in itertools.groupby(sequence, lambda token: isinstance(token, dict)):
            if is_picture:
                for token in group:
                    features, grid = self.encode_image(token["data"], device)
                    parts.append(features.to(dtype))
                    runs.append(grid)
                    ids += [IMAGE_PAD_ID] * len(features)
            else:
                text = list(group)
                parts.append(self.model.embed_tokens(torch.tensor(text, device=device), out_dtype=dtype))
                runs.append(len(text))
                ids += text
        return torch.cat(parts)[None], rope_positions(runs).to(device), torch.tensor(ids, device=device)

    def scores(self, states: Tensor) -> Tensor:
        """Return the scores [N, V] of the next tokens for hidden states [N, C]."""
        if self.model.config.lm_head:
            return self.model.lm_head(states)
        table = self.model.embed_tokens
        weight, _, stream = comfy.ops.cast_bias_weight(table, states, offloadable=True)
        scores = torch.nn.functional.linear(states, weight)
        comfy.ops.uncast_bias_weight(table, weight, None, stream)
        return scores

    def working_memory(self, sequences: list[list]) -> int:
        """Return the bytes that a run over sequences needs besides the weights: widest activations, keys and values,
        and room for replies, all in float32, and what choosing tokens takes."""
        config = self.model.config
        longest = max(sum(math.prod(picture_grid(token["data"])) if isinstance(token, dict) else 1 for token in sequence) for sequence in sequences)
        together = max(longest, min(PREFILL_TOKENS, len(sequences) * longest))
        activations = together * (3 * config.intermediate_size + 8 * config.hidden_size)
        cache = len(sequences) * (longest + REPLY_TOKENS) * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        # Scores, their sort keys of 8 bytes and copies of both.
        choice = len(sequences) * 8 * config.vocab_size
        return 4 * (activations + cache + choice)

    def generate(self, sequences: list[list], device, max_tokens: int, samplings: list[Sampling]) -> list[list[int]]:
        """Continue sequences (see `embed`) as one batch; returns the ids of each reply, including its stop token if it
        reached one.

        Most of the time of a token is spent reading the weights, so further replies cost little. A reply is the same as
        if generated alone, up to rounding. Nothing in a sequence is masked, and positions continue after the largest
        one so far.
        Raises the host's InterruptProcessingException if the user cancels.
        """
        if max_tokens < 1:
            return [[] for _ in sequences]
        dtype = torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
        prompts = [self.embed(sequence, device, dtype) for sequence in sequences]
        with Writer(self, prompts, samplings, max_tokens, dtype) as writer:
            return write_replies(writer, max_tokens)
