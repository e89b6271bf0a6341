"""LoRAs under other names: the same change, as this pack, diffusers' own loader and PEFT's read it."""

import json

import pytest
import tiny_models
import torch
from diffusers_layout import to_diffusers
from safetensors.torch import load_file, save_file
from torch import nn

from step1x_core.checkpoints.keys import diffusers_modules
from step1x_core.checkpoints.lora_export import DIFFUSERS, KOHYA, PEFT, export_lora, exported, modules
from step1x_core.errors import Step1XError
from step1x_core.training.objective import TARGET

SIZE = tiny_models.TINY_TRANSFORMER
RANK, ALPHA = 4, 2.0


@pytest.fixture(scope="module")
def weights():
    """All tensors of the tiny transformer, under the original names."""
    return tiny_models.random_weights(tiny_models.transformer_shapes("v1.1", SIZE), seed=1)


@pytest.fixture(scope="module")
def trained(weights):
    """A LoRA as the training saves it, for every layer that it trains, and the changes by original name."""
    generator, lora, changes = torch.Generator().manual_seed(2), {}, {}
    for key, weight in weights.items():
        module = key.removesuffix(".weight")
        if not key.endswith(".weight") or not TARGET.fullmatch(module):
            continue
        up, down = (torch.randn(*shape, generator=generator) for shape in ((len(weight), RANK), (RANK, weight.shape[1])))
        name = f"lora_unet_{module.replace('.', '_')}"
        lora |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(ALPHA)}
        changes[module] = up @ down * ALPHA / RANK
    assert len(changes) == SIZE.depth * 10 + SIZE.depth_single * 3
    return lora, changes


@pytest.fixture(scope="module")
def merged(weights, trained):
    """The weights with the LoRA merged in, under diffusers' names."""
    changed = {key: weight + trained[1].get(key.removesuffix(".weight"), 0) for key, weight in weights.items()}
    return to_diffusers(changed)


def module_of(weights) -> nn.Module:
    """A module with linear layers of these names and weights."""
    root = nn.Module()
    for key, weight in weights.items():
        if not key.endswith(".weight") or weight.ndim != 2:
            continue
        *path, last = key.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        layer = nn.Linear(weight.shape[1], len(weight))
        layer.weight.data = weight.clone()
        parent.add_module(last, layer)
    return root


def same(found: dict, expected: dict) -> int:
    """Compare the layers that both have; returns how many those are."""
    common = found.keys() & expected.keys()
    for key in common:
        assert torch.allclose(found[key], expected[key], atol=1e-4), key
    return len(common)


def applied(tensors, weights, prefix: str) -> dict:
    """Weights by diffusers' names plus lora_B @ lora_A, as the format defines it."""
    out = dict(weights)
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            out[f"{name.removeprefix(prefix)}.weight"] = (
                out[f"{name.removeprefix(prefix)}.weight"] + tensors[f"{name}.lora_B.weight"] @ down
            )
    return out


@pytest.mark.parametrize("layout, prefix", [(DIFFUSERS, "transformer."), (PEFT, "base_model.model.")])
def test_names_of_diffusers_change_the_weights_alike(trained, weights, merged, layout, prefix):
    tensors = exported(trained[0], layout)
    assert all(key.startswith(prefix) for key in tensors)
    assert same(applied(tensors, to_diffusers(weights), prefix), merged) == len(merged)


def test_the_way_back_to_kohya_is_the_same_change(trained):
    for layout in (DIFFUSERS, PEFT):
        back = exported(exported(trained[0], layout), KOHYA)
        for module, change in trained[1].items():
            name = f"lora_unet_{module.replace('.', '_')}"
            up, down, alpha = (back[f"{name}.{kind}"] for kind in ("lora_up.weight", "lora_down.weight", "alpha"))
            assert torch.allclose(up @ down * alpha / len(down), change, atol=1e-4), module
    # And once more there: what was fused from parts gets its own ranks back.
    again, first = exported(back, DIFFUSERS), exported(trained[0], DIFFUSERS)
    assert {key: tensor.shape for key, tensor in again.items()} == {key: tensor.shape for key, tensor in first.items()}


def test_kohya_in_kohya_out_is_unchanged(trained):
    out = exported(trained[0], KOHYA)
    assert out.keys() == trained[0].keys() and all(torch.equal(out[key], tensor) for key, tensor in trained[0].items())


def test_the_final_modulation_is_swapped_and_the_connector_keeps_its_name(weights):
    name, generator = "final_layer.adaLN_modulation.1", torch.Generator().manual_seed(3)
    shape = weights[f"{name}.weight"].shape
    up, down = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
    connector = "connector.S.input_embedder"
    lora = {f"diffusion_model.{n}.lora_{k}.weight": t for n in (name, connector) for k, t in (("B", up), ("A", down))}
    changed = weights | {f"{name}.weight": weights[f"{name}.weight"] + up @ down}
    tensors = exported(lora, DIFFUSERS)
    assert f"transformer.{connector}.lora_A.weight" in tensors
    final = {key: tensor for key, tensor in tensors.items() if "norm_out" in key}
    assert same(applied(final, to_diffusers(weights), "transformer."), to_diffusers(changed)) == len(to_diffusers(weights))
    assert torch.equal(exported(tensors, KOHYA)["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"], up)


def test_every_layer_has_a_diffusers_name_of_its_own(weights):
    names = [name for module in modules() for name in diffusers_modules(module)]
    assert len(set(names)) == len(names)
    linear = {key.removesuffix(".weight") for key, tensor in weights.items() if tensor.ndim == 2}
    theirs = {key.removesuffix(".weight") for key, tensor in to_diffusers(weights).items() if tensor.ndim == 2}
    assert linear <= set(modules()) and {name for module in linear for name in diffusers_modules(module)} == theirs


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lora: {key: tensor for key, tensor in lora.items() if not key.endswith("up.weight")}, "incomplete"),
        (lambda lora: lora | {"lora_te_x.lora_up.weight": torch.zeros(1, 1)}, "does not have: lora_te_x"),
        (lambda lora: {}, "does not have"),
        (
            lambda lora: lora | {"lora_unet_single_blocks_0_linear1.dora_scale": torch.ones(1)},
            "is not a plain one: lora_unet_single_blocks_0_linear1 has",
        ),
        (
            lambda lora: lora | {f"transformer.transformer_blocks.0.attn.to_q.lora_{k}.weight": torch.ones(4, 4) for k in "AB"},
            "both in whole and in part",
        ),
        (
            lambda lora: lora | {"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(3, 64)},
            "cannot be multiplied",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(trained, change, message):
    with pytest.raises(Step1XError, match=message):
        exported(change(trained[0]), DIFFUSERS)


def test_files_keep_their_metadata(trained, tmp_path):
    from safetensors import safe_open

    half = {key: tensor.bfloat16() for key, tensor in trained[0].items()}
    export_lora(half, tmp_path / "out.safetensors", DIFFUSERS, {"step1x_edit.steps": "4"})
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"step1x_edit.steps": "4", "format": "pt"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
    export_lora(half, tmp_path / "folder", PEFT, {})
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == RANK and len(config["target_modules"]) == SIZE.depth * 14 + SIZE.depth_single * 6


def test_diffusers_own_loader_makes_the_same_change(trained, weights, merged, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: its loader was not tried")
    pytest.importorskip("peft", reason="peft is not installed, which diffusers' LoRA loader needs")
    # FLUX's class has the names of Step1X-Edit's blocks; diffusers' release has no class for Step1X-Edit.
    model = diffusers.FluxTransformer2DModel(
        in_channels=SIZE.channels, num_layers=SIZE.depth, num_single_layers=SIZE.depth_single,
        attention_head_dim=SIZE.head_dim, num_attention_heads=SIZE.hidden // SIZE.head_dim,
        joint_attention_dim=SIZE.connector, pooled_projection_dim=SIZE.vector, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    plain = {key: tensor for key, tensor in to_diffusers(weights).items() if key in model.state_dict()}
    model.load_state_dict(plain, strict=False)
    export_lora(trained[0], tmp_path / "lora.safetensors", DIFFUSERS, {})
    model.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer", adapter_name="mine")
    model.fuse_lora(adapter_names=["mine"])
    model.unload_lora()
    touched = {key for key in plain if not torch.equal(plain[key], merged[key])}
    assert len(touched) == SIZE.depth * 14 + SIZE.depth_single * 6
    found = model.state_dict()
    assert same({key: found[key] for key in touched}, merged) == len(touched)


def test_pefts_own_loader_makes_the_same_change(trained, weights, merged, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: its loader was not tried")
    export_lora(trained[0], tmp_path / "lora_peft", PEFT, {})
    model = peft.PeftModel.from_pretrained(module_of(to_diffusers(weights)), tmp_path / "lora_peft").merge_and_unload()
    found = {key: tensor for key, tensor in model.state_dict().items() if key.endswith(".weight")}
    assert same(found, merged) == len(found) > SIZE.depth * 14 + SIZE.depth_single * 6


def test_the_command_writes_each_layout_and_overwrites_nothing(trained, tmp_path):
    import convert

    save_file(trained[0], tmp_path / "lora.safetensors")
    for form in convert.LORA_FORMATS:
        convert.convert_lora(tmp_path / "lora.safetensors", tmp_path / form, form)
        with pytest.raises(Step1XError, match="exists"):
            convert.convert_lora(tmp_path / "lora.safetensors", tmp_path / form, form)
    convert.convert_lora(tmp_path / "diffusers", tmp_path / "kohya", "kohya", force=True)
    assert load_file(tmp_path / "kohya").keys() == trained[0].keys()
    with pytest.raises(Step1XError, match="exists"):
        convert.convert_lora(tmp_path / "kohya", tmp_path / "kohya", "diffusers", force=True)
