"""The host's vision tower of Qwen2.5-VL with sizes taken from the checkpoint, and the features that it makes of images
(docs/model.md, Language model)."""

import itertools

import comfy.ops
import torch
from comfy.ldm.modules.attention import optimized_attention_for_device
from comfy.text_encoders import qwen_vl
from torch import Tensor

from ...checkpoints.language_model import MLLMConfig
from ...images import picture_grid


class Windows:
    """How the patches of one image are divided for attention, on the device.

    lengths: number of patches of each window, in order.
    """

    def __init__(self, lengths: list[int], device):
        ends = [0, *itertools.accumulate(lengths)]
        # Windows of one length are computed as one batch; those at the edges of an image are shorter.
        order = sorted(range(len(lengths)), key=lambda window: -lengths[window])
        self.groups = [
            (length, len(list(group))) for length, group in itertools.groupby(order, key=lengths.__getitem__)
        ]
        self.there = self.back = None
        if order != list(range(len(lengths))):
            there = torch.cat([torch.arange(ends[window], ends[window + 1]) for window in order])
            self.there, self.back = there.to(device), torch.argsort(there).to(device)

    def attend(self, attention, qk: Tensor, v: Tensor) -> Tensor:
        """Attention inside each window; qk [N, 2, heads, D] holds queries and keys, v is [N, heads, D]; returns
        [N, heads * D]."""
        if self.there is not None:
            qk, v = qk[self.there], v[self.there]
        start, parts = 0, []
        for length, count in self.groups:
            rows = slice(start, start + length * count)
            q, k = (part.reshape(count, length, *part.shape[1:]).transpose(1, 2) for part in qk[rows].unbind(1))
            values = v[rows].reshape(count, length, *v.shape[1:]).transpose(1, 2)
            parts.append(attention(q, k, values, v.shape[1], skip_reshape=True).flatten(0, 1))
            start = rows.stop
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if self.back is None else out[self.back]


class VisionTransformer(qwen_vl.Qwen2VLVisionTransformer):
    def __init__(self, config: MLLMConfig, device=None, dtype=None, ops=None):
        super().__init__(
            hidden_size=config.vision_hidden_size,
            output_hidden_size=config.hidden_size,
            intermediate_size=config.vision_intermediate_size,
            num_heads=config.vision_heads,
            num_layers=config.vision_depth,
            window_size=config.vision_window_size,
            device=device,
            dtype=dtype,
            ops=ops,
        )
        self.fullatt_block_indexes = config.vision_full_attention

    def embed_patches(self, patches: Tensor) -> Tensor:
        """What `patch_embed` computes for patches [N, 1176], as a matrix product: its kernel covers a whole patch. Some
        versions of cuDNN have no fast convolution in three dimensions for bfloat16."""
        layer = self.patch_embed.proj
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, patches, offloadable=True)
        out = torch.nn.functional.linear(patches, weight.flatten(1), bias)
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return out

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Encode the patches [N, 1176] of one image to features [N / 4, C] in row-major order of the merged grid, both
        in the dtype of the patches.

        image_grid_thw: [1, 3] on the CPU, so that nothing here waits for the GPU.

        It computes what the host's own blocks do in float32, with windows of one length as one batch; theirs mix dtypes
        in any other, and take one call and one wait for each window. The host's own forward in 0.18 returns the
        features in window order; Hugging Face and later hosts restore the order.
        """
        device = pixel_values.device
        attention = optimized_attention_for_device(device, mask=False, small_input=True)
        tokens, merge = pixel_values.shape[0], self.spatial_merge_size**2

        order, ends = self.get_window_index(image_grid_thw)
        lengths = [end - start for start, end in itertools.pairwise(ends) if end > start]
        windows, whole = Windows(lengths, device), Windows([tokens], device)
        order, back = order.to(device), torch.argsort(order).to(device)

        def to_windows(values):
            return values.reshape(tokens // merge, merge, -1)[order].reshape(tokens, -1)

        angles = to_windows(self.get_position_embeddings(image_grid_thw, device))
        angles = torch.cat((angles, angles), dim=-1)[:, None, None]
        cos, sin = angles.cos(), angles.sin()
        embed = self.patch_embed if device.type == "cpu" else self.embed_patches
        x = to_windows(embed(pixel_values))
        for i, block in enumerate(self.blocks):
            qkv = block.attn.qkv(block.norm1(x)).view(tokens, 3, block.attn.num_heads, -1)
            # In float32, as Hugging Face does.
            qk = (qkv[:, :2] * cos + qwen_vl.rotate_half(qkv[:, :2]) * sin).to(x.dtype)
            attend = (whole if i in self.fullatt_block_indexes else windows).attend
            x = x + block.attn.proj(attend(attention, qk, qkv[:, 2]))
            x = x + block.mlp(block.norm2(x))
        return self.merger(x)[back]


def image_features(visual: VisionTransformer, image: Tensor, device, dtype: torch.dtype) -> Tensor:
    """Encode uint8 [h, w, 3] with sides in multiples of 28 to features [rows * columns, C] in the dtype."""
    patches, _ = qwen_vl.process_qwen2vl_images(image.to(device)[None].float() / 255)
    rows, columns = picture_grid(image)
    grid = torch.tensor([[1, rows * visual.spatial_merge_size, columns * visual.spatial_merge_size]])
    return visual(patches.to(dtype), grid)


def token_features(visual: VisionTransformer, token: dict, device, dtype: torch.dtype) -> Tensor:
    """The features of an image in a token sequence.

    token: uint8 [h, w, 3] under "data", and under "memory" an ImageMemory that keeps them, if several sequences with
    this image follow each other.
    """
    memory, image = token.get("memory"), token["data"]
    if memory is None:
        return image_features(visual, image, device, dtype)
    name = "features", str(device), dtype
    return memory.once_by_content(image, name, lambda image: image_features(visual, image, device, dtype))
