"""GGUF files in our own loaders: transformer, and language model with its mmproj file, as llama.cpp's package writes them."""

import builtins
import json

import folder_paths
import gguf_writer
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from step1x_core.checkpoints.gguf_files import find_mmproj, language_names, read_language_model, vision_names
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.folders import choices, resolve
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.prompts.encoding import encode_edit


@pytest.fixture(scope="module")
def gguf():
    package = pytest.importorskip("gguf", reason="the package gguf is not installed: no GGUF file was read")
    import gguf.quants  # noqa: F401

    return package


@pytest.fixture(scope="module")
def language_model(gguf, models, tmp_path_factory):
    """A Q8_0 file with its mmproj, and the same weights as a safetensors file."""
    folder, config = tmp_path_factory.mktemp("gguf"), tiny_models.TINY_MLLM
    weights = load_file(models / "text_encoders" / tiny_models.MLLM_FILE)
    path = gguf_writer.write_language_model(gguf, folder, weights, config)
    plain, found = tmp_path_factory.mktemp("plain"), read_language_model(path)[0]
    assert found.keys() == weights.keys() and all(found[key].shape == tensor.shape for key, tensor in weights.items())
    (plain / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.bfloat16() for key, tensor in found.items()}, plain / "model.safetensors")
    return path, plain, weights, found


def test_the_language_model_is_that_of_the_safetensors_file(language_model):
    _, _, weights, found = language_model
    worst = max((found[key].float() - weights[key].float()).abs().max() / weights[key].float().abs().max() for key in weights)
    assert 0 < worst < 0.02
    # Where the file is exact, so are we: patch kernel, joined q, k and v, and norms.
    for key in ("visual.patch_embed.proj.weight", "visual.blocks.1.attn.qkv.bias", "model.layers.1.input_layernorm.weight"):
        assert torch.allclose(found[key].float(), weights[key].float(), atol=1e-3), key


@pytest.fixture(scope="module")
def clips(language_model):
    """The text encoder for v1.2, from the GGUF files and from the same weights in safetensors."""
    return [load_text_encoder(source, "v1.2") for source in language_model[:2]]


@pytest.mark.once
def test_it_encodes_prompts_as_the_same_weights_in_safetensors(clips, vae, photo):
    with torch.inference_mode():
        found, expected = (encode_edit(clip, vae, photo, "make the \"cup\" red", "", 128)[0][0][0] for clip in clips)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)


@pytest.mark.once
def test_it_writes_as_they_do(clips):
    with torch.inference_mode():
        replies = [clip.generate(clip.tokenize("a cup"), do_sample=False, max_length=4) for clip in clips]
    assert replies[0] == replies[1] and len(replies[0]) > 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_a_transformer_has_the_weights_that_the_file_stands_for(gguf, tmp_path, kind):
    weights = tiny_models.random_weights(tiny_models.transformer_shapes("v1.1", tiny_models.TINY_TRANSFORMER), seed=1)
    stored = gguf_writer.write(gguf, tmp_path / f"step1x-edit-v1p1-{kind}.gguf", "flux", weights, kind, {})
    network = load_model(tmp_path / f"step1x-edit-v1p1-{kind}.gguf").model.diffusion_model
    assert network.version == "v1.1"
    for name in ("double_blocks.0.img_attn.qkv.weight", "connector.S.input_embedder.weight", "img_in.bias"):
        found = network.get_parameter(name).float()
        assert torch.allclose(found, stored[name], atol=0.005 * stored[name].abs().max()), name


def test_the_loaders_offer_models_and_no_mmproj(tmp_path, monkeypatch):
    for kind in ("text_encoders", "diffusion_models"):
        (tmp_path / kind / "sub").mkdir(parents=True)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
        monkeypatch.delitem(folder_paths.filename_list_cache, kind, raising=False)
    for name in ("text_encoders/qwen-Q8_0.gguf", "text_encoders/qwen-mmproj-F16.gguf", "diffusion_models/sub/step1x.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "qwen-Q8_0.gguf" in choices("text_encoders", "text_encoder")
    assert not any("mmproj" in name for name in choices("text_encoders", "text_encoder"))
    assert resolve("sub/step1x.GGUF", "diffusion_models", "transformer") == str(tmp_path / "diffusion_models/sub/step1x.GGUF")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "step1x-edit-v1p1-Q8_0.gguf").write_bytes(b"GGUF")
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "gguf":
            raise ImportError("No module named 'gguf'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(Step1XError, match="needs the Python package 'gguf'.*python -m pip install gguf"):
        load_model(tmp_path / "step1x-edit-v1p1-Q8_0.gguf")


@pytest.mark.once
def test_of_several_mmproj_files_the_alike_one_is_taken(tmp_path):
    model = tmp_path / "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf"
    with pytest.raises(Step1XError, match="has no vision tower.*Put the mmproj file"):
        find_mmproj(model)
    names = ["mmproj-F16.gguf", "Qwen2.5-VL-7B-Instruct-mmproj-f16.gguf", "gemma-3-4b-mmproj-f16.gguf"]
    for name in names:
        (tmp_path / name).touch()
    assert find_mmproj(model).name == names[1]
    (tmp_path / "Qwen2.5-VL-7B-Instruct-mmproj-Q8_0.gguf").touch()
    assert find_mmproj(model).name == names[1]
    (tmp_path / names[1]).unlink()
    (tmp_path / "Qwen2.5-VL-7B-Instruct-mmproj-Q6_K.gguf").touch()
    with pytest.raises(Step1XError, match="several mmproj files"):
        find_mmproj(model)


@pytest.mark.once
def test_a_joined_qkv_and_unknown_names_are_kept():
    tensors = {"v.blk.3.attn_qkv.weight": torch.zeros(6, 2), "v.blk.0.attn_q.weight": torch.zeros(2, 2)}
    assert vision_names(tensors).keys() == {"visual.blocks.3.attn.qkv.weight", "v.blk.0.attn_q.weight"}
    assert language_names({"rope_freqs.weight": torch.zeros(1)}).keys() == {"rope_freqs.weight"}


def test_another_models_file_is_named_as_such(gguf, language_model, tmp_path):
    path, _, weights, _ = language_model
    (tmp_path / "mmproj-F16.gguf").write_bytes((path.parent / "Qwen2.5-VL-tiny-mmproj-F16.gguf").read_bytes())
    gguf_writer.write(gguf, tmp_path / "other.gguf", "llama", {"output_norm.weight": torch.ones(64)}, "F16", {})
    with pytest.raises(Step1XError, match="other.gguf is not a Qwen2.5-VL model: its architecture is 'llama'"):
        load_text_encoder(tmp_path / "other.gguf")
    gguf_writer.write(gguf, tmp_path / "wide.gguf", "qwen2vl", {"output_norm.weight": torch.ones(96)}, "F16", {})
    with pytest.raises(Step1XError, match="mmproj-F16.gguf does not belong to wide.gguf"):
        load_text_encoder(tmp_path / "wide.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Step1XError, match="cut.gguf is damaged"):
        load_text_encoder(tmp_path / "cut.gguf")
    (tmp_path / "page.gguf").write_bytes(b"<html>")
    with pytest.raises(Step1XError, match="page.gguf is damaged, incomplete or not a GGUF file"):
        load_model(tmp_path / "page.gguf")
