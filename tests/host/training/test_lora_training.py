"""Training a LoRA in the host: gradients, steps, going on after a kill, and the file that comes out."""

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import comfy.lora
import comfy.model_management
import comfy.sd
import convert
import demo_host
import demo_model
import numpy as np
import pytest
import tiny_models
import torch
from conftest import PACK
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cached_pairs import cached
from test_convert import LOADABLE
from test_edit_pairs import write_folder
from test_gguf import load_gguf
from torch.autograd.graph import saved_tensors_hooks

from step1x_core.checkpoints.lora import ALPHA as ALPHA_KEY
from step1x_core.checkpoints.lora_export import DIFFUSERS, PEFT
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.checkpoints.lora import apply_lora, load_lora_file
from step1x_core.host.training.adapted import adapted, linear_shapes
from step1x_core.host.training.cache import cache_pairs
from step1x_core.host.training.run import EXPORTS
from step1x_core.host.training.train import (
    LORA_FILE,
    STATE_FILE,
    Run,
    batch_losses,
    edit_held_out,
    predict,
    prepare_model,
    train,
    training_mode,
)
from step1x_core.training.dataset import read_pairs
from step1x_core.training.objective import Settings, draw, to_kohya

sys.path.append(str(PACK / "benchmarks"))
import lora_demo  # noqa: E402

SETTINGS = Settings(steps=4, learning_rate=1e-2, rank=4, alpha=8.0, batch=2, seed=7)


@pytest.fixture(scope="module")
def dataset(clip, vae, tmp_path_factory):
    """Four square pairs to train on, one for validation. Not to be changed by tests."""
    return cached(clip, vae, write_folder(tmp_path_factory.mktemp("data"), 5), validation=1)[0]


@pytest.fixture(scope="module")
def finished(model, dataset, tmp_path_factory):
    """The training of SETTINGS in one go, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return train(model, dataset, SETTINGS, folder), folder


def weights_of(run):
    return {name: weight.detach().clone() for name, weight in run.weights.items()}


def assert_same(run, other):
    assert run.losses == other.losses
    assert all(torch.equal(weight, other.weights[name]) for name, weight in run.weights.items())


# What is known about the objective.


# Gradients.

def weight_kind(models, tmp_path, kind):
    weights = load_file(models / "diffusion_models" / tiny_models.V11_FILE)
    if kind == "bf16":
        return load_model(models / "diffusion_models" / tiny_models.V11_FILE)
    path = tmp_path / "fp8-v1p1.safetensors"
    save_file(tiny_models.scaled_fp8(weights) if kind == "scaled fp8" else {k: v.to(torch.float8_e4m3fn) for k, v in weights.items()}, path)
    return load_model(path, model_options={} if kind == "scaled fp8" else {"dtype": torch.float8_e4m3fn})


def precision(source, path, kind):
    """The model of a bf16 file in another precision, through a file where the host takes it from one."""
    weights = load_file(source)
    if kind in LOADABLE:
        convert.convert(source, path, kind)
        return load_model(path)
    save_file({name: tensor.to(getattr(torch, kind)) for name, tensor in weights.items()}, path)
    return load_model(path)


def with_random_lora(model, settings=SETTINGS):
    """A run whose LoRA changes something, and the model to train on."""
    model = prepare_model(model)
    run = Run(settings, linear_shapes(model.model.diffusion_model), model.load_device)
    with torch.no_grad():
        for i, weight in enumerate(run.weights.values()):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) / weight.shape[1] ** 0.5)
    comfy.model_management.load_models_gpu([model])
    return model, run


def loss_of(model, run, dataset, checkpointing=True):
    with torch.inference_mode(False), torch.enable_grad(), training_mode(), adapted(model.model.diffusion_model, run.layers, checkpointing):
        loss = sum(losses.sum() for losses in batch_losses(model, dataset, dataset.pairs[:2], [0, 1], 0))
        run.optimiser.zero_grad()
        loss.backward()
    return loss.item()


@pytest.mark.once
@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["bf16", "plain fp8", "scaled fp8"])
def test_gradients_are_those_of_finite_differences(models, tmp_path, dataset, kind):
    with torch.inference_mode():
        base = weight_kind(models, tmp_path, kind)
    model, run = with_random_lora(base)
    loss_of(model, run, dataset)
    gradients = {name: weight.grad.clone() for name, weight in run.weights.items()}
    g = torch.Generator().manual_seed(0)
    for part in ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mod.lin", "single_blocks.1.linear1", "single_blocks.0.linear2"):
        for name in (f"{part}.down", f"{part}.up"):
            weight = run.weights[name]
            gradient = gradients[name]
            # Along the gradient, so that the difference stands out from the rounding of float32.
            direction = gradient / gradient.norm() + 0.1 * torch.randn(weight.shape, generator=g) / weight.numel() ** 0.5
            values = []
            for step in (1e-2, -1e-2):
                with torch.no_grad():
                    weight.add_(direction, alpha=step)
                values.append(loss_of(model, run, dataset))
                with torch.no_grad():
                    weight.sub_(direction, alpha=step)
            difference = (values[0] - values[1]) / 2e-2
            assert difference == pytest.approx((gradient * direction).sum().item(), rel=0.03), name


@pytest.mark.skipif("w4a4" not in LOADABLE, reason="this ComfyUI has no w4a4 layers")
def test_weights_without_gradients_are_refused(models, tmp_path):
    model = precision(models / "diffusion_models" / tiny_models.V11_FILE, tmp_path / "other-v1p1.safetensors", "w4a4")
    with pytest.raises(Step1XError, match="w4a4 weights.*'weight_dtype' to fp8_scaled"):
        prepare_model(model)


TRAINABLE = [form for form in LOADABLE if form != "w4a4"]


@pytest.mark.parametrize("kind", ["float32", "float16", "float8_e5m2", *TRAINABLE])
def test_gradients_on_weights_of_every_precision_point_where_those_on_bf16_do(models, tmp_path, dataset, kind):
    """Products of rounded inputs have no finite differences."""
    source = models / "diffusion_models" / tiny_models.V11_FILE
    gradients = []
    for load in (lambda: load_model(source), lambda: precision(source, tmp_path / "other-v1p1.safetensors", kind)):
        with torch.inference_mode():
            base = load()
        model, run = with_random_lora(base)
        loss_of(model, run, dataset)
        gradients.append(torch.cat([weight.grad.flatten() for weight in run.weights.values()]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > {"float8_e5m2": 0.95, "nvfp4": 0.95}.get(kind, 0.99)


def test_checkpointing_changes_no_gradient(model, dataset):
    model, run = with_random_lora(model)
    gradients = []
    for checkpointing in (False, True):
        loss_of(model, run, dataset, checkpointing)
        gradients.append({name: weight.grad.clone() for name, weight in run.weights.items()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-7) for name in gradients[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_moving_tokens_to_main_memory_changes_no_gradient(model, dataset, monkeypatch):
    """Bit for bit. Copies stand for main memory, which all tensors are in here."""
    packed, gradients = [], []

    def copied(**kwargs):
        return saved_tensors_hooks(lambda tensor: packed.append(tensor.shape) or tensor.clone(), lambda copy: copy)

    model, run = with_random_lora(model)
    for context_manager in (lambda **kwargs: nullcontext(), copied):
        monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", context_manager)
        loss_of(model, run, dataset)
        gradients.append({name: weight.grad.clone() for name, weight in run.weights.items()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    # Picture and text of two double blocks, both in one of two single blocks, and nothing else; older torch adds an empty tensor to each.
    assert [shape[-1] for shape in packed if shape.numel()] == [tiny_models.TINY_TRANSFORMER.hidden] * 6


def test_adapted_model_is_the_one_with_the_lora_merged(model, dataset):
    """And the model is as it was, when the training is over."""
    trained, run = with_random_lora(model)
    target, source = dataset.latents(dataset.pairs[0])
    s, noise = draw(0, 0, target.shape)

    def velocity(model):
        comfy.model_management.load_models_gpu([model])
        with torch.inference_mode():
            return predict(model, noise, s, dataset.conditioning(dataset.pairs[0]))

    plain = velocity(model)
    with adapted(trained.model.diffusion_model, run.layers):
        changed = velocity(trained)
    assert (changed - plain).abs().max() > 0.01
    merged = velocity(apply_lora(model, to_kohya(run.weights, SETTINGS.alpha, torch.float32), 1.0))
    assert torch.allclose(changed, merged, atol=1e-2 * changed.abs().max().item())
    assert torch.equal(velocity(model), plain)


# Steps.

def test_models_and_data_of_inference_mode_are_trained_on(models, dataset, tmp_path):
    """Nodes load and run in inference mode."""
    with torch.inference_mode():
        run = train(load_model(models / "diffusion_models" / tiny_models.V11_FILE), dataset, replace(SETTINGS, steps=1), tmp_path)
    assert run.step == 1 and not run.weights["single_blocks.0.linear1.up"].is_inference()
    assert run.weights["single_blocks.0.linear1.up"].abs().max() > 0


@pytest.mark.once
def test_same_seed_same_lora(model, dataset, finished, tmp_path):
    assert_same(train(model, dataset, SETTINGS, tmp_path), finished[0])
    other = train(model, dataset, replace(SETTINGS, seed=8), tmp_path / "other")
    assert other.losses != finished[0].losses


@pytest.mark.once
@pytest.mark.parametrize("batch, accumulation", [(1, 4), (2, 2)])
def test_accumulation_equals_a_larger_batch(model, dataset, tmp_path, batch, accumulation):
    one = train(model, dataset, replace(SETTINGS, steps=2, batch=4), tmp_path / "one")
    parts = train(model, dataset, replace(SETTINGS, steps=2, batch=batch, accumulation=accumulation), tmp_path / "parts")
    assert parts.losses == pytest.approx(one.losses, rel=1e-5)
    # Adam divides by the gradient's size, so what is nearly zero may differ.
    assert all((weight - one.weights[name]).abs().mean() < 1e-3 * SETTINGS.learning_rate + 1e-5 for name, weight in parts.weights.items())


def test_pairs_of_different_sizes_in_one_batch(model, clip, vae, tmp_path):
    folder = write_folder(tmp_path / "data", 2)
    wide = write_folder(tmp_path / "wide", 2, (96, 48))
    for i in range(2):
        for part, suffix in (("source", "png"), ("target", "png"), ("target", "txt")):
            shutil.copy(wide / part / f"{i}.{suffix}", folder / part / f"{i + 2}.{suffix}")
    mixed = cached(clip, vae, folder)[0]
    assert len({item.size for item in mixed.pairs}) == 2
    one = train(model, mixed, replace(SETTINGS, steps=1, batch=4), tmp_path / "one")
    each = train(model, mixed, replace(SETTINGS, steps=1, batch=1, accumulation=4), tmp_path / "each")
    assert one.losses == pytest.approx(each.losses, rel=1e-5)


def test_a_running_mean_is_saved_in_place_of_the_weights(model, dataset, tmp_path):
    run = train(model, dataset, replace(SETTINGS, steps=1, ema=0.75), tmp_path)
    name = "double_blocks.1.img_mlp.0"
    saved = load_file(tmp_path / LORA_FILE)[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"]
    # It began at zero.
    assert torch.allclose(saved.float(), 0.25 * run.weights[f"{name}.up"], rtol=0.01, atol=1e-6) and saved.abs().max() > 0


def test_v10_is_trained_with_its_own_positions(models, dataset, tmp_path):
    model = load_model(models / "diffusion_models" / tiny_models.V10_FILE)
    own = train(model, dataset, replace(SETTINGS, steps=1), tmp_path / "own").losses
    model.model.diffusion_model.version = "v1.1"
    assert train(model, dataset, replace(SETTINGS, steps=1), tmp_path / "other").losses != own


def test_v12_is_trained(models, vae, tmp_path):
    clip = load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")
    folder = write_folder(tmp_path / "data", 2)
    # Texts of different lengths, which v1.2 does not pad.
    (folder / "target" / "1.txt").write_text('replace the word with "OPEN", please', encoding="utf-8")
    data = cached(clip, vae, folder)[0]
    assert data.conditioning(data.pairs[0])[0].shape != data.conditioning(data.pairs[1])[0].shape
    run = train(load_model(models / "diffusion_models" / tiny_models.V12_FILE, "v1.2"), data, SETTINGS, tmp_path)
    assert run.step == 4 and np.isfinite(run.losses).all()


def test_layout_of_another_version_is_refused(models, dataset, tmp_path):
    model = load_model(models / "diffusion_models" / tiny_models.V12_FILE, "v1.2")
    with pytest.raises(Step1XError, match="encoded for v1.0 or v1.1"):
        train(model, dataset, SETTINGS, tmp_path)
    with pytest.raises(Step1XError, match="Expected a Step1X-Edit model"):
        train(SimpleNamespace(model=None), dataset, SETTINGS, tmp_path)


def test_weights_that_only_a_gguf_loader_unpacks_are_refused(dataset, tmp_path):
    with pytest.raises(Step1XError, match="cannot be trained on GGUF weights"):
        train(load_gguf("v1.1"), dataset, SETTINGS, tmp_path)


# Cancel, kill, resume.

def test_cancel_keeps_the_last_state_and_the_run_goes_on(model, dataset, finished, tmp_path):
    def cancel(run):
        if run.step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, dataset, SETTINGS, tmp_path, report=cancel)
    with safe_open(tmp_path / STATE_FILE, "pt") as file:
        assert len(file.get_tensor("losses")) == 2
    assert load_file(tmp_path / LORA_FILE)
    assert_same(train(model, dataset, SETTINGS, tmp_path), finished[0])


def test_a_killed_run_goes_on_from_what_was_saved(model, dataset, finished, tmp_path):
    """What lies on the disk in the middle of the third step is all that a kill leaves."""
    def copy(run):
        if run.step == 3:
            shutil.copytree(tmp_path / "run", tmp_path / "left")

    train(model, dataset, SETTINGS, tmp_path / "run", save_every=2, report=copy)
    seen = []
    resumed = train(model, dataset, SETTINGS, tmp_path / "left", report=lambda run: seen.append(run.step))
    assert seen == [3, 4]
    assert_same(resumed, finished[0])


@pytest.mark.once
def test_a_running_mean_goes_on_as_well(model, dataset, tmp_path):
    settings = replace(SETTINGS, ema=0.5)
    whole = train(model, dataset, settings, tmp_path / "whole")
    train(model, dataset, replace(settings, steps=2), tmp_path / "parts")
    parts = train(model, dataset, settings, tmp_path / "parts")
    assert all(torch.equal(average, whole.average[name]) for name, average in parts.average.items())


def test_finished_training_is_not_repeated_and_may_be_prolonged(model, dataset, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    steps = []
    assert_same(train(model, dataset, SETTINGS, tmp_path, report=steps.append), finished[0])
    assert not steps
    longer = train(model, dataset, replace(SETTINGS, steps=5, learning_rate=1e-3), tmp_path)
    assert longer.step == 5 and longer.losses[:4] == finished[0].losses
    assert train(model, dataset, replace(SETTINGS, steps=1), tmp_path, resume=False).step == 1


def test_what_cannot_go_on_is_refused(model, models, dataset, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    with pytest.raises(Step1XError, match="uses rank 4, but rank is now 8"):
        train(model, dataset, replace(SETTINGS, rank=8), tmp_path)
    tensors = load_file(tmp_path / STATE_FILE)
    with safe_open(tmp_path / STATE_FILE, "pt") as file:
        metadata = file.metadata()
    del tensors["single_blocks.0.linear1.up"]
    save_file(tensors, tmp_path / STATE_FILE, metadata)
    with pytest.raises(Step1XError, match="is for another model"):
        train(model, dataset, SETTINGS, tmp_path)
    for damage in (b"garbage", b""):
        (tmp_path / STATE_FILE).write_bytes(damage)
        with pytest.raises(Step1XError, match="damaged or not a training state"):
            train(model, dataset, SETTINGS, tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / STATE_FILE)
    with pytest.raises(Step1XError, match="damaged or not a training state"):
        train(model, dataset, SETTINGS, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_before_it_spoils_the_state(model, dataset, tmp_path):
    with pytest.raises(Step1XError, match="The loss is NaN or infinite in step [2-9]"):
        train(model, dataset, replace(SETTINGS, steps=9, learning_rate=1e30), tmp_path)
    assert torch.isfinite(load_file(tmp_path / STATE_FILE)["losses"]).all()


# The file.

def test_other_names_are_saved_beside_it_and_read_as_the_same_change(model, dataset, tmp_path):
    settings = Settings(steps=1, learning_rate=1e-2, rank=4, alpha=8.0, seed=7)
    # What is missing of a finished run is added without a further step.
    for also in ((), (DIFFUSERS, PEFT)):
        assert train(model, dataset, settings, tmp_path, also=also).step == 1
    names = [LORA_FILE, EXPORTS[DIFFUSERS], f"{EXPORTS[PEFT]}/adapter_model.safetensors"]
    first, *others = ({**apply_lora(model, load_lora_file(tmp_path / name), 1.0).patches} for name in names)
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    weight = model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.detach().float()
    expected, *found = (comfy.lora.calculate_weight(patches[key], weight.clone(), key) for patches in (first, *others))
    assert not torch.equal(expected, weight)
    assert all(torch.allclose(change, expected, atol=1e-3) and patches.keys() == first.keys() for change, patches in zip(found, others))
    # A run that starts over moves all of them.
    train(model, dataset, settings, tmp_path, resume=False)
    assert {path.name for path in tmp_path.with_name(f"{tmp_path.name}.1").iterdir()} == {
        LORA_FILE,
        STATE_FILE,
        *EXPORTS.values(),
    }


def test_lora_file_is_in_the_official_layout(finished):
    lora = load_file(finished[1] / LORA_FILE)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    hidden = tiny_models.TINY_TRANSFORMER.hidden
    assert (
        lora[f"{name}.lora_down.weight"].shape == (4, hidden)
        and lora[f"{name}.lora_up.weight"].shape == (3 * hidden, 4)
        and lora[f"{name}{ALPHA_KEY}"] == 8
    )
    with safe_open(finished[1] / LORA_FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4" and metadata["ss_base_model_version"] == "step1x-edit-v1.1"
    with safe_open(finished[1] / STATE_FILE, "pt") as file:
        assert json.loads(next(iter(file.metadata().values())))["rank"] == 4
    # 10 layers in a double block, 3 in a single one, two of each.
    assert len(lora) == 3 * 26


@pytest.mark.parametrize("load", ["stock", "ours"])
def test_lora_loads_everywhere_without_a_key_left_over(model, finished, load):
    run, folder = finished
    lora = load_lora_file(folder / LORA_FILE)
    patched = apply_lora(model, lora, 1.0) if load == "ours" else comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    assert len(patched.patches) == len(run.layers) == 26
    key = "diffusion_model.single_blocks.1.linear2.weight"
    comfy.model_management.unload_all_models()
    with torch.no_grad():
        patched.patch_model()
    merged = patched.model.state_dict()[key].clone()
    patched.unpatch_model()
    up, down = (run.weights[f"single_blocks.1.linear2.{part}"].detach() for part in ("up", "down"))
    assert torch.allclose(merged.float(), model.model.state_dict()[key].float() + 2 * up @ down, atol=1e-2)


# What is shown.

def test_validation_pairs_are_edited_with_the_lora_so_far(model, vae, dataset, tmp_path):
    pictures = []
    train(model, dataset, replace(SETTINGS, steps=3), tmp_path, validate_every=2,
          validate=lambda model, step: pictures.append((step, edit_held_out(model, vae, dataset, 2, 1.5, 0)[0])))
    assert [step for step, _ in pictures] == [2, 3]
    (_, first), (_, second) = pictures
    assert first.shape == (64, 192, 3) and first.dtype == np.uint8
    assert (
        np.array_equal(first[:, :64], second[:, :64])
        and np.array_equal(first[:, 128:], second[:, 128:])
        and not np.array_equal(first[:, 64:128], second[:, 64:128])
    )
    # Looking changes nothing.
    assert (
        train(model, dataset, replace(SETTINGS, steps=3), tmp_path / "blind").losses
        == load_file(tmp_path / STATE_FILE)["losses"].tolist()
    )


# Meaning. `benchmarks/lora_demo.py` is the same at length.

@pytest.mark.once
def test_the_demo_model_begins_to_learn_a_new_edit(tmp_path):
    """A red line across the picture."""
    with torch.inference_mode():
        demo = demo_host.load_demo()
        pairs = [lora_demo.line_pair(0, index, "train") for index in range(8)]
        data, _ = cache_pairs(demo.clip, demo.vae, read_pairs(lora_demo.write_dataset(tmp_path, pairs)), tmp_path, demo_model.SIZE_LEVEL)
        run = train(demo.model, data, Settings(steps=16, learning_rate=4e-3, rank=8, alpha=8, batch=1), tmp_path)
        trained = apply_lora(demo.model, load_lora_file(tmp_path / LORA_FILE), 1.0)

        held_out = lora_demo.line_pair(0, 0, "heldout")
        picture, target = demo_host.to_image(held_out.source), demo_host.to_image(held_out.target)
        border = torch.from_numpy(held_out.region)
        errors = {}
        for name, model in (("before", demo.model), ("after", trained)):
            edited = demo_host.edit(SimpleNamespace(**vars(demo) | {"model": model}), picture, held_out.instruction)[0]
            errors[name] = (edited - target)[0][border].abs().mean().item()
    assert np.mean(run.losses[-6:]) < 0.8 * np.mean(run.losses[:6])
    assert errors["after"] < 0.8 * errors["before"]
