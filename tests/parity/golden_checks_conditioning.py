"""The golden checks of v1.2's conditioning: prompt, positions, picture sizes and resizing, packing of latents.

golden_runner.py runs them. Position values may differ by 1e-4; ids, masks, tables and 8-bit pictures are exact.
"""

import torch
from comfy.latent_formats import Flux as FluxLatent
from comfy.ops import disable_weight_init
from comfy.text_encoders.qwen_vl import process_qwen2vl_images
from PIL import Image

from step1x_core.host.network.transformer import Step1XTransformer
from step1x_core.host.prompts.text_encoder import TEXT_ENCODER_NAME, Step1XTokenizer
from step1x_core.images import (
    HELPER_LIMITS,
    PROCESSOR_LIMITS_V12,
    SIZE_MULTIPLE,
    THINKER_LIMITS,
    VISION_CELL,
    VISION_PATCH,
    from_uint8,
    picture_grid,
    resize,
    thumbnail,
    to_output_size,
    to_thinker_size,
    to_uint8,
    to_vision_size_v12,
    to_working_size_v12,
    vision_sizes,
    working_size,
)
from step1x_core.network.positions import text_ids, vision_coordinates
from step1x_core.prompts.cut import KEPT
from step1x_core.prompts.mllm import attention_mask, mrope_positions
from step1x_core.prompts.v11 import IMAGE_PAD_ID
from step1x_core.prompts.v12 import SPECIAL_TOKENS, chat_text, prompt_prefix, split_chat, split_quotations
from step1x_core.sampling.schedule import latent_tokens, shift_mu
from step1x_core.versions import LAYOUT_V12

POSITION_TOLERANCE = 1e-4


class Sequence:
    """What the pack makes of a prompt and a picture of some size: the parts of its token structure and the positions of its tokens."""

    def __init__(self, tokenizer: Step1XTokenizer, prompt: str, size: tuple[int, int]):
        tokens = tokenizer.tokenize_with_weights(prompt, images=[torch.zeros(1, size[1], size[0], 3)])[TEXT_ENCODER_NAME][0]
        sequence = [token for token, _ in tokens]
        self.start = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
        picture = sequence[self.start]
        self.size = picture["working_size"]
        self.grid = picture_grid(picture["data"])
        self.cells = self.grid[0] * self.grid[1]
        self.end = self.start + self.cells
        self.ids = [*sequence[:self.start], *[IMAGE_PAD_ID] * self.cells, *sequence[self.start + 1:]]
        self.mask = picture["text_mask"]
        self.positions = mrope_positions(attention_mask(torch.tensor(self.ids)), self.start, self.grid)
        self.text_ids = text_ids(self.positions, self.start, self.grid, self.size)


def check_prompt(row: dict, sequence: Sequence, errors) -> None:
    pieces = split_chat(chat_text(row["prompt"]), len(prompt_prefix()))
    shown = [piece.replace(prompt_prefix(), "{PREFIX}") for piece, _ in pieces]
    # Not the parts put together: a curly mark at the start of a part is lost in the layout.
    errors.equal(chat_text(row["prompt"]).replace(prompt_prefix(), "{PREFIX}"), row["chat_text"])
    errors.equal(shown, row["parts"])
    errors.equal([quoted for _, quoted in pieces], row["in_quotation"])

    start, end, first = sequence.start, sequence.end, KEPT.start
    errors.equal(len(sequence.ids), row["n_tokens_total"])
    errors.equal(sequence.cells, row["n_image_tokens"])
    if row["ids_before_image"] is not None:
        errors.equal(sequence.ids[:start], row["ids_before_image"])
    errors.equal(sequence.ids[first + 1:start], row["ids_before_image_from_prefix_end"])
    errors.equal(sequence.ids[end:], row["ids_after_image"])
    errors.equal(sequence.ids[KEPT][:4], row["first_kept_ids"])
    errors.equal(len(sequence.text_ids), row["n_tokens_kept"])
    # A long instruction reaches past what is kept: the picture behind it is cut, or left out.
    shown_start, shown_end = min(start, KEPT.stop), min(end, KEPT.stop)
    mask_before, mask_after = sequence.mask[first:shown_start], sequence.mask[start + 1:][:KEPT.stop - shown_end]
    errors.equal(mask_before, row["text_mask_kept_before_image"])
    errors.equal(mask_after, row["text_mask_kept_after_image"])
    errors.equal(sum(mask_before) + sum(mask_after), row["text_mask_sum"])

    errors.equal(sequence.positions[0, :start].tolist(), row["mllm_pos_t_before_image"])
    errors.equal(sequence.positions[0, end:].tolist(), row["mllm_pos_t_after_image"])
    errors.equal(sequence.positions[:, start].tolist(), row["mllm_image_pos_first"])
    errors.equal(sequence.positions[:, end - 1].tolist(), row["mllm_image_pos_last"])
    time = sequence.text_ids[:, 0].tolist()
    errors.equal(time[:shown_start - first], row["txt_ids_time_kept_before_image"])
    errors.equal(time[shown_start - first:shown_end - first], [row["txt_ids_time_image"]] * (shown_end - shown_start))
    errors.equal(time[shown_end - first:], row["txt_ids_time_kept_after_image"])


def check_tokens(table: dict, errors) -> None:
    tokenizer = Step1XTokenizer(layout=LAYOUT_V12)
    errors.equal(tokenizer.token_ids(prompt_prefix()), table["prefix_token_ids"])
    errors.equal(len(prompt_prefix()), table["prefix_char_len"])
    errors.equal((KEPT.start, KEPT.stop - KEPT.start), (table["prefix_tokens_dropped"], table["max_token_length"]))
    errors.equal(sorted(SPECIAL_TOKENS), sorted(table["special_tokens_used_for_split"]))
    for row in table["split_only"]:
        errors.equal(split_quotations(row["text"], row["prefix_len"]), list(zip(row["parts"], row["in_quotation"])))
    for row in table["split_with_special_tokens"]:
        errors.equal(split_chat(row["text"], row["prefix_len"]), list(zip(row["parts"], row["in_quotation"])))

    head = table["prompts"][0]["ids_before_image"][:KEPT.start + 1]
    errors.equal(head[table["prefix_starts_at_token"]:], table["prefix_token_ids"])
    for row in table["prompts"]:
        sequence = Sequence(tokenizer, row["prompt"], table["image"]["original_size_wh"])
        errors.equal(list(sequence.size), table["image"]["generation_size_wh"])
        errors.equal(sequence.ids[:KEPT.start + 1], head)
        check_prompt(row, sequence, errors)


def check_position_ids(golden, errors) -> None:
    def near(found, expected):
        errors.equal(found.shape, expected.shape)
        errors.equal(bool((found - expected).abs().max() <= POSITION_TOLERANCE), True)

    tokenizer = Step1XTokenizer(layout=LAYOUT_V12)
    errors.equal(KEPT.start, golden.config["prefix_tokens_dropped"])
    for i, case in enumerate(golden.config["cases"]):
        sequence = Sequence(tokenizer, case["prompt"], case["original_wh"])
        rows, columns = sequence.grid
        width, height = sequence.size
        errors.equal([width, height], case["generation_wh"])
        errors.equal([columns * VISION_CELL, rows * VISION_CELL], case["mllm_resized_wh"])
        errors.equal([[1, rows * 2, columns * 2]], golden.inputs[f"{i}.image_grid_thw"].tolist())
        errors.equal(sequence.ids, golden.inputs[f"{i}.input_ids"].tolist())
        errors.equal((len(sequence.ids), len(sequence.text_ids)), (case["n_tokens"], case["n_kept"]))
        errors.equal(sequence.positions, golden.outputs[f"{i}.mllm_position_ids"])
        near(sequence.text_ids, golden.outputs[f"{i}.txt_ids"])

        # Both maps on the last vision token: to latent tokens, and back to itself from the pixel at its centre.
        place = torch.stack((vision_coordinates(columns, width)[-1], vision_coordinates(rows, height)[-1]))
        token = torch.tensor([columns - 1.0, rows - 1.0, 1.0])
        near(place.float(), (golden.outputs[f"{i}.vision_to_latent_affine"] @ token)[:2])
        pixel = torch.cat((place * SIZE_MULTIPLE + 11, torch.ones(1))).float()
        near(token[:2], (golden.outputs[f"{i}.pixel_to_vision_affine"] @ pixel)[:2])


def check_image_preprocess(golden, errors) -> None:
    """The reference's float input, its Lanczos picture, its patches as the host cuts them, and a result brought back to the source's size."""
    out, level = golden.outputs, golden.config["size_level"]
    picture = from_uint8(golden.inputs["image_u8_hwc"].numpy())
    errors.tensor(to_working_size_v12(picture, level).movedim(-1, 0)[None] * 2 - 1, out["vae_input"])

    pixels, size = to_vision_size_v12(picture, level)
    errors.equal(list(size), golden.config["generation_wh"])
    errors.equal([pixels.shape[1], pixels.shape[0]], golden.config["mllm_resized_wh"])
    errors.equal(resize(to_uint8(picture), size, Image.Resampling.LANCZOS).tolist(), out["ref_image_u8_hwc"].tolist())
    patches, grid = process_qwen2vl_images(pixels[None].float() / 255)
    errors.equal(grid.reshape(1, 3), out["mllm_image_grid_thw"])
    errors.tensor(patches[out["pixel_values_row_index"].long()], out["pixel_values_rows"])
    errors.tensor(patches.mean(0), out["pixel_values_colmean"])

    back = to_output_size(from_uint8(out["ref_image_u8_hwc"].numpy()), golden.config["original_wh"], truncate=False)
    errors.equal(to_uint8(back).tolist(), out["output_resized_back_u8_hwc"].tolist())


def check_resize_table(table: dict, errors) -> None:
    def vision(size, grid, tokens):
        errors.equal([1, size[1] // VISION_PATCH, size[0] // VISION_PATCH], grid)
        errors.equal(size[0] // VISION_CELL * (size[1] // VISION_CELL), tokens)

    for row in table["edit_path"]:
        size = working_size(*row["original_wh"], row["size_level"])
        errors.equal(list(size), row["generation_wh"])
        errors.equal([size[1] // SIZE_MULTIPLE, size[0] // SIZE_MULTIPLE], row["latent_tokens_hw"])
        errors.tensor(torch.tensor(shift_mu(latent_tokens(size[1] // 8, size[0] // 8))), torch.tensor(row["mu"]))
        (shown,) = vision_sizes(*size, limits=[PROCESSOR_LIMITS_V12])
        errors.equal(list(shown), row["mllm_resized_wh"])
        vision(shown, row["mllm_grid_thw"], row["n_image_tokens"])
    for row in table["thinker_path"]:
        width, height = row["original_wh"]
        picture = torch.zeros(height, width, 3)
        small = thumbnail(to_uint8(picture)).shape[1::-1]
        errors.equal(list(small), row["after_thumbnail_wh"])
        loaded, _ = vision_sizes(*small, limits=[HELPER_LIMITS, THINKER_LIMITS])
        errors.equal(list(loaded), row["after_fetch_wh"])
        vision(to_thinker_size(picture).shape[1::-1], row["grid_thw"], row["n_image_tokens"])


def check_latent_pack(golden, errors) -> None:
    latent, out, scale = golden.inputs["latent"], golden.outputs, FluxLatent()
    errors.equal((scale.shift_factor, scale.scale_factor), (golden.config["shift_factor"], golden.config["scaling_factor"]))
    errors.tensor(scale.process_in(latent), out["scaled"])
    errors.tensor(scale.process_out(latent), out["unscaled"])
    connector = {"in_channels": 8, "hidden_size": 8, "num_heads": 1, "depth": 1, "vec_in_dim": 8, "scale_factor": False}
    model = Step1XTransformer(
        "v1.2",
        connector,
        dtype=torch.float32,
        device="meta",
        operations=disable_weight_init,
        in_channels=latent.shape[1],
        out_channels=latent.shape[1],
        hidden_size=8,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        mlp_ratio=1.0,
        axes_dim=[2, 2, 4],
        theta=10000,
        context_in_dim=8,
        vec_in_dim=8,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
    )
    packed, ids = model.process_img(latent)
    errors.equal(packed, out["packed"])
    errors.equal(ids[0], out["latent_ids"])
    errors.equal(model.unpack(packed, *latent.shape[-2:]), out["unpacked"])


CHECKS = {
    "tokens.json": check_tokens,
    "position_ids.safetensors": check_position_ids,
    "image_preprocess.safetensors": check_image_preprocess,
    "resize_table.json": check_resize_table,
    "latent_pack.safetensors": check_latent_pack,
}
