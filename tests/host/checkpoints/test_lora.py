"""LoRA files in the host's machinery."""

import logging

import comfy.model_management
import comfy.sd
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from step1x_core.checkpoints.lora import official_alphas
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.checkpoints.lora import apply_lora, load_lora_file

HIDDEN = tiny_models.TINY_TRANSFORMER.hidden


def kohya(name, out, rank, inp, alpha):
    g = torch.Generator().manual_seed(0)
    return {
        f"lora_unet_{name}.lora_down.weight": torch.randn(rank, inp, generator=g),
        f"lora_unet_{name}.lora_up.weight": torch.randn(out, rank, generator=g),
        f"lora_unet_{name}.alpha": torch.tensor(float(alpha)),
    }


def weight_after(model, key):
    # Other tests may have left the shared weights loaded, which patch_model takes for patched.
    comfy.model_management.unload_all_models()
    with torch.no_grad():
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
    up, down = (
        lora["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"],
        lora["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
    )
    assert torch.allclose(merged, before + 0.5 * (2 / 4) * up @ down, atol=1e-5)
    assert torch.equal(dict(model.model.diffusion_model.named_parameters())[key], before)


def test_peft_names_reach_the_fused_rows(model):
    g = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, 64, generator=g), torch.randn(64, 4, generator=g)
    name = "transformer.transformer_blocks.1.attn.to_k"
    merged = weight_after(
        apply_lora(model, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, 1.0),
        "double_blocks.1.img_attn.qkv.weight",
    )
    before = model.model.diffusion_model.double_blocks[1].img_attn.qkv.weight
    assert (
        torch.allclose(merged[64:128], before[64:128] + up @ down, atol=1e-5)
        and torch.equal(merged[:64], before[:64])
        and torch.equal(merged[128:], before[128:])
    )


def stock(model, lora, strength):
    """What 'Load LoRA (Model)' does with a file."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def original(model, module):
    return model.model.diffusion_model.get_submodule(module).weight.detach().clone()


def peft(name, rows, columns, rank=4, seed=2, suffix=".weight"):
    """A LoRA of one layer in PEFT's form, and the change of the weight that it stands for."""
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
    return {f"{name}.lora_A{suffix}": down, f"{name}.lora_B{suffix}": up}, up @ down


@pytest.fixture(scope="module")
def mapped_model(models):
    """v1.2, with the text-token mapping."""
    return load_model(models / "diffusion_models" / tiny_models.V12_FILE, "v1.2")


DIFFUSERS = [
    ("x_embedder", "img_in"),
    ("context_embedder", "txt_in"),
    ("proj_out", "final_layer.linear"),
    ("transformer_blocks.1.norm1.linear", "double_blocks.1.img_mod.lin"),
    ("transformer_blocks.0.norm1_context.linear", "double_blocks.0.txt_mod.lin"),
    ("transformer_blocks.1.attn.to_out.0", "double_blocks.1.img_attn.proj"),
    ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj"),
    ("transformer_blocks.0.ff.net.0.proj", "double_blocks.0.img_mlp.0"),
    ("transformer_blocks.1.ff.net.2", "double_blocks.1.img_mlp.2"),
    ("transformer_blocks.1.ff_context.net.0.proj", "double_blocks.1.txt_mlp.0"),
    ("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2"),
    ("single_transformer_blocks.1.norm.linear", "single_blocks.1.modulation.lin"),
    ("single_transformer_blocks.0.proj_out", "single_blocks.0.linear2"),
]
# Unlike FLUX: two names of diffusers, and layers that FLUX does not have.
OWN = [
    ("time_embed.in_layer", "time_in.in_layer"),
    ("time_embed.out_layer", "time_in.out_layer"),
    ("vec_embed.in_layer", "vector_in.in_layer"),
    ("vec_embed.out_layer", "vector_in.out_layer"),
    ("connector.S.input_embedder", "connector.S.input_embedder"),
    (
        "connector.S.individual_token_refiner.blocks.1.self_attn_qkv",
        "connector.S.individual_token_refiner.blocks.1.self_attn_qkv",
    ),
    ("text_token_mapping", "text_token_mapping"),
]
DIFFSYNTH = [
    ("blocks.0.attn.a_to_qkv", "double_blocks.0.img_attn.qkv"),
    ("blocks.1.attn.b_to_qkv", "double_blocks.1.txt_attn.qkv"),
    ("blocks.1.attn.a_to_out", "double_blocks.1.img_attn.proj"),
    ("blocks.0.attn.b_to_out", "double_blocks.0.txt_attn.proj"),
    ("blocks.0.ff_a.0", "double_blocks.0.img_mlp.0"),
    ("blocks.1.ff_a.2", "double_blocks.1.img_mlp.2"),
    ("blocks.1.ff_b.0", "double_blocks.1.txt_mlp.0"),
    ("blocks.0.ff_b.2", "double_blocks.0.txt_mlp.2"),
    ("blocks.0.norm1_a.linear", "double_blocks.0.img_mod.lin"),
    ("blocks.1.norm1_b.linear", "double_blocks.1.txt_mod.lin"),
    ("single_blocks.1.to_qkv_mlp", "single_blocks.1.linear1"),
    ("single_blocks.0.proj_out", "single_blocks.0.linear2"),
    ("single_blocks.1.norm.linear", "single_blocks.1.modulation.lin"),
]


def check_layer(model, load, name, module, suffix=".weight"):
    before = original(model, module)
    lora, change = peft(name, *before.shape, suffix=suffix)
    assert torch.allclose(weight_after(load(model, lora, 0.5), f"{module}.weight"), before + 0.5 * change, atol=1e-4)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("name, module", DIFFUSERS)
def test_stock_loader_reads_diffusers_names(mapped_model, prefix, name, module):
    check_layer(mapped_model, stock, prefix + name, module)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "base_model.model.", ""])
@pytest.mark.parametrize("name, module", DIFFUSERS + OWN)
def test_our_loader_reads_diffusers_names(mapped_model, prefix, name, module):
    check_layer(mapped_model, apply_lora, prefix + name, module)


@pytest.mark.parametrize("load", [stock, apply_lora])
@pytest.mark.parametrize("module", [module for _, module in DIFFUSERS + OWN])
def test_both_loaders_read_the_original_names(mapped_model, load, module):
    check_layer(mapped_model, load, f"diffusion_model.{module}", module)


@pytest.mark.parametrize("load", [stock, apply_lora])
@pytest.mark.parametrize("module", [module for _, module in DIFFSYNTH + OWN])
def test_both_loaders_read_kohya_names(mapped_model, load, module):
    before = original(mapped_model, module)
    lora = kohya(module.replace(".", "_"), before.shape[0], 4, before.shape[1], alpha=2)
    down, up = (lora[f"lora_unet_{module.replace('.', '_')}.lora_{part}.weight"] for part in ("down", "up"))
    assert torch.allclose(weight_after(load(mapped_model, lora, 2.0), f"{module}.weight"), before + 2.0 * (2 / 4) * up @ down, atol=1e-4)


@pytest.mark.parametrize("suffix", [".weight", ".default.weight"])
@pytest.mark.parametrize("name, module", DIFFSYNTH)
def test_our_loader_reads_diffsynth_names(mapped_model, suffix, name, module):
    check_layer(mapped_model, apply_lora, name, module, suffix)


@pytest.mark.parametrize("load", [stock, apply_lora])
@pytest.mark.parametrize("block, parts, module", [
    ("transformer_blocks.0.", ("attn.to_q", "attn.to_k", "attn.to_v"), "double_blocks.0.img_attn.qkv"),
    ("transformer_blocks.1.", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "double_blocks.1.txt_attn.qkv"),
    ("single_transformer_blocks.1.", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "single_blocks.1.linear1"),
])
def test_separate_matrices_reach_their_rows_of_the_fused_one(mapped_model, load, block, parts, module):
    """Each with its own rank, and one with an alpha."""
    lora, changes = {}, []
    for number, part in enumerate(parts):
        rank = 2 + number
        tensors, change = peft(f"transformer.{block}{part}", 4 * HIDDEN if part == "proj_mlp" else HIDDEN, HIDDEN, rank, seed=number)
        if number == 1:
            tensors[f"transformer.{block}{part}.alpha"] = torch.tensor(1.0)
            change = change / rank
        lora |= tensors
        changes.append(change)
    merged = weight_after(load(mapped_model, lora, 1.0), f"{module}.weight")
    assert torch.allclose(merged, original(mapped_model, module) + torch.cat(changes), atol=1e-4)


@pytest.mark.parametrize("load", [stock, apply_lora])
def test_halves_of_the_final_modulation_are_swapped(model, load):
    """diffusers stores scale before shift, the original shift before scale."""
    module = "final_layer.adaLN_modulation.1"
    lora, change = peft("transformer.norm_out.linear", 2 * HIDDEN, HIDDEN)
    expected = original(model, module) + torch.cat((change[HIDDEN:], change[:HIDDEN]))
    assert torch.allclose(weight_after(load(model, lora, 1.0), f"{module}.weight"), expected, atol=1e-4)


def test_stacked_kohya_file_is_scaled_by_the_rank_of_the_stack(model):
    """Training with split matrices stores three LoRAs as one of three times the rank; its alpha stays that of a single one (docs/model.md, LoRA)."""
    g = torch.Generator().manual_seed(3)
    downs, ups = torch.randn(3, 2, HIDDEN, generator=g), torch.randn(3, HIDDEN, 2, generator=g)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    lora = {
        f"{name}.lora_down.weight": downs.flatten(0, 1),
        f"{name}.lora_up.weight": torch.block_diag(*ups),
        f"{name}.alpha": torch.tensor(2.0),
    }
    merged = weight_after(apply_lora(model, lora, 1.0), "double_blocks.0.img_attn.qkv.weight")
    assert torch.allclose(
        merged,
        original(model, "double_blocks.0.img_attn.qkv")
        + (2 / 6) * torch.cat([up @ down for up, down in zip(ups, downs)]),
        atol=1e-4,
    )


def test_several_files_of_different_layouts_add_up_with_their_weights(model):
    module = "double_blocks.1.img_attn.qkv"
    files = [
        kohya("double_blocks_1_img_attn_qkv", 3 * HIDDEN, 4, HIDDEN, alpha=4),
        peft("blocks.1.attn.a_to_qkv", 3 * HIDDEN, HIDDEN, seed=5)[0],
        peft("transformer.transformer_blocks.1.attn.to_v", HIDDEN, HIDDEN, seed=6)[0],
    ]
    strengths, expected, combined = (0.7, -0.4, 1.5), original(model, module), model
    for lora, strength in zip(files, strengths):
        alone = weight_after(apply_lora(model, lora, strength), f"{module}.weight")
        expected += alone - original(model, module)
        combined = apply_lora(combined, lora, strength)
    assert torch.allclose(weight_after(combined, f"{module}.weight"), expected, atol=1e-4)


@pytest.mark.parametrize("load", [stock, apply_lora])
@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_fp8_models_take_loras(models, tmp_path, kind, load):
    """The change must come through within what fp8 can tell apart: at most 1/16 of a value, in the mean much less."""
    weights = load_file(models / "diffusion_models" / tiny_models.V11_FILE)
    path = tmp_path / "fp8-v1p1.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in weights.items()} if kind == "plain" else tiny_models.scaled_fp8(weights), path)
    model = load_model(path, model_options={"dtype": torch.float8_e4m3fn} if kind == "plain" else {})
    lora = {}
    for name, module in (
        ("double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv"),
        ("connector_S_input_embedder", "connector.S.input_embedder"),
    ):
        lora |= kohya(name, weights[f"{module}.weight"].shape[0], 4, weights[f"{module}.weight"].shape[1], alpha=4)
    for name, module in (("double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv"), ("connector_S_input_embedder", "connector.S.input_embedder")):
        stored = model.model.diffusion_model.get_submodule(module).weight
        assert (stored.dtype == torch.float8_e4m3fn) if kind == "plain" else hasattr(stored, "dequantize")
        change = lora[f"lora_unet_{name}.lora_up.weight"] @ lora[f"lora_unet_{name}.lora_down.weight"]
        merged = weight_after(load(model, lora, 1.0), f"{module}.weight")
        merged = merged.dequantize() if kind == "scaled" else merged.float()
        expected = weights[f"{module}.weight"] + change
        assert (merged - expected).norm() / expected.norm() < 0.05


def test_alpha_zero_means_rank():
    lora = kohya("img_in", 64, 8, 64, alpha=0)
    assert official_alphas(lora)["lora_unet_img_in.alpha"] == 8 and lora["lora_unet_img_in.alpha"] == 0
    assert official_alphas(kohya("img_in", 64, 8, 64, alpha=3))["lora_unet_img_in.alpha"] == 3


def test_foreign_lora_is_refused(model, tmp_path, caplog):
    with pytest.raises(Step1XError, match="matches no layer"):
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
    with caplog.at_level(logging.INFO):
        assert list(load_lora_file(tmp_path / "ok.safetensors")) == ["a"]
    assert f"LoRA from {tmp_path / 'ok.safetensors'}" in caplog.text
