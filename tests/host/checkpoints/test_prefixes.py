"""Files of every known layout load as the plain file does; what is unknown is refused; versions told by names; cut prompts said."""

import json
import logging

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from step1x_core.checkpoints.language_model import normalize_keys
from step1x_core.checkpoints.prefixes import TRANSFORMER_PREFIXES, transformer_names
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints import loading
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder, mllm_state_dict, model_state_dict, naming
from step1x_core.prompts.cut import say_cut

STACKED = ("module._orig_mod.", "model.diffusion_model.", "base_model.model.", "pipe.dit.", "model.model.")


@pytest.fixture(scope="module")
def plain(models):
    """The weights of a v1.1 file, and what the loader makes of it."""
    path = models / "diffusion_models" / tiny_models.V11_FILE
    return load_file(path), model_state_dict(loading.find_checkpoint(path, "transformer"))[0]


def same(found, expected):
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def read_as(tmp_path, weights, version="v1.1"):
    path = tmp_path / "renamed.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
    return model_state_dict(loading.find_checkpoint(path, "transformer"), version)[0]


@pytest.mark.parametrize("prefix", [*(f"{name}." for name in TRANSFORMER_PREFIXES), "_orig_mod.", *STACKED])
def test_a_transformer_under_a_known_prefix_is_the_plain_one(plain, tmp_path, prefix):
    # Without a prefix nothing tells what belongs to another model: the host leaves out what it does not know.
    others = (
        {}
        if prefix == "_orig_mod."
        else {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "other.connector.bias": torch.zeros(1)}
    )
    same(read_as(tmp_path, {prefix + key: tensor for key, tensor in plain[0].items()} | others), plain[1])


def test_a_prefix_in_front_of_each_compiled_block_goes(plain, tmp_path):
    weights = {key.replace("double_blocks.0.", "double_blocks.0._orig_mod."): tensor for key, tensor in plain[0].items()}
    assert weights.keys() != plain[0].keys()
    same(read_as(tmp_path, weights), plain[1])


@pytest.mark.parametrize("prefix", ["ema.", "model_ema.diffusion_model.", "teacher.net.", "model/"])
def test_an_unknown_prefix_is_refused(plain, tmp_path, prefix):
    with pytest.raises(Step1XError, match="is not a Step1X-Edit model"):
        read_as(tmp_path, {prefix + key: tensor for key, tensor in plain[0].items()})


def test_two_transformers_in_one_file_are_refused(plain, tmp_path):
    weights = {prefix + key: tensor.clone() for key, tensor in plain[0].items() for prefix in ("net.", "model.diffusion_model.")}
    with pytest.raises(Step1XError, match="contains 2 transformers, under 'model.diffusion_model.' and 'net.'"):
        read_as(tmp_path, weights)


def test_flux_is_named_under_any_prefix(plain, tmp_path):
    weights = {f"net.{key}": tensor for key, tensor in plain[0].items() if "connector" not in key}
    with pytest.raises(Step1XError, match="is a FLUX model"):
        read_as(tmp_path, weights)


def test_metadata_names_lose_what_the_tensors_lose(plain, tmp_path):
    key = next(key for key in plain[0] if key.endswith("img_attn.qkv.weight"))
    assert transformer_names("x", [f"net.{key}", "net.connector.S.input_embedder.weight"])[f"net.{key}"] == key


LAYOUTS = {
    "hugging_face": ("model.", "visual.", "lm_head."),
    "hugging_face_new": ("model.language_model.", "model.visual.", "lm_head."),
    "bare": ("language_model.", "visual.", "lm_head."),
    "nested": ("language_model.model.", "visual.", "language_model.lm_head."),
    "comfyui_checkpoint": (
        "text_encoders.qwen25_7b.transformer.model.",
        "text_encoders.qwen25_7b.transformer.visual.",
        "text_encoders.qwen25_7b.transformer.lm_head.",
    ),
    "peft": ("base_model.model.model.", "base_model.model.visual.", "base_model.model.lm_head."),
    "peft_new": (
        "base_model.model.model.language_model.",
        "base_model.model.model.visual.",
        "base_model.model.lm_head.",
    ),
    "compiled": ("_orig_mod.model.", "_orig_mod.visual.", "_orig_mod.lm_head."),
    "pipeline_folder": ("text_encoder.model.", "text_encoder.visual.", "text_encoder.lm_head."),
    "ddp": ("module.model.", "module.visual.", "module.lm_head."),
}


def in_layout(weights, layout):
    parts = dict(zip(("model.", "visual.", "lm_head."), LAYOUTS[layout]))
    return {parts[part] + key[len(part):]: tensor for key, tensor in weights.items() for part in parts if key.startswith(part)}


@pytest.fixture(scope="module")
def language(models):
    return load_file(models / "text_encoders" / tiny_models.MLLM_FILE)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_language_model_of_any_layout_is_the_plain_one(language, models, tmp_path, layout, head):
    weights = {key: tensor for key, tensor in language.items() if head or not key.startswith("lm_head.")}
    expected = {f"model.{key}" if key.startswith("lm_head.") else key: tensor for key, tensor in weights.items()}
    same(normalize_keys(in_layout(weights, layout)), expected)
    path, config = tmp_path / "renamed.safetensors", tiny_models.TINY_MLLM
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(in_layout(weights, layout), path)
    state_dict, found = mllm_state_dict(loading.find_checkpoint(tmp_path, "text_encoder"))
    assert found.lm_head == head
    same({key: tensor for key, tensor in state_dict.items() if key in expected}, expected)


def test_of_a_whole_checkpoint_only_the_language_model_is_taken(language):
    weights = in_layout(language, "comfyui_checkpoint")
    assert normalize_keys(weights | {"model.diffusion_model.img_in.weight": torch.zeros(1)}).keys() == normalize_keys(weights).keys()


def test_a_missing_head_is_said_where_text_is_asked_for(language, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.TINY_MLLM | {"tie_word_embeddings": False}), encoding="utf-8")
    save_file(
        in_layout({key: tensor for key, tensor in language.items() if not key.startswith("lm_head.")}, "nested"),
        tmp_path / "a.safetensors",
    )
    clip = load_text_encoder(tmp_path)
    with pytest.raises(Step1XError, match="has no language-model head"):
        clip.cond_stage_model.qwen25_7b.check_can_generate()


def test_an_error_in_our_own_code_is_not_put_down_to_the_file(models, monkeypatch):
    """Whatever raises it, the sentence says what happened and keeps the cause."""
    def changed(*args, **kwargs):
        raise TypeError("load_diffusion_model_state_dict() got an unexpected keyword argument 'metadata'")

    monkeypatch.setattr(loading.comfy.sd, "load_diffusion_model_state_dict", changed)
    with pytest.raises(Step1XError, match="could not be loaded .TypeError: .*unexpected keyword") as told:
        load_model(models / "diffusion_models" / tiny_models.V11_FILE)
    assert (
        isinstance(told.value.__cause__, TypeError)
        and "download it again" not in str(told.value)
        and "is damaged" not in str(told.value)
    )
    monkeypatch.undo()

    monkeypatch.setattr(loading, "check_weights", lambda *args: None.nothing)
    for load, file in (
        (load_model, ("diffusion_models", tiny_models.V11_FILE)),
        (load_text_encoder, ("text_encoders", tiny_models.MLLM_FILE)),
    ):
        with pytest.raises(AttributeError):
            load(models.joinpath(*file))


def test_running_out_of_memory_and_our_own_sentences_pass(monkeypatch):
    for error in (Step1XError("a sentence"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error)) as told:
            with naming("file"):
                raise error
        assert told.value is error


@pytest.mark.parametrize("layout, limit", [("v1.1", 640 + 217), ("v1.2", 90 + 2048)])
def test_a_cut_prompt_is_said_once_with_how_many_tokens(float_file, caplog, layout, limit):
    clip, picture = load_text_encoder(float_file, layout), torch.zeros(1, 280, 280, 3)
    caplog.set_level(logging.WARNING)
    say_cut.cache_clear()
    for words in (20, 3000):
        for _ in range(2):
            clip.tokenize("cat " * words, images=[picture])
    (record,) = [record for record in caplog.records if "too long" in record.message]
    cut = record.args[0]
    # One word more is one token more that is cut, and the first that is cut is the one after the last that has room.
    fits = 3000 - cut
    caplog.clear()
    clip.tokenize("cat " * fits, images=[picture])
    assert not [record for record in caplog.records if "its last" in record.message]
    clip.tokenize("cat " * (fits + 2), images=[picture])
    assert [record.args[0] for record in caplog.records if "its last" in record.message] in ([1], [2])
    assert 0 < fits < limit
