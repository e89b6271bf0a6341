"""Layouts of LoRA files: every one is applied exactly, or refused with a sentence, never in part."""

import logging

import comfy.lora
import pytest
import tiny_models
import torch

from step1x_core.checkpoints.lora_names import PREFIXES, find_layer
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.checkpoints.lora import apply_lora, model_layers

HIDDEN = tiny_models.TINY_TRANSFORMER.hidden
FUSED, QKV, MLP = "single_blocks.0.linear1", "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"


@pytest.fixture(scope="module")
def mapped_model(models):
    """v1.2, with the text-token mapping."""
    return load_model(models / "diffusion_models" / tiny_models.V12_FILE, "v1.2")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def original(model, name):
    return model.model.diffusion_model.get_parameter(name).detach().float().clone()


def patched(model, lora, name, strength=1.0):
    """The weight as the host would patch it."""
    key = f"diffusion_model.{name}"
    return comfy.lora.calculate_weight(apply_lora(model, lora, strength).patches[key], original(model, name), key)


# Forms of a change: its tensors by kind for a weight [rows, columns], and the change as a matrix.
def plain(up, down):
    def form(rows, columns):
        a, b = random(4, columns, seed=1), random(rows, 4, seed=2)
        return {down: a, up: b}, b @ a

    return form


def with_alpha(rows, columns):
    a, b = random(4, columns, seed=1), random(rows, 4, seed=2)
    return {".lora_down.weight": a, ".lora_up.weight": b, ".alpha": torch.tensor(2.0)}, b @ a / 2


def loha(rows, columns):
    a, b, c, d = (
        random(rows, 3, seed=1),
        random(3, columns, seed=2),
        random(rows, 3, seed=3),
        random(3, columns, seed=4),
    )
    return {".hada_w1_a": a, ".hada_w1_b": b, ".hada_w2_a": c, ".hada_w2_b": d, ".alpha": torch.tensor(1.5)}, (
        a @ b
    ) * (c @ d) / 2


def lokr(rows, columns):
    a, b, c = random(4, 4, seed=1), random(rows // 4, 3, seed=2), random(3, columns // 4, seed=3)
    return {".lokr_w1": a, ".lokr_w2_a": b, ".lokr_w2_b": c, ".alpha": torch.tensor(6.0)}, 2 * torch.kron(a, b @ c)


def lokr_full(rows, columns):
    a, b = random(2, 2, seed=1), random(rows // 2, columns // 2, seed=2)
    return {".lokr_w1": a, ".lokr_w2": b, ".alpha": torch.tensor(1e6)}, torch.kron(a, b)


def difference(rows, columns):
    change = random(rows, columns, seed=1)
    return {".diff": change}, change


FORMS = {
    "kohya": with_alpha,
    "peft": plain(".lora_B.weight", ".lora_A.weight"),
    "adapter": plain(".lora_B.mine.weight", ".lora_A.mine.weight"),
    "bare": plain(".lora_B", ".lora_A"),
    "diffusers": plain(".lora.up.weight", ".lora.down.weight"),
    "old": plain("_lora.up.weight", "_lora.down.weight"),
    "linear": plain(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "loha": loha,
    "lokr": lokr,
    "lokr_full": lokr_full,
    "diff": difference,
}

# How layers are called: in the file without a prefix, in the model, and the rows of the model's matrix (all for None).
LAYERS = [
    (QKV, QKV, None),
    (FUSED, FUSED, None),
    ("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1", None),
    ("connector.S.input_embedder", "connector.S.input_embedder", None),
    ("text_token_mapping", "text_token_mapping", None),
    ("time_embed.in_layer", "time_in.in_layer", None),
    ("transformer_blocks.0.attn.to_k", QKV, (HIDDEN, HIDDEN)),
    ("transformer_blocks.0.ff.net.0.proj", MLP, None),
    ("transformer_blocks.1.attn.to_out.0", "double_blocks.1.img_attn.proj", None),
    ("transformer_blocks.1.attn.add_v_proj", "double_blocks.1.txt_attn.qkv", (2 * HIDDEN, HIDDEN)),
    ("single_transformer_blocks.0.attn.to_v", FUSED, (2 * HIDDEN, HIDDEN)),
    ("single_transformer_blocks.0.proj_mlp", FUSED, (3 * HIDDEN, 4 * HIDDEN)),
    ("blocks.0.attn.a_to_qkv", QKV, None),
    ("single_blocks.0.to_qkv_mlp", FUSED, None),
]
DOTTED = [
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "base_model.model.",
    "transformer.base_model.model.",
    "base_model.model.transformer.",
    "unet.",
    "module.",
    "transformer.module.",
    "dit.",
    "pipe.dit.",
    "model.",
    "net.",
    "inner_model.",
    "_orig_mod.",
    "base_model.model._orig_mod.",
    "unet.base_model.model.",
]
FLAT = ["lora_unet_", "lycoris_", "lora_transformer_", "lycoris_transformer_"]


def check(model, prefix, form, name, module, rows):
    before = original(model, f"{module}.weight")
    start, length = rows or (0, before.shape[0])
    tensors, change = form(length, before.shape[1])
    layer = prefix + (name.replace(".", "_") if prefix in FLAT else name)
    before[start : start + length] += 0.5 * change
    assert torch.allclose(
        patched(model, {layer + kind: tensor for kind, tensor in tensors.items()}, f"{module}.weight", 0.5),
        before,
        atol=1e-4,
    )


@pytest.mark.sampled(7)
@pytest.mark.parametrize("prefix", DOTTED + FLAT)
@pytest.mark.parametrize("name, module, rows", LAYERS)
def test_every_layer_under_every_prefix(mapped_model, prefix, name, module, rows):
    for form in FORMS.values():
        check(mapped_model, prefix, form, name, module, rows)


def test_an_infix_of_torch_compile_and_of_old_diffusers(mapped_model):
    check(
        mapped_model, "transformer.", FORMS["peft"], "transformer_blocks.0._orig_mod.attn.to_k", QKV, (HIDDEN, HIDDEN)
    )
    check(mapped_model, "unet.", FORMS["old"], "transformer_blocks.0.attn.processor.to_k", QKV, (HIDDEN, HIDDEN))


def test_no_name_stands_for_two_layers(mapped_model):
    """Underscores for dots must not make two names one, nor may a prefix be part of a name."""
    layers = model_layers(mapped_model)
    for name, target in layers.items():
        for prefix in PREFIXES:
            assert find_layer(prefix + name, layers) == target


def decomposed(weight, change, magnitude):
    changed = weight + change
    return magnitude * changed / changed.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "spelling, shape",
    [
        (".lora_magnitude_vector", (-1,)),
        (".lora_magnitude_vector.weight", (-1,)),
        (".lora_magnitude_vector.default.weight", (-1,)),
        (".dora_scale", (-1,)),
        (".dora_scale", (-1, 1)),
    ],
)
@pytest.mark.parametrize("form", [FORMS["kohya"], FORMS["peft"], loha, lokr])
@pytest.mark.parametrize(
    "prefix, name, module, rows",
    [
        ("transformer.", "transformer_blocks.0.attn.to_q", QKV, (0, HIDDEN)),
        ("lora_unet_", QKV, QKV, None),
        ("transformer.base_model.model.", "single_transformer_blocks.0.attn.to_k", FUSED, (HIDDEN, HIDDEN)),
    ],
)
def test_dora_gives_each_row_its_length(mapped_model, spelling, shape, form, prefix, name, module, rows):
    before = original(mapped_model, f"{module}.weight")
    start, length = rows or (0, before.shape[0])
    tensors, change = form(length, before.shape[1])
    magnitude = random(length, 1, seed=9).abs() + 0.5
    layer = prefix + (name.replace(".", "_") if prefix in FLAT else name)
    lora = {layer + kind: tensor for kind, tensor in tensors.items()} | {layer + spelling: magnitude.reshape(shape)}
    part = before[start : start + length].clone()
    for strength in (1.0, 0.5):
        before[start : start + length] = part + strength * (decomposed(part, change, magnitude) - part)
        assert torch.allclose(patched(mapped_model, lora, f"{module}.weight", strength), before, atol=1e-4)


def test_dora_of_the_final_modulation_swaps_its_halves(mapped_model):
    name = "final_layer.adaLN_modulation.1.weight"
    before = original(mapped_model, name)
    tensors, change = FORMS["peft"](*before.shape)
    magnitude = random(len(before), 1, seed=3).abs()
    lora = {f"transformer.norm_out.linear{kind}": tensor for kind, tensor in tensors.items()} | {
        "transformer.norm_out.linear.lora_magnitude_vector": magnitude[:, 0]
    }
    swap = [torch.cat(t.chunk(2)[::-1]) for t in (change, magnitude)]
    assert torch.allclose(patched(mapped_model, lora, name), decomposed(before, *swap), atol=1e-4)


def test_dora_of_columns_is_the_hosts(mapped_model):
    before = original(mapped_model, f"{QKV}.weight")
    tensors, change = with_alpha(*before.shape)
    magnitude = random(1, before.shape[1], seed=3).abs()
    lora = {f"diffusion_model.{QKV}{kind}": tensor for kind, tensor in tensors.items()} | {
        f"diffusion_model.{QKV}.dora_scale": magnitude
    }
    changed = before + change
    assert torch.allclose(
        patched(mapped_model, lora, f"{QKV}.weight"), magnitude * changed / changed.norm(dim=0, keepdim=True), atol=1e-4
    )


def test_biases_reach_their_part_too(mapped_model):
    """The host drops the bias of a layer that is a part of the model's."""
    before = original(mapped_model, f"{QKV}.bias")
    bias = random(HIDDEN, seed=5)
    down, up = random(4, HIDDEN), random(HIDDEN, 4)
    name = "transformer.transformer_blocks.0.attn.to_v"
    for lora, change in (
        ({f"{name}.diff_b": bias}, bias),
        ({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias}, bias),
        (
            {
                f"{name}.lora_A.weight": down,
                f"{name}.lora_B.weight": up,
                f"{name}.lora_B.bias": bias,
                f"{name}.alpha": torch.tensor(2.0),
            },
            bias / 2,
        ),
    ):
        expected = before.clone()
        expected[2 * HIDDEN :] += change
        assert torch.allclose(patched(mapped_model, lora, f"{QKV}.bias"), expected, atol=1e-5)


def peft(name, rows=3 * HIDDEN, columns=HIDDEN):
    return {f"{name}.lora_A.weight": random(4, columns), f"{name}.lora_B.weight": random(rows, 4)}


GOOD = peft(f"diffusion_model.{QKV}")
PARTS = {
    "magnitude alone": {f"diffusion_model.{MLP}.lora_magnitude_vector": torch.ones(4 * HIDDEN)},
    "magnitude of another size": {f"diffusion_model.{QKV}.lora_magnitude_vector": torch.ones(3)},
    "half of a pair": {f"diffusion_model.{MLP}.lora_A.weight": random(4, HIDDEN)},
    "unknown kind": {f"diffusion_model.{MLP}.lora_diag.weight": torch.ones(4)},
    "scalar": {f"diffusion_model.{QKV}.scalar": torch.tensor(0.5)},
    "whole weight": {f"base_model.model.{MLP}.modules_to_save.weight": random(4 * HIDDEN, HIDDEN)},
    "same layer twice": peft(f"transformer.{QKV}"),
    "two adapters": {key.replace(".weight", ".other.weight"): tensor for key, tensor in GOOD.items()},
    "pair and difference": {f"diffusion_model.{QKV}.diff": random(3 * HIDDEN, HIDDEN)},
    "alpha alone": {f"diffusion_model.{MLP}.alpha": torch.tensor(1.0)},
    "loha that does not fit": {f"diffusion_model.{MLP}{kind}": tensor for kind, tensor in loha(8, 8)[0].items()},
    "lokr that does not fit": {f"diffusion_model.{MLP}{kind}": tensor for kind, tensor in lokr(8, 8)[0].items()},
    "part of a lokr": {f"diffusion_model.{MLP}.lokr_w1": random(4, 4)},
    "bias where there is none": {"diffusion_model.text_token_mapping.diff_b": torch.ones(3)},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_nothing_is_applied_in_part(mapped_model, part):
    apply_lora(mapped_model, GOOD, 1.0)
    with pytest.raises(Step1XError, match="This LoRA .*hoose another file") as error:
        apply_lora(mapped_model, GOOD | part, 1.0)
    assert "another model" not in str(error.value)


def test_other_names_are_counted_and_named(mapped_model, caplog):
    extra = (
        peft("text_encoder.layers.0.q_proj")
        | peft("transformer.time_text_embed.guidance_embedder.linear_1")
        | peft("double_blocks.99.img_attn.qkv")
    )
    with caplog.at_level(logging.WARNING):
        apply_lora(mapped_model, GOOD | extra, 1.0)
    assert (
        "6 of the 8 tensors" in caplog.text
        and "text_encoder.layers.0.q_proj.lora_A.weight" in caplog.text
        and "and 2 more" in caplog.text
    )
    with pytest.raises(Step1XError, match="matches no layer .*text_encoder.* belong to another model"):
        apply_lora(mapped_model, extra, 1.0)
