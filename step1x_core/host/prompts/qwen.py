"""The host's Qwen2.5-VL with sizes taken from the checkpoint: hidden states and text generation (docs/model.md,
Language model; The 217 rule; Text generation)."""

import itertools
import math

import comfy.cli_args
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.text_encoders import llama
from torch import Tensor

from ...checkpoints.language_model import MLLMConfig
from ...images import picture_grid
from ...prompts.mllm import attention_mask, mrope_positions, rope_positions
from ...prompts.v11 import IMAGE_PAD_ID
from ...reasoning.token_sampling import Sampling
from ..relied_on import TEXT_ENCODER, check_intact
from .vision import VisionTransformer, token_features
from .writing import PREFILL_TOKENS, REPLY_TOKENS, Writer, write_replies


class Qwen25VL(llama.BaseLlama, torch.nn.Module):
    """The host's Qwen2.5-VL with sizes taken from the checkpoint and the official attention mask and positions."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__()
        check_intact(TEXT_ENCODER)
        config = MLLMConfig(**config_dict)
        text = llama.Qwen25_7BVLI_Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            lm_head=config.lm_head,
        )
        text.head_dim = config.head_dim
        text.rope_dims = config.mrope_section
        self.num_layers = text.num_hidden_layers
        self.model = llama.Llama2_(text, device=device, dtype=dtype, ops=operations)
        self.visual = VisionTransformer(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype
        self.can_generate = config.lm_head or config.tie_word_embeddings

    def compute_dtype(self, device) -> torch.dtype:
        """Return the dtype in which prompts are encoded on a device: that of the weights, as in the official code,
        which for quantised ones is bfloat16.

        Float32 on CPUs, on cards without bfloat16 and with the host's --fp32-text-enc.
        """
        weight = self.model.norm.weight.dtype
        if (
            weight == torch.float32
            or comfy.cli_args.args.fp32_text_enc
            or not comfy.model_management.should_use_bf16(device)
        ):
            return torch.float32
        # Also for weights in float16, whose range the activations of Qwen2.5-VL leave.
        return torch.bfloat16

    def encode(self, sequence: list, device, hide_zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Run a sequence (see `embed`) with one image; returns hidden states after the final norm and input embeddings,
        both [1, L, C] in float32 on the device, and rope positions [3, L] on the CPU.

        hide_zeros: whether tokens with id 0 are masked, as in v1.0 and v1.1. In every version they get the positions of
        padding.
        """
        dtype = self.compute_dtype(device)
        start = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
        grid = picture_grid(sequence[start]["data"])
        ids = torch.tensor([*sequence[:start], *[IMAGE_PAD_ID] * math.prod(grid), *sequence[start + 1:]])
        mask = attention_mask(ids)
        positions = mrope_positions(mask, start, grid)
        # On their way before the image, since a copy waits for all that was started before it.
        shown, hidden = positions.to(device, copy=True), mask[None].to(device) if hide_zeros else None
        embeds, _, _ = self.embed(sequence, device, dtype)
        # A copy, because from 0.33 on the host's blocks write their result into their input.
        states = self.model(None, attention_mask=hidden, embeds=embeds.clone(), dtype=dtype, position_ids=shown)[0]
        return states.float(), embeds.float(), positions

    def embed(self, sequence: list, device, dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Embed token ids and images (dicts as for `vision.token_features`); returns embeddings [1, L, C], rope
        positions [3, L] and ids [L]."""
        runs, ids = [], []
        for is_picture, group in itertools.groupby(sequence, lambda token: isinstance(token, dict)):
            if is_picture:
                for token in group:
                    runs.append(picture_grid(token["data"]))
                    ids += [IMAGE_PAD_ID] * math.prod(runs[-1])
            else:
                text = list(group)
                runs.append(len(text))
                ids += text
        # All copies before the images, for a copy waits for all that was started before it.
        positions, ids = rope_positions(runs).to(device), torch.tensor(ids, device=device)
        texts = ids.split([run if isinstance(run, int) else math.prod(run) for run in runs])
        pictures = (token for token in sequence if isinstance(token, dict))
        parts = [self.model.embed_tokens(text, out_dtype=dtype) if isinstance(run, int)
                 else token_features(self.visual, next(pictures), device, dtype) for run, text in zip(runs, texts)]
        return torch.cat(parts)[None], positions, ids

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
        longest = max(
            sum(math.prod(picture_grid(token["data"])) if isinstance(token, dict) else 1 for token in sequence)
            for sequence in sequences
        )
        together = max(longest, min(PREFILL_TOKENS, len(sequences) * longest))
        activations = together * (3 * config.intermediate_size + 8 * config.hidden_size)
        cache = (
            len(sequences)
            * (longest + REPLY_TOKENS)
            * 2
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
        )
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
