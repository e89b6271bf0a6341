"""The Step1X-Edit text encoder on the host's Qwen2.5-VL (spec v1.md c)."""

from dataclasses import asdict

import torch
from comfy import sd1_clip
from comfy.ldm.modules.attention import optimized_attention_for_device
from comfy.text_encoders import llama, qwen_vl
from comfy.text_encoders.qwen_image import Qwen25_7BVLITokenizer
from torch import Tensor

from ..config import Step1XError
from ..images import BLACK_PICTURE, to_vision_size
from ..mllm import MLLMConfig, attention_mask, layout_states, mrope_positions
from ..prompt import prompt_ids

TEXT_ENCODER_NAME = "qwen25_7b"


class VisionTransformer(qwen_vl.Qwen2VLVisionTransformer):
    def __init__(self, config: MLLMConfig, device=None, dtype=None, ops=None):
        super().__init__(
            hidden_size=config.vision_hidden_size, output_hidden_size=config.hidden_size, intermediate_size=config.vision_intermediate_size,
            num_heads=config.vision_heads, num_layers=config.vision_depth, window_size=config.vision_window_size, device=device, dtype=dtype, ops=ops,
        )
        self.fullatt_block_indexes = config.vision_full_attention

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Patches [N, 1176] of one picture, grid [1, 3] -> features [N / 4, C] in row-major order of the merged grid.

        The host's own forward of 0.18 leaves the features in window order; Hugging Face's and later hosts restore it.
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
        config = MLLMConfig(**config_dict)
        text = llama.Qwen25_7BVLI_Config(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta,
        )
        text.head_dim = config.head_dim
        text.rope_dims = config.mrope_section
        self.num_layers = text.num_hidden_layers
        self.model = llama.Llama2_(text, device=device, dtype=dtype, ops=operations)
        self.visual = VisionTransformer(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype

    def encode_image(self, image: Tensor, device) -> tuple[Tensor, tuple[int, int]]:
        """uint8 [h, w, 3] with sides in multiples of 28 -> features [rows * columns, C] in float32 and (rows, columns)."""
        patches, grid = qwen_vl.process_qwen2vl_images(image[None].float() / 255)
        features = self.visual(patches.to(device), grid)
        return features.float(), (image.shape[0] // 28, image.shape[1] // 28)

    def encode(self, before: list[int], image: Tensor, after: list[int], device) -> Tensor:
        """Token ids around one picture -> hidden states after the final norm, [1, L, C] in float32."""
        features, grid = self.encode_image(image, device)
        ids = torch.tensor([before + after], device=device)
        start = len(before)
        embeds = self.model.embed_tokens(ids, out_dtype=torch.float32)
        embeds = torch.cat((embeds[:, :start], features[None], embeds[:, start:]), dim=1)
        mask = attention_mask(ids[0])
        mask = torch.cat((mask[:start], mask.new_ones(features.shape[0]), mask[start:]))
        positions = mrope_positions(mask, start, grid)
        return self.model(None, attention_mask=mask[None], embeds=embeds, dtype=torch.float32, position_ids=positions)[0].float()


class Step1XTextModel(sd1_clip.SDClipModel):
    def __init__(self, config: MLLMConfig, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, layer="last", textmodel_json_config=asdict(config), dtype=dtype, special_tokens={"pad": 151643},
                         layer_norm_hidden_state=False, model_class=Qwen25VL, model_options=model_options)

    def forward(self, tokens):
        """tokens: one list of ids with one picture among them, as Step1XTokenizer makes it -> states [1, L, C] and no pooled output."""
        device = self.execution_device
        if device is None:
            device = self.transformer.get_input_embeddings().weight.device
        sequence = tokens[0]
        at = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
        return self.transformer.encode(sequence[:at], sequence[at]["data"], sequence[at + 1:], device), None


class Step1XTEModel(sd1_clip.SD1ClipModel):
    """Conditioning of one prompt: [1, 640, C] with its attention mask [1, 640]."""

    def __init__(self, config: MLLMConfig, device="cpu", dtype=None, model_options={}, dtype_llama=None, llama_quantization_metadata=None):
        if llama_quantization_metadata is not None:
            model_options = {**model_options, "quantization_metadata": llama_quantization_metadata}

        super().__init__(device=device, dtype=dtype_llama or dtype, name=TEXT_ENCODER_NAME, clip_model=Step1XTextModel, model_options=model_options, config=config)

    def encode_token_weights(self, token_weight_pairs):
        states, pooled = super().encode_token_weights(token_weight_pairs)[:2]
        cond, mask = layout_states(states)
        return cond, pooled, {"attention_mask": mask}


class Step1XTokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data, name=TEXT_ENCODER_NAME, tokenizer=Qwen25_7BVLITokenizer)

    def token_ids(self, text: str) -> list[int]:
        return getattr(self, self.clip).tokenizer(text)["input_ids"]

    def tokenize_with_weights(self, text, return_word_ids=False, images=[], **kwargs):
        """Prompt and at most one picture [B, H, W, C] (its first entry) -> the host's token structure.

        Without a picture the model is shown a black one, as the official text-to-image does. Prompt
        weights such as (word:1.2) do not exist here: the text is taken literally.
        """
        if len(images) > 1:
            raise Step1XError(f"Step1X-Edit reads one picture with the instruction, not {len(images)}. Connect a single picture.")
        picture = images[0][0] if len(images) > 0 else torch.zeros(BLACK_PICTURE, BLACK_PICTURE, 3)
        before, after = prompt_ids(text, self.token_ids)
        sequence = [*before, {"type": "image", "data": to_vision_size(picture)}, *after]
        return {TEXT_ENCODER_NAME: [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in sequence]]}
