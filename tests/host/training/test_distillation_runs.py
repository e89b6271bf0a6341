"""Few-step distillation in the host: the teacher's trajectories, what the student learns, and the file that comes out."""

import json
from dataclasses import replace

import comfy.model_management
import pytest
import tiny_models
import torch
from safetensors import safe_open
from test_cached_pairs import LEVEL
from test_edit_pairs import write_picture

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.lora import apply_lora, load_lora_file
from step1x_core.host.sampling.sampler import sample, with_norm_limiter
from step1x_core.host.training.adapted import adapted, switched_off
from step1x_core.host.training.cache import cache_pairs
from step1x_core.host.training.distill import Lesson, plain_velocity
from step1x_core.host.training.train import LORA_FILE, batch_losses, join, prepare_model, train, training_mode
from step1x_core.training.dataset import read_sources
from step1x_core.training.distillation import STAGES, Distillation, follow, student_sigmas, teacher_sigmas
from step1x_core.training.objective import Settings

FEW = Distillation(steps=2, teacher_steps=6, teacher_cfg=3.0, grid=2, noises=2)
SETTINGS = Settings(steps=4, learning_rate=1e-2, rank=4, alpha=8.0, batch=2, seed=7)


def write_sources(folder, count=2):
    for i in range(count):
        write_picture(folder / "source" / f"{i}.png", i)
        (folder / "source" / f"{i}.txt").write_text(f"edit number {i}\nanother edit of {i}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dataset(clip, vae, tmp_path_factory):
    """Three sources with instructions to train on, one for validation; no targets. Not to be changed by tests."""
    folder = write_sources(tmp_path_factory.mktemp("sources"))
    return cache_pairs(clip, vae, read_sources(folder), folder, LEVEL, 1)[0]


@pytest.fixture(scope="module")
def lesson(model, dataset):
    """The lesson of FEW, whose trajectories are in the cache."""
    lesson = Lesson(model, FEW)
    lesson.prepare(prepare_model(model), dataset, SETTINGS)
    return lesson


def test_the_teacher_edits_as_the_sampler_does(model, dataset, lesson):
    item, seed = dataset.pairs[0], SETTINGS.seed
    points = lesson.points(model, dataset, item, seed, 1)
    assert points.shape == (3, *lesson.noise(model, item, seed, 1).shape[1:])
    source = dataset.source(item)
    positive, negative = ([list(dataset.conditioning(item, negative))] for negative in (False, True))
    kept = []
    # The sampler draws its noise of a seed; this makes it begin with the lesson's.
    noise = lesson.noise(model, item, seed, 1)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("comfy.sample.prepare_noise", lambda *args: noise.clone())
        result = sample(
            with_norm_limiter(model),
            positive,
            negative,
            {"samples": source},
            teacher_sigmas(FEW, *item.size),
            FEW.teacher_cfg,
            0,
            callback=lambda step, denoised, x, total: kept.append(x.clone()),
        )["samples"]
    assert torch.allclose(points[-1:], model.model.process_latent_in(result), atol=0.02)
    # What the callback sees in a step is the latent before it.
    assert torch.allclose(points[1:2], kept[3].cpu(), atol=0.02) and not torch.allclose(points[1:2], points[-1:], atol=0.1)


@pytest.mark.once
def test_trajectories_are_made_once_and_known_by_what_they_are_made_of(model, dataset, lesson):
    assert lesson.made in (0, 7)  # three items twice, one for validation

    def made(few=FEW, seed=SETTINGS.seed, items=dataset.pairs, on=model):
        other = Lesson(on, few)
        other.prepare(prepare_model(on), replace(dataset, pairs=items), replace(SETTINGS, seed=seed))
        return other.made

    assert made() == 0
    # A student of another number of steps on the same points, another order, and fewer pairs.
    assert made(replace(FEW, steps=1)) == 0 and made(items=dataset.pairs[::-1]) == 0 and made(items=dataset.pairs[:1]) == 0
    assert made(replace(FEW, noises=3)) == 3
    assert made(seed=8) == 7
    assert made(replace(FEW, teacher_cfg=2.0)) == 7 and made(replace(FEW, teacher_steps=8)) == 7


def test_a_cancelled_caching_is_resumed(model, dataset, tmp_path):
    few = replace(FEW, teacher_cfg=2.5)

    class Cancelled(Exception):
        pass

    def cancel(done, total):
        assert total == 7
        raise Cancelled

    first = Lesson(model, few, cancel)
    with pytest.raises(Cancelled):
        first.prepare(prepare_model(model), dataset, SETTINGS)
    second = Lesson(model, few)
    second.prepare(prepare_model(model), dataset, SETTINGS)
    assert second.made == 5  # but for the batch of two


@pytest.fixture
def random_run(model, lesson):
    """A model that is ready to train, and a run whose LoRA changes something."""
    from test_lora_training import with_random_lora

    return with_random_lora(model)


def losses_of(model, lesson, dataset, run, step=0):
    run.losses = [0.0] * step
    with torch.inference_mode(False), torch.enable_grad(), training_mode(), adapted(model.model.diffusion_model, run.layers, False):
        losses = torch.cat(list(lesson.losses(model, dataset, dataset.pairs[:2], [0, 1], run)))
        run.optimiser.zero_grad()
        losses.sum().backward()
    return losses.detach()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_gradients_for_the_lora(model, dataset, lesson, random_run, stage, monkeypatch):
    model, run = random_run
    monkeypatch.setattr("step1x_core.host.training.distill.draw_segment", lambda *args: 1)
    later = Lesson(model, replace(FEW, later=stage, share=1.0))
    losses = losses_of(model, later, dataset, run)
    assert losses.shape == (2,) and losses.min() > 0
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in run.weights.values())
    assert max(weight.grad.abs().max() for weight in run.weights.values()) > 0
    assert all(layer.enabled for layer in run.layers.values())


@pytest.mark.once
def test_the_direct_match_trains_on_weights_that_were_loaded_in_inference_mode(models, dataset, lesson):
    """As the nodes load them: autograd cannot keep such weights, and the first layer gets a noisy latent with gradients."""
    from test_lora_training import with_random_lora

    from step1x_core.host.checkpoints.loading import load_model

    with torch.inference_mode():
        loaded = load_model(models / "diffusion_models" / tiny_models.V11_FILE)
    model, run = with_random_lora(loaded)
    final = Lesson(model, replace(FEW, later="final", share=1.0))
    final.prepare(prepare_model(model), dataset, SETTINGS)
    assert losses_of(model, final, dataset, run).min() > 0
    assert max(weight.grad.abs().max() for weight in run.weights.values()) > 0


def test_the_later_stage_begins_late(model, dataset, lesson, random_run, monkeypatch):
    model, run = random_run
    monkeypatch.setattr("step1x_core.host.training.distill.draw_segment", lambda *args: 1)
    halves = [
        losses_of(model, Lesson(model, replace(FEW, later=stage)), dataset, run, step)
        for step in (0, 2)
        for stage in ("cached", "trajectory")
    ]
    assert torch.equal(halves[0], halves[1]) and torch.equal(halves[0], halves[2]) and not torch.equal(halves[2], halves[3])


def test_switched_off_layers_leave_the_teacher_as_it_is(model, dataset, random_run):
    model, run = random_run
    item = dataset.pairs[0]
    x = torch.randn(1, model.model.latent_channels, *item.size, generator=torch.Generator().manual_seed(0))
    velocity = plain_velocity(model, join([dataset.conditioning(item)]))
    with torch.inference_mode():
        before = velocity(x, 0.5)
        with adapted(model.model.diffusion_model, run.layers):
            changed = velocity(x, 0.5)
            with switched_off(run.layers):
                off = velocity(x, 0.5)
    assert torch.allclose(before, off, atol=1e-4) and not torch.allclose(before, changed, atol=1e-2)


@pytest.fixture(scope="module")
def finished(model, dataset, lesson, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with torch.inference_mode():
        return train(model, dataset, replace(SETTINGS, steps=30, learning_rate=3e-2), folder, lesson=Lesson(model, FEW)), folder


@pytest.mark.once
def test_a_run_brings_the_student_nearer_to_the_teacher(model, dataset, lesson, finished):
    run, folder = finished
    assert len(run.losses) == 30

    def distance(model):
        total = 0.0
        for item in dataset.pairs:
            points = lesson.points(model, dataset, item, SETTINGS.seed, 0)
            with torch.inference_mode():
                final = follow(plain_velocity(model, join([dataset.conditioning(item)])), points[:1], student_sigmas(FEW, *item.size))[-1]
            total += (final - points[-1:]).square().mean().item()
        return total

    before = distance(model)
    with_lora = apply_lora(model, load_lora_file(folder / LORA_FILE), 1.0)
    comfy.model_management.load_models_gpu([with_lora], force_patch_weights=True)
    after = distance(with_lora)
    comfy.model_management.load_models_gpu([model])
    assert after < 0.8 * before


def test_the_file_says_what_it_was_made_for(finished):
    with safe_open(finished[1] / LORA_FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["step1x_edit.steps"] == "2" and metadata["step1x_edit.cfg"] == "1"
    assert json.loads(metadata["step1x_edit.teacher"]) == {"version": "v1.1", "steps": 6, "cfg": 3.0}
    assert "step1x_edit.schedule" not in metadata and metadata["ss_steps"] == "30"


def test_a_run_goes_on_as_if_it_had_not_stopped_and_refuses_another_lesson(model, dataset, lesson, tmp_path):
    with torch.inference_mode():
        whole = train(model, dataset, SETTINGS, tmp_path / "whole", lesson=Lesson(model, FEW))
        stop = replace(SETTINGS, steps=4)

        class Cancelled(Exception):
            pass

        def cancel(run):
            if run.step == 2:
                raise Cancelled

        with pytest.raises(Cancelled):
            train(model, dataset, stop, tmp_path / "parts", report=cancel, lesson=Lesson(model, FEW))
        parts = train(model, dataset, stop, tmp_path / "parts", lesson=Lesson(model, FEW))
        assert parts.losses == whole.losses
        for other in (Lesson(model, replace(FEW, steps=1)), None):
            with pytest.raises(Step1XError, match="another mode or with other few-step settings"):
                train(model, dataset, stop, tmp_path / "parts", lesson=other)


def test_validation_images_show_source_student_and_teacher(model, vae, dataset, lesson):
    with torch.inference_mode():
        row, = lesson.compare_held_out(model, vae, dataset, SETTINGS.seed)
    height, width = (8 * side for side in dataset.validation[0].size)
    assert row.shape == (height, 3 * width, 3)
    source, student, teacher = (row[:, i * width:(i + 1) * width].astype(int) for i in range(3))
    assert abs(source - teacher).mean() > 1 and abs(student - teacher).mean() > 0.1


def test_datasets_of_the_other_kind_are_refused(clip, vae, model, dataset, tmp_path):
    from test_cached_pairs import cached
    from test_edit_pairs import write_folder

    pairs = cached(clip, vae, write_folder(tmp_path / "pairs"))[0]
    with pytest.raises(Step1XError, match="Turn on 'sources_only'"):
        Lesson(model, FEW).prepare(prepare_model(model), pairs, SETTINGS)
    ready = prepare_model(model)
    comfy.model_management.load_models_gpu([ready])
    with pytest.raises(Step1XError, match="turn off 'sources_only'"):
        list(batch_losses(ready, dataset, dataset.pairs[:1], [0], 0))


def test_settings_of_zero_are_the_versions(model):
    settings = Lesson(model, Distillation()).settings
    assert (settings.teacher_steps, settings.teacher_cfg, settings.stored * settings.substeps) == (28, 6.0, 32)
    with pytest.raises(Step1XError, match="Raise teacher_steps"):
        Lesson(model, Distillation(steps=8, teacher_steps=9))
