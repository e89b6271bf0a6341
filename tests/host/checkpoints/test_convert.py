"""Converted checkpoints in the host: what is quantised, how exact it is, and how the file comes to be."""

import hashlib
import json
import os
import subprocess
import sys
from collections import namedtuple

import comfy.model_management
import comfy.sd
import comfy.text_encoders.llama as llama
import comfy.text_encoders.qwen_vl as qwen_vl
import convert as command
import pytest
import tiny_models
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from conftest import PACK
from diffusers_layout import diffusers_repository, to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from step1x_core.checkpoints import conversion, plain_formats
from step1x_core.checkpoints.detection import CONFIG_KEY, CONNECTOR_KEY, stored_config
from step1x_core.checkpoints.rotated_formats import hadamard
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.checkpoints.lora import apply_lora
from step1x_core.host.network.model import register
from step1x_core.host.sampling.sampler import flow_sigmas, sample

# The largest relative error of an edit's latent against bf16, for random weights.
FORMATS = {"fp8": 0.03, "mxfp8": 0.03, "int8": 0.04, "int8_convrot": 0.04, "w4a8": 0.1, "w4a4": 0.25, "nvfp4": 0.1}
LOADABLE = [form for form in FORMATS if conversion.FORMATS[form].host in QUANT_ALGOS]
LARGE = {
    "img_attn.qkv",
    "img_attn.proj",
    "txt_attn.qkv",
    "txt_attn.proj",
    "img_mlp.0",
    "img_mlp.2",
    "txt_mlp.0",
    "txt_mlp.2",
    "linear1",
    "linear2",
}


@pytest.fixture(autouse=True)
def inference():
    """The host runs nodes, loaders among them, in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def source(models):
    return models / "diffusion_models" / tiny_models.V11_FILE


@pytest.fixture(scope="module")
def files(source, tmp_path_factory):
    """The tiny v1.1 in every format, under names that tell nothing of its version."""
    folder = tmp_path_factory.mktemp("converted")
    for form in conversion.FORMATS:
        command.convert(source, folder / f"{form}.safetensors", form)
    return {form: folder / f"{form}.safetensors" for form in conversion.FORMATS}


def edit(model, steps=2, cfg=6.0):
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(1, 16, 8, 12, generator=generator)
    extra = {"reference_latents": [latent], "attention_mask": torch.ones(1, 640, dtype=torch.long)}
    positive, negative = ([[torch.randn(1, 640, 64, generator=generator), extra]] for _ in range(2))
    return sample(
        model,
        positive,
        negative,
        {"samples": latent},
        flow_sigmas(steps, latent),
        cfg,
        seed=1,
        callback=lambda *args: None,
    )["samples"]


def edit_v12(model):
    """v1.2-preview without a mapping: the text has positions of its own."""
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(1, 16, 8, 12, generator=generator)
    cond = [[torch.randn(1, 9, 64, generator=generator), {"reference_latents": [latent], "text_ids": torch.zeros(1, 9, 3)}]]
    return sample(model, cond, cond, {"samples": latent}, flow_sigmas(1, latent), 6.0, seed=1, callback=lambda *args: None)["samples"]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def quantised(model):
    """Names of the layers that the host holds quantised."""
    return {name for name, layer in model.named_modules() if isinstance(getattr(layer, "weight", None), QuantizedTensor)}


def markers(path):
    """What the file says of its quantised layers."""
    return {k.removesuffix(".comfy_quant"): json.loads(bytes(v.tolist())) for k, v in load_file(path).items() if k.endswith(".comfy_quant")}


@pytest.mark.parametrize("form", LOADABLE)
def test_both_loaders_read_the_file_and_its_error_is_small(files, form):
    register()
    expected = edit(load_model(files["bf16"]))
    ours, stock = load_model(files[form]), comfy.sd.load_diffusion_model(str(files[form]))
    for loaded in (ours, stock):
        network = loaded.model.diffusion_model
        assert network.version == "v1.1"
        names = quantised(network)
        assert {name.split(".", 2)[2] for name in names} == LARGE and len(names) == 2 * 8 + 2 * 2
        assert {type(layer.weight) for name, layer in network.named_modules() if name.endswith("lin")} == {torch.nn.Parameter}
    assert 0 < error(edit(ours), expected) < FORMATS[form]
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    results = [loaded.model.diffusion_model.single_blocks[0].linear1(x) for loaded in (ours, stock)]
    assert torch.equal(*results)


def test_a_format_that_the_host_lacks_is_not_loaded_as_another(files):
    for form in set(FORMATS) - set(LOADABLE):
        with pytest.raises((KeyError, Step1XError), match=conversion.FORMATS[form].host):
            load_model(files[form])


def test_int8_is_nearer_than_fp8_and_fp8_than_nvfp4(source):
    weight = load_file(source)["single_blocks.0.linear1.weight"]
    errors = [error(restored(conversion.FORMATS[form].quantise(weight)), weight) for form in ("int8", "fp8", "nvfp4")]
    assert errors == sorted(errors) and errors[0] < 0.01 and errors[1] < 0.03 and errors[2] < 0.12


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def unrotated(x):
    size = next(n for n in (256, 64, 16) if x.shape[1] % n == 0)
    return (x.unflatten(1, (-1, size)) @ hadamard(size)).flatten(1)


def nibbles(data):
    return torch.stack((data & 15, data >> 4 & 15), dim=2).flatten(1).long()


def restored(parts, form=None):
    """The weight that quantised parts stand for, by the definition of the formats."""
    if form == "int8_convrot":
        return unrotated(restored(parts))
    if form == "w4a4":
        return unrotated((nibbles(parts["weight"]) + 8) % 16 - 8.0) * parts["weight_scale"][:, None]
    if form == "w4a8":
        scales = parts["weight_s_rel"].float().repeat_interleave(16, dim=1)
        whole = (parts["weight_codebook"][nibbles(parts["weight"])] * scales).round().clamp(-127, 127)
        return unrotated(whole) * parts["weight_s_channel"][:, None]
    if form == "mxfp8":
        powers = torch.exp2(untiled(parts["weight_scale"], *parts["weight"].shape, 32).float() - 127)
        return parts["weight"].float() * powers.repeat_interleave(32, dim=1)
    if "weight_scale_2" not in parts:
        return parts["weight"].float() * parts["weight_scale"]
    scales = untiled(parts["weight_scale"], parts["weight"].shape[0], parts["weight"].shape[1] * 2, 16).float()
    values = torch.stack((FP4[(parts["weight"] >> 4).long()], FP4[(parts["weight"] & 15).long()]), dim=2).flatten(1)
    return values * scales.repeat_interleave(16, dim=1) * parts["weight_scale_2"]


def untiled(scales, rows, columns, block):
    # Byte 512 * tile + 16 * (row % 32) + 4 * (row // 32 % 4) + column % 4, the tiles row by row.
    row, column = torch.arange(rows)[:, None], torch.arange(columns // block)[None]
    tile = row // 128 * (scales.shape[1] // 4) + column // 4
    return scales.flatten()[512 * tile + 16 * (row % 32) + 4 * (row // 32 % 4) + column % 4]


@pytest.mark.parametrize("shape", [(64, 64), (144, 80), (256, 160), (16, 16)])
def test_every_value_is_rounded_to_its_neighbour(shape, monkeypatch):
    # Several chunks in a small matrix.
    monkeypatch.setattr(plain_formats, "CHUNK", 1000)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.03
    weight[3] = 0
    weight[5, 7] = 1.7
    fp8, int8, nvfp4 = (conversion.FORMATS[form].quantise(weight) for form in ("fp8", "int8", "nvfp4"))
    step = fp8["weight_scale"] * 2**-9
    assert ((restored(fp8) - weight).abs() <= torch.maximum(weight.abs() / 16, step / 2) * (1 + 1e-6)).all()
    assert ((restored(int8) - weight).abs() <= int8["weight_scale"] * 0.5001).all() and int8["weight_scale"].shape == (shape[0], 1)
    # 4 bits: half the widest gap, 4 to 6, in units of the block's scale, which is rounded itself by up to 1/16.
    peak = weight.unflatten(1, (-1, 16)).abs().amax(dim=2).repeat_interleave(16, dim=1)
    floor = nvfp4["weight_scale_2"] * 2**-9 * 6
    assert ((restored(nvfp4) - weight).abs() <= torch.maximum(peak / 6 * 1.07, floor)).all() and (restored(nvfp4)[3] == 0).all()
    for parts in (fp8, nvfp4):
        scale = float(parts.get("weight_scale_2", parts["weight_scale"]))
        assert scale == 2.0 ** round(torch.log2(torch.tensor(scale)).item())


@pytest.mark.parametrize("form", LOADABLE)
def test_the_host_reads_the_same_numbers(files, form):
    stored = load_file(files[form])
    model = load_model(files[form])
    for name, layer in model.model.diffusion_model.named_modules():
        if name in quantised(model.model.diffusion_model):
            parts = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.weight")}
            # Bit for bit but for integers, whose rows have any scale: the host rounds its products to bfloat16 at most.
            assert error(layer.weight.dequantize().float(), restored(parts, form)) <= (4e-3 if conversion.FORMATS[form].rounds_inputs else 0)


def test_everything_but_the_large_layers_is_bf16(source, files):
    original = load_file(source)
    for form in FORMATS:
        stored = load_file(files[form])
        plain = {k: v for k, v in stored.items() if v.dtype == torch.bfloat16}
        assert set(original) - set(plain) == {f"{module}.weight" for module in markers(files[form])}
        assert all(torch.equal(plain[k], original[k].bfloat16()) for k in plain)


def test_fp8_on_cards_with_tensor_cores_rounds_the_inputs_and_weights_only_does_not(source, files, tmp_path, monkeypatch):
    unpacked = edit(load_model(files["fp8"]))
    monkeypatch.setattr(comfy.model_management, "SUPPORT_FP8_OPS", True)
    rounded = edit(load_model(files["fp8"]))
    assert 0 < error(rounded, edit(load_model(files["bf16"]))) < 0.12 and error(rounded, unpacked) > 1e-3
    command.convert(source, tmp_path / "only.safetensors", "fp8", weights_only=True)
    assert torch.equal(edit(load_model(tmp_path / "only.safetensors")), unpacked)


def test_layers_can_be_kept_and_modulation_added(source, files, tmp_path):
    path = tmp_path / "kept.safetensors"
    command.convert(source, path, "nvfp4", keep=["double_blocks.0.*", "*.linear2"], modulation="fp8")
    found = markers(path)
    assert not any(name.startswith("double_blocks.0.") or name.endswith("linear2") for name in found)
    assert (
        found["single_blocks.0.modulation.lin"]
        == found["double_blocks.1.txt_mod.lin"]
        == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    )
    assert found["single_blocks.1.linear1"] == {"format": "nvfp4"} and len(found) == 8 + 2 + 2 + 2
    assert 0 < error(edit(load_model(path)), edit(load_model(files["bf16"]))) < FORMATS["nvfp4"]


def test_diffusers_folder_gives_what_the_single_file_gives(source, files, tmp_path):
    folder = diffusers_repository(tmp_path / "Step1X-Edit-v1p1-diffusers", to_diffusers(load_file(source)))
    for form in conversion.FORMATS:
        out = tmp_path / f"{form}.safetensors"
        command.convert(folder, out, form)
        found, expected = load_file(out), load_file(files[form])
        assert stored_config(found)["version"] == "v1.1" and found.keys() == expected.keys()
        assert all(found[k].dtype == expected[k].dtype and torch.equal(found[k].view(torch.uint8), expected[k].view(torch.uint8))
                   for k in found if k != CONFIG_KEY and found[k].ndim)


def test_plain_fp8_files_keep_their_bits(source, tmp_path):
    plain = {k: v.to(conversion.FP8) for k, v in load_file(source).items()}
    for weights, name in ((plain, "original-v1p1"), (to_diffusers(plain), "diffusers-v1p1")):
        save_file(weights, tmp_path / f"{name}.safetensors")
        command.convert(tmp_path / f"{name}.safetensors", tmp_path / "out.safetensors", "fp8", force=True)
        stored = load_file(tmp_path / "out.safetensors")
        assert len(markers(tmp_path / "out.safetensors")) == 20
        for key, tensor in plain.items():
            assert torch.equal(stored[key].float(), tensor.float())
            assert float(stored.get(key.removesuffix("weight") + "weight_scale", 1)) == 1
    assert torch.isfinite(edit(load_model(tmp_path / "out.safetensors"))).all()


def test_the_version_outlives_its_name(models, tmp_path):
    """Weights of a preview without mapping do not tell their version; the file carries it for both loaders."""
    register()
    weights = {
        k: v
        for k, v in load_file(models / "diffusion_models" / tiny_models.V12_FILE).items()
        if not k.startswith("text_token_mapping")
    }
    folder = diffusers_repository(tmp_path / "anything", to_diffusers(weights), pipeline="Step1XEditPipelineV1P2")
    command.convert(folder, tmp_path / "x.safetensors", "fp8")
    command.convert(folder / "transformer", tmp_path / "y.safetensors", "bf16", version="v1.2-preview")
    for path in (tmp_path / "x.safetensors", tmp_path / "y.safetensors"):
        assert load_model(path).model.diffusion_model.version == "v1.2-preview"
        assert comfy.sd.load_diffusion_model(str(path)).model.diffusion_model.version == "v1.2-preview"
    assert error(edit_v12(load_model(tmp_path / "x.safetensors")), edit_v12(load_model(tmp_path / "y.safetensors"))) < FORMATS["fp8"]
    command.convert(tmp_path / "y.safetensors", tmp_path / "z.safetensors", "int8")
    assert stored_config(load_file(tmp_path / "z.safetensors"))["version"] == "v1.2-preview"
    with pytest.raises(Step1XError, match="their tensors have the same names and shapes"):
        command.convert(folder / "transformer", tmp_path / "w.safetensors", "fp8")


@pytest.mark.parametrize("form", LOADABLE)
def test_a_lora_changes_the_converted_model_as_it_does_the_original(files, form):
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, rows, columns in (
        ("double_blocks_0_img_attn_qkv", 192, 64),
        ("single_blocks_1_linear2", 64, 320),
        ("single_blocks_0_modulation_lin", 192, 64),
    ):
        lora |= {
            f"lora_unet_{name}.lora_down.weight": torch.randn(4, columns, generator=generator) / columns**0.5,
            f"lora_unet_{name}.lora_up.weight": torch.randn(rows, 4, generator=generator),
            f"lora_unet_{name}.alpha": torch.tensor(4.0),
        }
    before, after = (edit(model) for model in (load_model(files[form]), apply_lora(load_model(files[form]), lora, 1.0)))
    expected = edit(apply_lora(load_model(files["bf16"]), lora, 1.0))
    # ComfyUI rounds the sum of weight and LoRA again: to 4 bits, each value up or down at random.
    assert error(after, expected) < 2 * FORMATS[form]
    assert error(after, expected) < error(before, expected) / (1 if form == "w4a4" else 2)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", LOADABLE[::2])
def test_language_model_is_quantised_but_for_vision_and_embeddings(float_file, photo, tmp_path, form):
    out = tmp_path / "mllm.safetensors"
    command.convert(float_file, out, form)
    with safe_open(float_file, framework="pt") as original, safe_open(out, framework="pt") as found:
        scales = ("comfy_quant", "weight_")
        assert {key for key in found.keys() if not key.rsplit(".", 1)[1].startswith(scales)} == set(original.keys())
    assert len(markers(out)) == 2 * 7 and all(name.startswith("model.layers.") for name in markers(out))
    clips = [load_text_encoder(path) for path in (out, float_file)]
    found, expected = (clip.encode_from_tokens(clip.tokenize("make it red", images=[photo])) for clip in clips)
    assert 0 < error(found, expected) < {"fp8": 0.1, "mxfp8": 0.1, "int8": 0.03, "int8_convrot": 0.03}.get(form, 0.3)
    with pytest.raises(Step1XError, match="is already quantised with scales"):
        command.convert(out, tmp_path / "again.safetensors", form)


def test_an_encoder_alone_has_no_head_and_says_so(float_file, source, photo, tmp_path):
    out = tmp_path / "encoder.safetensors"
    command.convert(float_file, out, "fp8", encoder_only=True)
    found, plain = load_file(out), load_file(float_file)
    vision = {key.removesuffix(".weight") for key in plain if conversion.VISION_LAYERS.fullmatch(key)}
    stored = {name for name in markers(out) if name.startswith("visual.")}
    aligned = {name for name in vision if all(side % 16 == 0 for side in plain[f"{name}.weight"].shape)}
    assert "lm_head.weight" in plain and "lm_head.weight" not in found and stored == aligned and stored
    clip = load_text_encoder(out)
    found, expected = (one.encode_from_tokens(one.tokenize("make it red", images=[photo])) for one in (clip, load_text_encoder(float_file)))
    assert 0 < error(found, expected) < 0.15 and not clip.cond_stage_model.qwen25_7b.transformer.can_generate
    with pytest.raises(Step1XError, match="--encoder-only is for language models"):
        command.convert(source, tmp_path / "out.safetensors", "fp8", encoder_only=True)


def test_hugging_face_folder_of_the_language_model(float_file, tmp_path):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    weights = {k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else k.replace("visual.", "model.visual.", 1): v
               for k, v in load_file(float_file).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny_models.TINY_MLLM))
    for path, out in ((folder, "a.safetensors"), (float_file, "b.safetensors")):
        command.convert(path, tmp_path / out, "fp8")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)
    assert load_text_encoder(tmp_path / "a.safetensors").cond_stage_model.qwen25_7b.transformer.can_generate


def test_stock_clip_loader_reads_the_language_model(tmp_path, monkeypatch):
    """The stock loader has the sizes of the 7B model built in; they are made smaller here, and nothing else."""
    config = {**tiny_models.TINY_MLLM, "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = {k: config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}
    full_config, full_vision = llama.Qwen25_7BVLI_Config, qwen_vl.Qwen2VLVisionTransformer
    monkeypatch.setattr(llama, "Qwen25_7BVLI_Config", lambda **options: full_config(**{**options, **sizes}))
    monkeypatch.setattr(
        qwen_vl,
        "Qwen2VLVisionTransformer",
        lambda hidden_size, **options: full_vision(
            hidden_size=32, intermediate_size=48, num_heads=2, num_layers=2, **options
        ),
    )
    config["vision_config"] = {**config["vision_config"], "out_hidden_size": 512}
    save_file(
        tiny_models.random_weights(tiny_models.mllm_shapes(config, lm_head=False), seed=2, dtype=torch.bfloat16),
        tmp_path / "bf16.safetensors",
    )
    command.convert(tmp_path / "bf16.safetensors", tmp_path / "fp8.safetensors", "fp8")

    def states(name):
        clip = comfy.sd.load_clip([str(tmp_path / name)], clip_type=comfy.sd.CLIPType.QWEN_IMAGE)
        return clip, clip.encode_from_tokens(clip.tokenize("a fox"))

    (clip, found), (_, expected) = states("fp8.safetensors"), states("bf16.safetensors")
    assert len(quantised(clip.cond_stage_model)) == 2 * 7
    assert 0 < error(found, expected) < 0.1


def test_refusals_name_the_file_and_the_remedy(source, files, float_file, tmp_path, monkeypatch):
    weights = load_file(source)

    def written(name, tensors, metadata=None):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    key = "double_blocks.0.img_attn.qkv.weight"
    flux = written("flux.safetensors", {k: v for k, v in weights.items() if not k.startswith("connector.")})
    lacking = written("lacking-v1p1.safetensors", {k: v for k, v in weights.items() if k != "single_blocks.1.linear2.bias"})
    damaged = written("damaged-v1p1.safetensors", {**weights, key: weights[key].masked_fill(torch.arange(64) == 3, float("nan"))})
    whole = written("whole-v1p1.safetensors", {**weights, key: weights[key].to(torch.int8)})
    blind = written("blind.safetensors", {k: v for k, v in load_file(float_file).items() if k != "visual.merger.ln_q.weight"},
                    {CONFIG_KEY: json.dumps(tiny_models.TINY_MLLM)})
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    cases = [
        (flux, "out.safetensors", "neither a Step1X-Edit model"),
        (lacking, "out.safetensors", "lacks 1 of .* single_blocks.1.linear2.bias"),
        (blind, "out.safetensors", "lacks 1 of .* visual.merger.ln_q.weight"),
        (damaged, "out.safetensors", f"{key} contains NaN or Inf values"),
        (whole, "out.safetensors", f"{key} has dtype I8"),
        (files["nvfp4"], "out.safetensors", "is already quantised with scales"),
        (tmp_path / "gone.safetensors", "out.safetensors", "does not exist"),
        (source, "out.gguf", "does not end with .safetensors"),
        (source, "nowhere/out.safetensors", "The output folder"),
        (source, "taken.safetensors", "already exists"),
        (source, "", "does not end with .safetensors"),
    ]
    before = set(tmp_path.iterdir())
    for path, out, message in cases:
        with pytest.raises(Step1XError, match=message):
            command.convert(path, tmp_path / out, "fp8")
    with pytest.raises(Step1XError, match="is the input file"):
        command.convert(source, source, "fp8", force=True)
    with pytest.raises(Step1XError, match="--weights-only has no effect"):
        command.convert(source, tmp_path / "out.safetensors", "int8", weights_only=True)
    Disk = namedtuple("Disk", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk(10**6, 10**6 - 1000, 1000))
    with pytest.raises(Step1XError, match="GB free, but the output needs"):
        command.convert(source, tmp_path / "out.safetensors", "fp8")
    assert set(tmp_path.iterdir()) == before and (tmp_path / "taken.safetensors").read_bytes() == b"precious"


def test_a_cut_conversion_leaves_no_file(source, files, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            assert (tmp_path / "out.safetensors.part").is_file()
            raise KeyboardInterrupt

    old = files["bf16"].read_bytes()
    with pytest.raises(KeyboardInterrupt):
        command.convert(source, tmp_path / "out.safetensors", "fp8", progress=interrupt)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.safetensors").write_bytes(old)
    with pytest.raises(KeyboardInterrupt):
        command.convert(source, tmp_path / "out.safetensors", "fp8", force=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"] and (tmp_path / "out.safetensors").read_bytes() == old


@pytest.mark.once
def test_the_command_prints_the_checksum_and_writes_it(source, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        return subprocess.run([sys.executable, PACK / "scripts" / "convert.py", source, *arguments], capture_output=True, text=True)

    out = tmp_path / "out.safetensors"
    done = run(out, "--format", "int8")
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert done.returncode == 0 and digest in done.stdout and "[########################################]" in done.stderr
    assert ("cannot load int8" in done.stderr) == ("int8" not in LOADABLE)
    assert (tmp_path / "out.safetensors.sha256").read_text() == f"{digest}  out.safetensors\n"
    monkeypatch.setattr(sys, "argv", ["convert.py", str(source), str(out)])
    assert command.main() == 1 and "--force" in capsys.readouterr().err


STREAM = """
import sys, threading, time
from pathlib import Path
import psutil, torch
sys.path.insert(0, sys.argv[3])
from step1x_core.checkpoints import conversion, plain_formats
# What the first computations import.
conversion.FORMATS["nvfp4"].quantise(torch.ones(16, 16, device="meta"))
process, seen, over = psutil.Process(), [], threading.Event()
def watch():
    while not over.is_set():
        seen.append(process.memory_info().rss)
        time.sleep(0.001)
before = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
conversion.convert(conversion.Weights([Path(sys.argv[1])]), Path(sys.argv[2]), sys.argv[4], {}, {})
over.set()
thread.join()
print(max(seen) - before)
"""


@pytest.mark.once
@pytest.mark.parametrize("form", ["nvfp4"])
def test_only_a_few_tensors_are_in_memory(big_file, tmp_path, form):
    """A file of 300 MB whose largest tensor has 34 MB; 100 MB are for pieces in float32 and what the allocator keeps."""
    out = subprocess.run([sys.executable, "-c", STREAM, big_file, tmp_path / "out.safetensors", PACK, form], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 1.5 * 34e6 + 100e6 < os.path.getsize(big_file) / 1.9


@pytest.fixture(scope="module")
def big_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    weight = torch.randn(4096, 4096).bfloat16()
    save_file({CONNECTOR_KEY: torch.ones(16, 16), **{f"single_blocks.{i}.linear1.weight": weight.clone() for i in range(9)}}, path)
    return path
