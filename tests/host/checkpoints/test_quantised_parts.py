"""Quantised VAEs, LoRAs and language models inside a checkpoint: what would be noise is multiplied out or refused."""

import comfy.sd
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_quantised import FP8, matrices, unmarked

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_vae
from step1x_core.host.checkpoints.lora import load_lora_file
from step1x_core.host.network.model import register

KERNEL = "taesd_encoder.0."
LAYER = "diffusion_model.double_blocks.0.img_attn.qkv."


@pytest.fixture(scope="module")
def vae_weights(models):
    return load_file(models / "vae" / tiny_models.VAE_FILE)


def vae_of(tmp_path, weights):
    save_file(weights, tmp_path / "vae.safetensors")
    return load_vae(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
@pytest.mark.parametrize("shape", [(), (-1, 1, 1, 1)])
def test_scales_of_a_vae_are_multiplied_out(vae_weights, tmp_path, dtype, shape):
    codes = (vae_weights[KERNEL + "weight"] * 8).round().to(dtype)
    scale = torch.linspace(0.1, 0.2, 1 if shape == () else codes.shape[0]).reshape(shape)
    right = (codes.float() * scale).bfloat16()
    found = vae_of(tmp_path, vae_weights | {KERNEL + "weight": codes, KERNEL + "weight_scale": scale})
    assert torch.equal(found.first_stage_model.state_dict()[KERNEL + "weight"].float(), right.float())


@pytest.mark.parametrize("extra, message", [
    ({"weight_zero_point": torch.ones(1, dtype=torch.int8)}, "looks like its scale"),
    ({}, "without a scale; without one"),
    ({"weight_scale": torch.ones(()), "comfy_quant": torch.ones(8, dtype=torch.uint8)}, "is a quantised VAE"),
    ({"weight.absmax": torch.ones(4)}, "is quantised with bitsandbytes"),
])
def test_other_quantised_vaes_are_refused(vae_weights, tmp_path, extra, message):
    parts = {KERNEL + key: tensor for key, tensor in extra.items()}
    with pytest.raises(Step1XError, match=message):
        vae_of(tmp_path, vae_weights | {KERNEL + "weight": vae_weights[KERNEL + "weight"].to(torch.int8)} | parts)


@pytest.mark.parametrize("dtype, scale", [(torch.int8, None), (torch.uint8, None), (FP8, "weight_scale"), (FP8, "scale_weight")])
def test_a_quantised_lora_is_refused(tmp_path, dtype, scale):
    lora = {LAYER + "lora_A.weight": torch.ones(4, 64).to(dtype), LAYER + "lora_B.weight": torch.ones(192, 4)}
    if scale is not None:
        lora[f"{LAYER}lora_A.{scale}"] = torch.tensor(0.5)
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(Step1XError, match="is a quantised LoRA .*bf16"):
        load_lora_file(tmp_path / "lora.safetensors")


def test_a_plain_fp8_lora_with_dora_is_none(tmp_path):
    lora = {
        LAYER + "lora_A.weight": torch.ones(4, 64).to(FP8),
        LAYER + "lora_B.weight": torch.ones(192, 4),
        LAYER + "dora_scale": torch.ones(192, 1),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    assert set(load_lora_file(tmp_path / "lora.safetensors")) == set(lora)


def test_the_stock_checkpoint_loader_refuses_scales_of_the_language_model_that_it_would_ignore(models, vae_weights, tmp_path):
    config = {**tiny_models.TINY_MLLM, "hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 152064,
              "vision_config": {**tiny_models.TINY_MLLM["vision_config"], "hidden_size": 64, "num_heads": 16, "depth": 1}}
    text = tiny_models.random_weights(tiny_models.mllm_shapes(config, lm_head=False), seed=2)
    stored, _ = unmarked(text, matrices(text)[:1])
    model = load_file(models / "diffusion_models" / tiny_models.V11_FILE)
    parts = {"model.diffusion_model.": model, "text_encoders.qwen25_7b.transformer.": stored, "vae.": vae_weights}
    save_file({prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}, tmp_path / "whole.safetensors")
    register()
    with pytest.raises(Step1XError, match="weight_scale, a scale that ComfyUI's own loaders ignore.*'Load Step1X-Edit MLLM'"):
        comfy.sd.load_checkpoint_guess_config(str(tmp_path / "whole.safetensors"))
