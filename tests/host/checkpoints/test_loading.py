"""Checkpoints of every kind, good and bad, through the pack's loader and the stock one."""

import hashlib
import json
import os
import shutil

import comfy.memory_management
import comfy.quant_ops
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import tiny_models
import torch
from diffusers_layout import diffusers_repository, to_diffusers
from safetensors.torch import load_file, save_file
from test_convert import edit

from step1x_core.checkpoints.conversion import MODEL_LAYERS
from step1x_core.checkpoints.detection import CONNECTOR_KEY, detect_config
from step1x_core.checkpoints.files import is_model_folder, shard_files
from step1x_core.checkpoints.keys import diffusers_to_original
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints import loading, quantising
from step1x_core.host.checkpoints.folders import choices
from step1x_core.host.checkpoints.loading import load_model, model_shapes
from step1x_core.host.checkpoints.quantising import quantised
from step1x_core.host.network.model import Step1XEdit, Step1XEditModel, register

FLOAT8 = torch.float8_e4m3fn


def key_hash(shapes):
    """The hash by which model files are told apart: names and names with shapes, sorted, MD5."""
    entries = [entry for key, shape in shapes.items() for entry in (f"{key}:{'_'.join(map(str, shape))}", key)]
    return hashlib.md5(",".join(sorted(entries)).encode()).hexdigest()


@pytest.fixture(scope="module")
def files(models):
    folder = models / "diffusion_models"
    return {"v1.0": folder / tiny_models.V10_FILE, "v1.1": folder / tiny_models.V11_FILE}


def predict(model, seed=0):
    """One call of the network on fixed inputs, in float32."""
    generator = torch.Generator().manual_seed(seed)
    network = model.model.diffusion_model
    x, ref = torch.randn(2, 16, 6, 8, generator=generator), torch.randn(2, 16, 6, 8, generator=generator)
    context = torch.randn(2, 20, 64, generator=generator)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 11:] = 0
    with torch.inference_mode():
        return network(x, torch.tensor([0.7, 0.7]), context, ref_latents=[ref], text_mask=mask).float()


@pytest.mark.parametrize(
    "version, tensors, digest",
    [("v1.0", 817, "d30fb9e02b1dbf4e509142f05cf7dd50"), ("v1.1", 816, "165ac33005344846889110500f31a959")],
)
def test_full_size_key_list_is_that_of_the_published_file(version, tensors, digest):
    published = tiny_models.transformer_shapes(version, tiny_models.FULL_TRANSFORMER)
    assert len(published) == tensors and key_hash(published) == digest

    config = detect_config({key: torch.empty(shape, device="meta") for key, shape in published.items()})
    assert config.version == version and config.axes_dim == [16, 56, 56] and config.connector_heads == 32 and config.num_heads == 24
    built = model_shapes(config)
    restored = {key.replace("_norm.weight", "_norm.scale"): shape for key, shape in built.items()}
    assert key_hash(restored) == digest
    expected_parameters = {"v1.0": 12_427_800_385, "v1.1": 12_427_800_384}
    assert sum(torch.Size(shape).numel() for shape in built.values()) == expected_parameters[version]


def test_all_layers_are_expected_with_dynamic_vram(files, monkeypatch):
    """With it the host's own layers have no weights before they are loaded."""
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    weights = load_file(files["v1.1"])
    assert set(model_shapes(detect_config(weights))) == {key.replace("_norm.scale", "_norm.weight") for key in weights}


@pytest.mark.parametrize("dtype, packed", [(torch.uint8, 2), (torch.int8, 1), (FLOAT8, 1)])
def test_only_uint8_weights_are_packed(dtype, packed):
    shapes = tiny_models.transformer_shapes("v1.1", tiny_models.TINY_TRANSFORMER)
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    for key in ("img_in.weight", "txt_in.weight", CONNECTOR_KEY):
        rows, columns = shapes[key]
        weights[key] = torch.empty((rows, columns // packed), dtype=dtype, device="meta")
    config = detect_config(weights)
    assert (config.in_channels, config.context_in_dim, config.connector_in_channels) == (16, 128, 64)


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_version_is_detected_and_can_be_overridden(files, version):
    other = {"v1.0": "v1.1", "v1.1": "v1.0"}[version]
    detected, overridden = load_model(files[version]), load_model(files[version], other)
    assert detected.model.diffusion_model.version == version and overridden.model.diffusion_model.version == other
    assert (predict(detected) - predict(overridden)).abs().max() > 1e-3


def test_stock_loader_recognises_the_model(files):
    register()
    model = comfy.sd.load_diffusion_model(str(files["v1.1"]))
    assert isinstance(model.model, Step1XEditModel) and isinstance(model.model.model_config, Step1XEdit)
    assert torch.equal(predict(model), predict(load_model(files["v1.1"])))


def test_stock_loader_still_takes_flux_for_flux(files, tmp_path):
    register()
    size = tiny_models.TransformerSize(
        hidden=128, head_dim=128, depth=1, depth_single=1, text=64, connector=128, connector_depth=1, vector=32
    )
    flux = tiny_models.transformer_shapes("v1.1", size)
    path = tmp_path / "flux.safetensors"
    save_file(tiny_models.random_weights({k: s for k, s in flux.items() if not k.startswith("connector.")}, seed=0), path)
    assert not isinstance(comfy.sd.load_diffusion_model(str(path)).model, Step1XEditModel)
    with pytest.raises(Step1XError, match="is a FLUX model"):
        load_model(path)


def test_plain_fp8_file_and_fp8_weight_dtype_compute_the_same(files, tmp_path):
    path = tmp_path / "fp8.safetensors"
    save_file({k: v.to(FLOAT8) for k, v in load_file(files["v1.0"]).items()}, path)
    from_file, cast = load_model(path), load_model(files["v1.0"], model_options={"dtype": FLOAT8})
    assert cast.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.dtype == FLOAT8
    assert cast.model.get_dtype_inference() != FLOAT8
    # An initial scale_factor of -0.91 is -0.9375 in e4m3: the factor falls from 0.09 to 0.0625 as in the official code.
    assert float(cast.model.diffusion_model.connector.scale_factor.float()) == -0.9375
    loops = [edit(m) for m in (from_file, cast, load_model(files["v1.0"]))]
    assert (loops[0] - loops[1]).norm() / loops[1].norm() < 2e-2
    assert 1e-3 < (loops[2] - loops[1]).norm() / loops[2].norm() < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_close_to_float32(files, tmp_path, dtype):
    path = tmp_path / "half-v1.1.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(files["v1.1"]).items()}, path)
    expected = edit(load_model(files["v1.1"]))
    assert 0 < (edit(load_model(path)) - expected).norm() / expected.norm() < 0.05


def test_partly_loaded_model_computes_the_same(files):
    """Low VRAM: most layers stay on the offload device and are cast when they are used."""
    whole, partly = load_model(files["v1.0"]), load_model(files["v1.0"])
    partly.load(torch.device("cpu"), lowvram_model_memory=200_000)
    assert partly.model.model_lowvram
    assert torch.equal(predict(partly), predict(whole))


def test_room_is_made_before_matrices_go_to_the_card_to_be_scaled(files, monkeypatch):
    weights, calls, convert = load_file(files["v1.1"]), [], quantising.converted
    device = comfy.model_management.get_torch_device()
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda size, device, *args, **kwargs: calls.append((size, device)))
    monkeypatch.setattr(quantising, "converted", lambda name, tensor, *args: calls.append(tensor.numel()) or convert(name, tensor, *args))
    quantised(weights, "fp8")
    (size, where), *numbers = calls
    assert where == device and numbers and size >= 4 * 4 * max(numbers)


def test_scaled_fp8_file_loads_through_the_hosts_quantised_format(files, tmp_path):
    weights = load_file(files["v1.1"])
    scaled = {"scaled_fp8": torch.zeros(2, dtype=FLOAT8)}
    for key, weight in weights.items():
        if "_blocks." in key and weight.ndim == 2:
            scale = weight.abs().max() / 448
            scaled[key] = (weight / scale).to(FLOAT8)
            scaled[key.removesuffix("weight") + "scale_weight"] = scale
        else:
            scaled[key] = weight
    path = tmp_path / "scaled-v1p1.safetensors"
    save_file(scaled, path)
    found, expected = edit(load_model(path)), edit(load_model(files["v1.1"]))
    assert 0 < (found - expected).norm() / expected.norm() < 0.2


@pytest.fixture(scope="module")
def repository(files, tmp_path_factory):
    return diffusers_repository(tmp_path_factory.mktemp("diffusers") / "Step1X-Edit-v1p1-diffusers", to_diffusers(load_file(files["v1.1"])))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, FLOAT8])
def test_fp8_scaled_packs_the_large_matrices_while_loading(files, tmp_path, stored):
    weights = {key: tensor.to(stored) for key, tensor in load_file(files["v1.1"]).items()}
    path = tmp_path / "step1x-edit-v1p1-stored.safetensors"
    save_file(weights, path)
    with torch.inference_mode():
        patcher = load_model(path, quantise="fp8")
        rebuilt = patcher.cached_patcher_init[0](*patcher.cached_patcher_init[1])
    for model in (patcher, rebuilt):
        packed = {
            name
            for name, layer in model.model.diffusion_model.named_modules()
            if isinstance(getattr(layer, "weight", None), comfy.quant_ops.QuantizedTensor)
        }
        assert packed == {key.removesuffix(".weight") for key in weights if MODEL_LAYERS.fullmatch(key)} and len(packed) == 2 * 8 + 2 * 2
    exact = predict(load_model(path))
    # What is e4m3 in the file keeps its bits; without fp8 tensor cores the inputs are not rounded either.
    error = (predict(patcher) - exact).norm() / exact.norm()
    assert error == 0 if stored == FLOAT8 else 0 < error < 0.1


def test_fp8_scaled_leaves_a_scaled_file_as_it_is(files, tmp_path):
    path = tmp_path / "step1x-edit-v1p1-scaled.safetensors"
    with torch.inference_mode():
        save_file(quantised(load_file(files["v1.1"]), "fp8"), path)
        assert torch.equal(predict(load_model(path, quantise="fp8")), predict(load_model(path)))


def test_diffusers_folder_with_shards_equals_the_original_file(files, repository):
    expected = predict(load_model(files["v1.1"]))
    assert torch.equal(predict(load_model(repository)), expected)
    assert torch.equal(predict(load_model(repository / "transformer")), expected)


def test_single_file_in_the_diffusers_layout(files, tmp_path):
    weights = to_diffusers(load_file(files["v1.1"]))
    original = load_file(files["v1.1"])
    assert {k: v.tolist() for k, v in diffusers_to_original(dict(weights)).items()} == {k: v.tolist() for k, v in original.items()}
    save_file(weights, tmp_path / "single_v1_1.safetensors")
    assert torch.equal(predict(load_model(tmp_path / "single_v1_1.safetensors")), predict(load_model(files["v1.1"])))


def test_foreign_diffusers_files_are_refused_before_they_are_converted(files, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "diffusers_to_original", lambda state_dict: pytest.fail("converted"))
    flux = {k: v for k, v in to_diffusers(load_file(files["v1.1"])).items() if not k.startswith("connector.")}
    other = {k: v for k, v in flux.items() if not k.startswith("single_")}
    for weights, message in ((flux, "is a FLUX model"), (other, "is not a Step1X-Edit model")):
        save_file(weights, tmp_path / "foreign.safetensors")
        with pytest.raises(Step1XError, match=message):
            load_model(tmp_path / "foreign.safetensors")


def test_folder_whose_class_and_weights_contradict_needs_a_version(files, tmp_path):
    folder = diffusers_repository(tmp_path / "mixed", to_diffusers(load_file(files["v1.0"])))
    with pytest.raises(
        Step1XError,
        match="Step1XEditPipeline is not v1.0, but the weights contain connector.scale_factor, which only v1.0 has",
    ):
        load_model(folder)
    assert load_model(folder, "v1.0").model.diffusion_model.version == "v1.0"


def test_suffixes_are_compared_in_any_case(repository, files, tmp_path):
    folder = tmp_path / "loud"
    folder.mkdir()
    for path in (repository / "transformer").iterdir():
        name = path.name.replace(".safetensors", ".SAFETENSORS")
        (folder / name).write_bytes(
            path.read_bytes().replace(b'.safetensors"', b'.SAFETENSORS"')
            if path.suffix == ".json"
            else path.read_bytes()
        )
    assert is_model_folder(folder) and len(shard_files(folder)) == 3
    (folder / "diffusion_pytorch_model.SAFETENSORS.index.json").unlink()
    assert is_model_folder(folder) and len(shard_files(folder)) == 3


def test_choices_list_nested_folders_and_no_shards(repository, files, tmp_path, monkeypatch):
    root, diffusers = tmp_path / "diffusion_models", tmp_path / "diffusers"
    shutil.copytree(repository / "transformer", root / "a" / "b" / "folder")
    shutil.copytree(repository / "transformer", root / "a" / "b" / "c" / "too_deep")
    shutil.copytree(repository, diffusers / "stepfun" / "repository")
    shutil.copytree(repository / "transformer", diffusers / "other" / "vae")
    (diffusers / "other" / "model_index.json").write_text("{}")
    shutil.copy(files["v1.1"], root / "a" / "single.Safetensors")
    for name, folder in (("diffusion_models", root), ("diffusers", diffusers)):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folder)], {".safetensors", ".Safetensors", ""}))
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    found = choices("diffusion_models", "transformer")
    assert found == {"a/b/folder/": str(root / "a" / "b" / "folder"), "stepfun/repository/": str(diffusers / "stepfun" / "repository"),
                     os.path.join("a", "single.Safetensors"): str(root / "a" / "single.Safetensors")}


def test_a_model_saved_by_the_host_loads_again(files, tmp_path):
    model = load_model(files["v1.0"])
    path = tmp_path / "saved.safetensors"
    comfy.utils.save_torch_file(
        {
            k: v.contiguous()
            for k, v in model.model.state_dict_for_saving(model.model.diffusion_model.state_dict()).items()
        },
        str(path),
    )
    again, stock = load_model(path), comfy.sd.load_diffusion_model(str(path))
    assert again.model.diffusion_model.version == stock.model.diffusion_model.version == "v1.0"
    assert torch.equal(predict(again), predict(model)) and torch.equal(predict(stock), predict(model))


def test_all_in_one_checkpoint_of_the_host(files, models, tmp_path):
    """What the stock CheckpointSave writes: model, text encoder and VAE in one file, for the stock Load Checkpoint."""
    config = {**tiny_models.TINY_MLLM, "hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 152064,
              "vision_config": {**tiny_models.TINY_MLLM["vision_config"], "hidden_size": 64, "num_heads": 16, "depth": 1}}
    text = tiny_models.random_weights(tiny_models.mllm_shapes(config, lm_head=False), seed=2)
    model = load_file(files["v1.1"])
    vae = load_file(models / "vae" / tiny_models.VAE_FILE)
    path = tmp_path / "all_in_one.safetensors"
    save_file(
        {
            **{f"model.diffusion_model.{k}": v for k, v in model.items()},
            **{f"text_encoders.qwen25_7b.transformer.{k}": v for k, v in text.items()},
            **{f"vae.{k}": v for k, v in vae.items()},
        },
        path,
    )
    register()
    loaded, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    assert isinstance(loaded.model, Step1XEditModel) and torch.equal(predict(loaded), predict(load_model(files["v1.1"])))
    found = clip.cond_stage_model.qwen25_7b.transformer.state_dict()
    assert torch.equal(found["visual.merger.mlp.2.weight"].float(), text["visual.merger.mlp.2.weight"])


def test_patcher_can_be_rebuilt_for_another_device(files):
    model = load_model(files["v1.1"], "v1.0")
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model.diffusion_model.version == "v1.0" and torch.equal(predict(again), predict(model))
    assert model.clone().cached_patcher_init == model.cached_patcher_init


def broken(path, content):
    path.write_bytes(content)
    return path


def test_damaged_and_foreign_files_are_named_in_one_sentence(files, tmp_path):
    data = files["v1.1"].read_bytes()
    weights = load_file(files["v1.1"])
    cases = [
        (broken(tmp_path / "truncated.safetensors", data[:len(data) // 2]), "damaged, incomplete or not a safetensors"),
        (broken(tmp_path / "page.safetensors", b"<!DOCTYPE html><html>Not found</html>"), "damaged, incomplete or not a safetensors"),
        (broken(tmp_path / "empty.safetensors", b""), "damaged, incomplete or not a safetensors"),
        (broken(tmp_path / "model.ckpt", b"\x80\x02}q\x00."), "not a safetensors file"),
        (tmp_path / "gone.safetensors", "does not exist"),
    ]
    lacking = {k: v for k, v in weights.items() if k != "single_blocks.1.linear2.bias"}
    save_file(lacking, tmp_path / "lacking-v1p1.safetensors")
    cases.append((tmp_path / "lacking-v1p1.safetensors", "lacks 1 of .* single_blocks.1.linear2.bias"))
    save_file({k: v for k, v in weights.items() if k != "double_blocks.0.img_mlp.0.weight"}, tmp_path / "headless-v1p1.safetensors")
    cases.append((tmp_path / "headless-v1p1.safetensors", "lacks the tensor double_blocks.0.img_mlp.0.weight"))
    save_file({**weights, "connector.S.c_embedder.linear_1.weight": torch.zeros(128, 32)}, tmp_path / "shape-v1p1.safetensors")
    cases.append((tmp_path / "shape-v1p1.safetensors", r"linear_1.weight has shape \[128, 32\], expected \[128, 64\]"))
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "llm.safetensors")
    cases.append((tmp_path / "llm.safetensors", "not a Step1X-Edit model"))
    for path, message in cases:
        with pytest.raises(Step1XError, match=message) as error:
            load_model(path)
        assert str(error.value).rstrip().endswith((".", ".)"))
    assert torch.isfinite(predict(load_model(files["v1.1"]))).all()


def test_broken_folders_are_named(repository, files, tmp_path):
    weights = to_diffusers(load_file(files["v1.1"]))
    folder = diffusers_repository(tmp_path / "missing", weights)
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(Step1XError, match="00002-of-00003.safetensors is missing"):
        load_model(folder)

    index = repository / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("../../secret.safetensors", "/etc/passwd", "shard.bin", "..\\up.safetensors/", 7):
        (tmp_path / "evil").mkdir(exist_ok=True)
        table = json.loads(index.read_text())
        table["weight_map"]["img_in.weight"] = name
        (tmp_path / "evil" / index.name).write_text(json.dumps(table))
        with pytest.raises(Step1XError, match="not a safetensors file of that folder"):
            shard_files(tmp_path / "evil")

    (tmp_path / "evil" / index.name).write_text("{")
    with pytest.raises(Step1XError, match="could not be read"):
        shard_files(tmp_path / "evil")
    (tmp_path / "bare").mkdir()
    with pytest.raises(Step1XError, match="no safetensors file"):
        load_model(tmp_path / "bare")


def test_scales_in_the_diffusers_layout_are_refused_instead_of_dropped(files, tmp_path):
    """Three matrices with a scale each become one; without the scales the model would draw noise."""
    weights = to_diffusers(load_file(files["v1.1"]))
    scales = {f"transformer_blocks.0.attn.{name}.scale_weight": torch.tensor(0.5) for name in ("to_q", "to_k", "to_v")}
    save_file({**weights, **scales}, tmp_path / "scaled-v1p1.safetensors")
    with pytest.raises(Step1XError, match="quantised in the diffusers layout"):
        load_model(tmp_path / "scaled-v1p1.safetensors")


def test_unknown_version_is_refused(files):
    with pytest.raises(Step1XError, match="Choose one of"):
        load_model(files["v1.1"], "v9")
