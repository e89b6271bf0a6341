"""v1.2's network, versions, defaults and guidance through the pack's loader and the host's sampler."""

import json
import shutil

import comfy.sd
import pytest
import tiny_models
import torch
from diffusers_layout import diffusers_repository, to_diffusers
from safetensors.torch import load_file, save_file

from step1x_core.checkpoints.detection import CONFIG_KEY, detect_config
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model, load_own_vae, load_text_encoder, load_vae
from step1x_core.host.network.transformer import official_time, position_bits
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.sampling.few_steps import version_defaults
from step1x_core.host.sampling.sampler import HOOKS, flow_sigmas, sample
from step1x_core.sampling.guidance import NormLimiter

SIZE_LEVEL = 192


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def v12_file(models):
    return models / "diffusion_models" / tiny_models.V12_FILE


@pytest.fixture(scope="module")
def v12(v12_file):
    return load_model(v12_file)


@pytest.fixture(scope="module")
def v12_clip(models):
    return load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")


@pytest.fixture(scope="module")
def edit(v12_clip, vae, photo):
    return encode_edit(v12_clip, vae, photo, 'write "OPEN" on the cup', "", SIZE_LEVEL)


def run(model, edit, steps=2, cfg=6.0, seed=7):
    positive, negative, latent = edit
    return sample(
        model, positive, negative, latent, flow_sigmas(steps, latent["samples"]), cfg, seed, callback=lambda *args: None
    )["samples"]


def without_mapping(path, target):
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith("text_token_mapping")}, target)
    return target


def version_of(*args):
    return load_model(*args).model.diffusion_model.version


def test_version_comes_from_the_tensors_then_the_class_then_the_name(v12_file, tmp_path):
    assert version_of(v12_file) == "v1.2"
    weights = load_file(v12_file)
    plain = {name: tensor for name, tensor in weights.items() if not name.startswith("text_token_mapping")}
    cases = [
        (weights, "Step1XEditPipelineV1P2", "Step1X-Edit-v1p2", "v1.2"),
        (weights, "Step1XEditPipelineV1P2", "Step1X-Edit-v1p2-preview", "v1.2-preview"),
        (plain, "Step1XEditPipelineV1P2", "anything", "v1.2-preview"),
        (plain, "Step1XEditPipeline", "other", "v1.1"),
    ]
    for tensors, pipeline, name, version in cases:
        assert version_of(diffusers_repository(tmp_path / name, to_diffusers(tensors), pipeline=pipeline)) == version
    for name, version in (
        ("step1x-edit-v1p2-preview-fp8", "v1.2-preview"),
        ("Step1X_Edit_v1.2", "v1.2-preview"),
        ("step1x-edit-v1p1-official", "v1.1"),
        ("v1_1", "v1.1"),
    ):
        assert version_of(without_mapping(v12_file, tmp_path / f"{name}.safetensors")) == version
    # The file's own name outweighs its folder's.
    for folder, name, version in (
        ("ReasonEdit", "step1x-edit-v1p1", "v1.1"),
        ("v1.1", "converted-v1p2", "v1.2-preview"),
        ("Step1X-v1p1", "model", "v1.1"),
    ):
        (tmp_path / folder).mkdir()
        assert version_of(without_mapping(v12_file, tmp_path / folder / f"{name}.safetensors")) == version


def test_alike_weights_without_a_mark_ask_for_the_version(v12_file, tmp_path):
    path = without_mapping(v12_file, tmp_path / "converted.safetensors")
    with pytest.raises(
        Step1XError,
        match="converted.safetensors is Step1X-Edit v1.1 or v1.2-preview.*Choose the version in 'Load Step1X-Edit Model'",
    ):
        load_model(path)
    assert [version_of(path, version) for version in ("v1.1", "v1.2-preview", "v1.2")] == ["v1.1", "v1.2-preview", "v1.2"]
    save_file(load_file(path), path, metadata={CONFIG_KEY: json.dumps({"version": "v1.2-preview"})})
    assert version_of(path) == "v1.2-preview"


def test_a_version_that_the_tensors_contradict_is_refused(v12_file, models, tmp_path):
    with pytest.raises(Step1XError, match="set to v1.1, but the weights contain text_token_mapping.weight, which only v1.2 has"):
        load_model(v12_file, "v1.1")
    with pytest.raises(Step1XError, match="set to v1.2, but the weights contain connector.scale_factor, which only v1.0 has"):
        load_model(models / "diffusion_models" / tiny_models.V10_FILE, "v1.2")
    mixed = diffusers_repository(tmp_path / "mixed", to_diffusers(load_file(v12_file)))
    with pytest.raises(
        Step1XError,
        match="Step1XEditPipeline is v1.1, but the weights contain text_token_mapping.weight, which only v1.2 has",
    ):
        load_model(mixed)
    assert version_of(mixed, "v1.2") == "v1.2"
    foreign = diffusers_repository(tmp_path / "foreign", to_diffusers(load_file(v12_file)), pipeline="FluxPipeline")
    with pytest.raises(Step1XError, match="belongs to the pipeline FluxPipeline"):
        load_model(foreign)


def save_as_the_host_does(patcher, path):
    save_file(
        {
            name: tensor.contiguous()
            for name, tensor in patcher.model.state_dict_for_saving(patcher.model.diffusion_model.state_dict()).items()
        },
        path,
    )
    return path


def test_a_known_version_survives_the_hosts_model_save_and_a_guess_does_not(v12_file, tmp_path):
    alike = without_mapping(v12_file, tmp_path / "alike.safetensors")
    saved = save_as_the_host_does(load_model(alike, "v1.2-preview"), tmp_path / "saved.safetensors")
    assert version_of(saved) == comfy.sd.load_diffusion_model(str(saved)).model.diffusion_model.version == "v1.2-preview"
    assert version_of(save_as_the_host_does(load_model(saved), tmp_path / "again.safetensors")) == "v1.2-preview"
    assert version_of(saved, "v1.1") == "v1.1"

    guessed = comfy.sd.load_diffusion_model(str(alike))
    assert guessed.model.diffusion_model.version == "v1.1"
    with pytest.raises(Step1XError, match="v1.1 or v1.2-preview"):
        load_model(save_as_the_host_does(guessed, tmp_path / "guess.safetensors"))


def test_all_in_one_checkpoint_keeps_the_layout_also_when_the_text_encoder_is_loaded_anew(v12, tmp_path):
    config = {**tiny_models.TINY_MLLM, "hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1,
              "vision_config": {**tiny_models.TINY_MLLM["vision_config"], "hidden_size": 64, "num_heads": 16, "depth": 1}}
    text = tiny_models.random_weights(tiny_models.mllm_shapes(config, lm_head=False), seed=2)
    path = save_as_the_host_does(v12, tmp_path / "all_in_one.safetensors")
    save_file({**load_file(path), **{f"text_encoders.qwen25_7b.transformer.{name}": tensor for name, tensor in text.items()}}, path)
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)
    assert model.model.diffusion_model.version == "v1.2" and clip.tokenizer.layout.name == "v1.2"
    factory, arguments = clip.patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True).model
    assert torch.equal(again.qwen25_7b.transformer.model.norm.weight, clip.cond_stage_model.qwen25_7b.transformer.model.norm.weight)


def test_what_shapes_do_not_show_comes_from_the_folders_config(v12_file, tmp_path):
    root = diffusers_repository(tmp_path / "Step1X-Edit-v1p2", to_diffusers(load_file(v12_file)), pipeline="Step1XEditPipelineV1P2")
    config = {"axes_dims_rope": [8, 12, 12], "connector_heads_num": 4}
    (root / "transformer" / "config.json").write_text(json.dumps(config))
    network = load_model(root).model.diffusion_model
    assert network.pe_embedder.axes_dim == [8, 12, 12] and network.connector.S.individual_token_refiner.blocks[0].num_heads == 4


@pytest.mark.once
def test_another_models_repository_lends_its_text_encoder(models, tmp_path):
    folder = tmp_path / "Qwen-Image-Edit"
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPipeline"}))
    shutil.copy(models / "text_encoders" / tiny_models.MLLM_FILE, folder / "text_encoder" / "model.safetensors")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(tiny_models.TINY_MLLM))
    assert load_text_encoder(folder).tokenizer.layout.name == "v1.1" and load_text_encoder(folder, "v1.2").tokenizer.layout.name == "v1.2"


def test_whole_repository_loads_from_its_folders(v12_file, models, vae, photo, v12, edit, tmp_path):
    """Transformer shards, text encoder and VAE of one diffusers folder; the layout follows the pipeline's class."""
    root = diffusers_repository(tmp_path / "Step1X-Edit-v1p2", to_diffusers(load_file(v12_file)), pipeline="Step1XEditPipelineV1P2")
    (root / "text_encoder").mkdir()
    source = models / "text_encoders" / tiny_models.MLLM_FILE
    shutil.copy(source, root / "text_encoder" / "model.safetensors")
    (root / "text_encoder" / "config.json").write_text(json.dumps(tiny_models.TINY_MLLM))
    (root / "vae").mkdir()
    shutil.copy(models / "vae" / tiny_models.VAE_FILE, root / "vae" / "diffusion_pytorch_model.safetensors")
    (root / "vae" / "config.json").write_text("{}")

    clip, own_vae, model = load_text_encoder(root), load_own_vae(root), load_model(root)
    assert clip.tokenizer.layout.name == "v1.2"
    found = run(model, encode_edit(clip, own_vae, photo, 'write "OPEN" on the cup', "", SIZE_LEVEL))
    assert torch.equal(found, run(v12, edit))
    assert load_text_encoder(source).tokenizer.layout.name == "v1.1"
    assert load_text_encoder(root, "v1.1").tokenizer.layout.name == "v1.1"
    assert load_own_vae(v12_file) is None
    (root / "vae" / "config.json").unlink()
    assert load_own_vae(root) is None
    with pytest.raises(Step1XError, match="does not contain a VAE"):
        load_vae(v12_file)


def test_defaults_belong_to_the_version_and_given_values_are_kept(v12_file, models, v12, model, tmp_path):
    preview = load_model(without_mapping(v12_file, tmp_path / "preview.safetensors"))
    for patcher, defaults in ((v12, (50, 6.0)), (preview, (28, 4.0)), (model, (28, 6.0))):
        assert version_defaults(patcher, 0, 0.0) == defaults
        assert version_defaults(patcher, 12, 0.0) == (12, defaults[1]) and version_defaults(patcher, 0, 1.5) == (defaults[0], 1.5)


def test_limiter_acts_at_every_step_and_cfg_one_runs_no_unconditional_pass(v12, v12_clip, vae, photo, edit):
    (limiter,) = v12.model_options[HOOKS]
    assert limiter == NormLimiter(0.93 / 1000) and limiter.truncate < flow_sigmas(200, edit[2]["samples"])[-2]
    other = (edit[0], encode_edit(v12_clip, vae, photo, "x", "something else", SIZE_LEVEL)[1], edit[2])
    assert not torch.allclose(run(v12, edit), run(v12, other))
    assert torch.equal(run(v12, edit, cfg=1.0), run(v12, other, cfg=1.0))


def test_quoted_characters_reach_the_transformer_only_through_the_mapping(v12, edit):
    """Without the mask, or with other embeddings under it, another picture; other embeddings elsewhere change nothing."""
    expected = run(v12, edit)

    def changed(**extra):
        return run(v12, ([[edit[0][0][0], edit[0][0][1] | extra]], *edit[1:]))

    given = edit[0][0][1]
    mask = given["text_mask"]
    assert mask.sum() == 4
    noise = torch.randn_like(given["text_embeds"])
    assert torch.equal(changed(text_embeds=given["text_embeds"] + noise * (1 - mask[..., None])), expected)
    assert not torch.allclose(changed(text_embeds=given["text_embeds"] + noise * mask[..., None]), expected)
    assert not torch.allclose(changed(text_mask=mask * 0), expected)


def test_fractional_positions_are_not_rounded_to_the_models_dtype(v12_file, v12_clip, vae, photo, edit):
    """A shift of the positions by less than bfloat16 can hold at their size must arrive."""
    ids = edit[0][0][1]["text_ids"]
    assert (ids % 1 != 0).any() and torch.equal(position_bits(ids).view(torch.float32), ids)
    half = load_model(v12_file, model_options={"dtype": torch.bfloat16})
    seen = []
    network = half.model.diffusion_model
    hook = network.pe_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(half, edit, steps=1)
    hook.remove()
    text = [part[:, :ids.shape[1]].cpu() for part in seen if part.shape[1] > ids.shape[1]]
    assert any(torch.equal(part[0], ids[0]) for part in text) and all(part.dtype == torch.float32 for part in seen)


def test_times_are_rounded_as_the_official_pipeline_does_in_the_models_dtype(v12_file, edit):
    times = torch.tensor([0.98841, 0.99358, 0.5])
    assert official_time(times, torch.bfloat16).dtype == torch.bfloat16
    assert (official_time(times, torch.bfloat16) * 1000).tolist() == [988, 992, 500]
    assert torch.allclose(official_time(times, torch.float32), times)


def test_prompts_of_different_lengths_run_apart_and_equal_ones_together(v12, v12_clip, vae, photo, edit):
    lengths, network = [], v12.model.diffusion_model
    hook = network.connector.register_forward_pre_hook(lambda module, args: lengths.append(tuple(args[0].shape[:2])))
    run(v12, edit, steps=1)
    positive, negative = edit[0][0][0].shape[1], edit[1][0][0].shape[1]
    assert positive != negative and sorted(lengths) == sorted([(1, positive), (1, negative)])

    lengths.clear()
    twins = encode_edit(v12_clip, vae, photo, "red", "blue", SIZE_LEVEL)
    run(v12, twins, steps=1)
    hook.remove()
    assert lengths == [(2, twins[0][0][0].shape[1])]


def test_concatenated_conditionings_are_refused(v12, edit):
    cond, extra = edit[0][0]
    with pytest.raises(Step1XError, match="cannot be concatenated"):
        run(v12, ([[torch.cat((cond, cond), dim=1), extra]], *edit[1:]), steps=1)


def test_every_picture_of_a_batch_is_edited_as_alone(v12, v12_clip, vae, photo):
    pictures = torch.cat((photo, photo.flip(2)))
    batch = encode_edit(v12_clip, vae, pictures, 'say "A"', "", SIZE_LEVEL)
    assert batch[0][0][1]["text_ids"].shape[0] == 2
    out = run(v12, batch, steps=1)
    noise_is_per_item = run(v12, encode_edit(v12_clip, vae, photo, 'say "A"', "", SIZE_LEVEL), steps=1)
    assert torch.allclose(out[:1], noise_is_per_item, atol=1e-4) and not torch.allclose(out[:1], out[1:], atol=1e-2)
    assert decode_edit(vae, {"samples": out}, pictures).shape == pictures.shape


def test_conditioning_of_the_other_layout_is_refused_in_both_directions(v12, model, clip, vae, photo, edit):
    with pytest.raises(
        Step1XError,
        match="loaded as v1.1, but the prompt was encoded for v1.2. Set the version of 'Load Step1X-Edit MLLM' to v1.1",
    ):
        run(model, edit, steps=1)
    with pytest.raises(
        Step1XError,
        match="loaded as v1.2, but the prompt was encoded for v1.0 or v1.1. Set the version of 'Load Step1X-Edit MLLM' to v1.2",
    ):
        run(v12, encode_edit(clip, vae, photo, "x", "", SIZE_LEVEL), steps=1)


def test_text_to_image_shows_a_black_picture(v12, v12_clip):
    conds = [v12_clip.encode_from_tokens_scheduled(v12_clip.tokenize(text)) for text in ("a red cup", "")]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    assert torch.isfinite(run(v12, (*conds, latent), steps=1)).all()


def test_stock_loader_takes_a_file_with_the_mapping_for_v12(v12_file):
    assert comfy.sd.load_diffusion_model(str(v12_file)).model.diffusion_model.version == "v1.2"
    weights = load_file(v12_file)
    assert detect_config(weights).text_token_mapping
