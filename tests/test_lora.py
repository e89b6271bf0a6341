"""LoRA files in the host's machinery."""

import comfy.model_management
import pytest
import torch
from safetensors.torch import save_file

from step1x_core.config import Step1XError
from step1x_core.host.lora import apply_lora, load_lora_file
from step1x_core.lora import official_alphas


def kohya(name, out, rank, inp, alpha):
    g = torch.Generator().manual_seed(0)
    return {f"lora_unet_{name}.lora_down.weight": torch.randn(rank, inp, generator=g), f"lora_unet_{name}.lora_up.weight": torch.randn(out, rank, generator=g),
            f"lora_unet_{name}.alpha": torch.tensor(float(alpha))}


def weight_after(model, key):
    # Other tests may have left the shared weights loaded, which patch_model takes for patched.
    comfy.model_management.unload_all_models()
    model.patch_model()
    try:
        return dict(model.model.diffusion_model.named_parameters())[key].detach().clone()
    finally:
        model.unpatch_model()


def test_kohya_lora_is_merged_and_taken_off_again(model):
    lora = kohya("double_blocks_0_img_attn_qkv", 192, 4, 64, alpha=2)
    key = "double_blocks.0.img_attn.qkv.weight"
    before = dict(model.model.diffusion_model.named_parameters())[key].detach().clone()
    merged = weight_after(apply_lora(model, lora, 0.5), key)
    up, down = lora["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], lora["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]
    assert torch.allclose(merged, before + 0.5 * (2 / 4) * up @ down, atol=1e-5)
    assert torch.equal(dict(model.model.diffusion_model.named_parameters())[key], before)


def test_peft_names_reach_the_fused_rows(model):
    g = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, 64, generator=g), torch.randn(64, 4, generator=g)
    name = "transformer.transformer_blocks.1.attn.to_k"
    merged = weight_after(apply_lora(model, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, 1.0), "double_blocks.1.img_attn.qkv.weight")
    before = model.model.diffusion_model.double_blocks[1].img_attn.qkv.weight
    assert torch.allclose(merged[64:128], before[64:128] + up @ down, atol=1e-5) and torch.equal(merged[:64], before[:64]) and torch.equal(merged[128:], before[128:])


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
@pytest.mark.parametrize("name, key", [("time_embed.in_layer", "time_in.in_layer"), ("time_embed.out_layer", "time_in.out_layer"),
                                       ("vec_embed.in_layer", "vector_in.in_layer"), ("vec_embed.out_layer", "vector_in.out_layer"),
                                       ("connector.S.input_embedder", "connector.S.input_embedder")])
def test_peft_names_that_flux_does_not_have(model, prefix, name, key):
    before = model.model.diffusion_model.get_submodule(key).weight.detach().clone()
    g = torch.Generator().manual_seed(2)
    down, up = torch.randn(4, before.shape[1], generator=g), torch.randn(before.shape[0], 4, generator=g)
    merged = weight_after(apply_lora(model, {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}, 1.0), f"{key}.weight")
    assert torch.allclose(merged, before + up @ down, atol=1e-5)


def test_connector_layers_can_be_trained(model):
    lora = kohya("connector_global_proj_out", 32, 2, 64, alpha=2)
    before = model.model.diffusion_model.connector.global_proj_out.weight.detach().clone()
    assert not torch.allclose(weight_after(apply_lora(model, lora, 1.0), "connector.global_proj_out.weight"), before)


def test_alpha_zero_means_rank():
    lora = kohya("img_in", 64, 8, 64, alpha=0)
    assert official_alphas(lora)["lora_unet_img_in.alpha"] == 8 and lora["lora_unet_img_in.alpha"] == 0
    assert official_alphas(kohya("img_in", 64, 8, 64, alpha=3))["lora_unet_img_in.alpha"] == 3


def test_foreign_lora_is_refused(model, tmp_path):
    with pytest.raises(Step1XError, match="fits no layer"):
        apply_lora(model, {"lora_unet_down_blocks_0_attn.lora_down.weight": torch.zeros(2, 2)}, 1.0)
    (tmp_path / "lora.safetensors").write_bytes(b"garbage")
    with pytest.raises(Step1XError, match="damaged"):
        load_lora_file(tmp_path / "lora.safetensors")
    for name in ("folder", "lora.ckpt"):
        (tmp_path / name).mkdir()
        with pytest.raises(Step1XError, match="not a safetensors file"):
            load_lora_file(tmp_path / name)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(Step1XError, match="damaged"):
        load_lora_file(tmp_path / "folder.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "ok.safetensors")
    assert list(load_lora_file(tmp_path / "ok.safetensors")) == ["a"]
