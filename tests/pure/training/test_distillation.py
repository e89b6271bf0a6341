"""The maths of few-step distillation, on flows whose mean velocities are known."""

import json
import math
from dataclasses import replace

import pytest
import torch

from step1x_core.errors import Step1XError
from step1x_core.sampling.schedule import sigma_schedule
from step1x_core.training.distillation import (
    HUBER,
    STAGES,
    Distillation,
    cached_example,
    draw_example,
    draw_segment,
    follow,
    mean_velocity,
    robust_loss,
    student_sigmas,
    teacher_sigmas,
    token_weights,
    trajectory_noise,
)

SETTINGS = Distillation(steps=4, teacher_steps=28, noises=3)


def test_the_students_noise_levels_are_among_the_teachers():
    for steps, teacher, grid in ((1, 20, 0), (1, 20, 4), (2, 20, 0), (3, 28, 0), (8, 28, 0), (8, 50, 0)):
        settings = Distillation(steps=steps, teacher_steps=teacher, grid=grid)
        students, teachers = student_sigmas(settings, 16, 24), teacher_sigmas(settings, 16, 24)
        assert len(students) == steps + 1 and teacher <= len(teachers) - 1 < teacher + settings.stored
        assert torch.equal(students, sigma_schedule(steps, 96))
        assert torch.allclose(teachers[::settings.substeps * settings.stride], students, atol=1e-6)


def test_students_of_8_4_2_and_1_steps_share_their_trajectories():
    levels = {tuple(teacher_sigmas(Distillation(steps=steps, teacher_steps=28), 8, 8).tolist()) for steps in (1, 2, 4, 8)}
    assert len(levels) == 1 and Distillation(steps=3, teacher_steps=28).stored == 3


def linear_flow(x, s):
    """dx/ds = 2 x + s, so x(s) = c e^(2 s) - s / 2 - 1 / 4."""
    return 2 * x + s


def exact(x, s, following):
    return (x + s / 2 + 0.25) * math.exp(2 * (following - s)) - following / 2 - 0.25


def test_many_steps_follow_a_linear_flow_and_the_segments_mean_velocity_jumps_to_their_ends():
    settings = Distillation(steps=4, teacher_steps=4000, grid=4)
    x = trajectory_noise(0, 0, 0, (1, 2, 4, 4))
    sigmas = student_sigmas(settings, 4, 4)
    points = follow(linear_flow, x, teacher_sigmas(settings, 4, 4), settings.substeps)
    assert len(points) == 4
    trajectory = torch.cat([x, *points])
    for number, s in enumerate(sigmas.tolist()):
        assert torch.allclose(trajectory[number:number + 1], exact(x, 1.0, s), atol=2e-3)
    for segment in range(4):
        s, following = sigmas[segment].item(), sigmas[segment + 1].item()
        start, _, velocity = cached_example(trajectory, sigmas, segment, 0.0)
        wanted = (start - exact(start, s, following)) / (s - following)
        assert torch.allclose(velocity, wanted, atol=5e-3)
        # One step with the mean velocity is where many with the flow's own end. One with the flow's own velocity is not.
        step = follow(lambda x, s: velocity[None], start[None], sigmas[segment:segment + 2])[0]
        assert torch.allclose(step, exact(start, s, following), atol=2e-3)
        assert (follow(linear_flow, start[None], sigmas[segment:segment + 2])[0] - step).abs().max() > 0.01


def test_points_between_lead_to_the_same_end():
    trajectory, sigmas = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 0.6, 0.0])
    for fraction in (0.0, 0.3, 0.9):
        x, s, velocity = cached_example(trajectory, sigmas, 1, fraction)
        assert s.item() == pytest.approx(0.6 * (1 - fraction))
        assert torch.allclose(x - s * velocity, trajectory[2], atol=1e-5)


def test_from_a_students_own_point_the_mean_velocity_corrects_it():
    own, end = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert torch.allclose(own + (0.2 - 0.7) * mean_velocity(own, end, 0.7, 0.2), end, atol=1e-6)


def test_examples_are_the_same_on_every_call_and_cover_what_is_trained():
    drawn = [draw_example(SETTINGS, 5, position) for position in range(400)]
    assert drawn == [draw_example(SETTINGS, 5, position) for position in range(400)]
    assert {example.segment for example in drawn} == {0, 1, 2, 3} and {example.noise for example in drawn} == {0, 1, 2}
    inside = [example for example in drawn if example.fraction]
    assert 0.15 < len(inside) / 400 < 0.35 and all(0 < example.fraction < 1 for example in inside)
    assert [draw_example(SETTINGS, 6, position) for position in range(400)] != drawn
    late = replace(SETTINGS, first=2)
    assert (
        {draw_example(late, 5, position).segment for position in range(60)}
        == {2, 3}
        == {draw_segment(late, 5, step) for step in range(60)}
    )
    assert {draw_segment(replace(SETTINGS, last=2), 5, step) for step in range(60)} == {0, 1}


def test_every_trajectory_has_its_own_noise():
    noises = [trajectory_noise(0, pair, number, (1, 2, 4, 4)) for pair in range(2) for number in range(2)]
    assert torch.equal(noises[3], trajectory_noise(0, 1, 1, (1, 2, 4, 4)))
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(noises) for b in noises[:i])


def test_edited_tokens_count_more():
    source, final = torch.zeros(2, 4, 4, 6), torch.zeros(2, 4, 4, 6)
    final[0, :, :2, :2] = 1.0
    weights = token_weights(final, source, 2.0)
    assert weights.shape == (2, 2, 3) and torch.allclose(weights.mean(dim=(1, 2)), torch.ones(2))
    assert weights[0, 0, 0] == pytest.approx(3 * weights[0, 1, 1].item()) and torch.allclose(weights[1], torch.ones(2, 3))
    # An odd side ends in half a patch, which counts as a whole token.
    assert token_weights(torch.ones(1, 4, 5, 5), torch.zeros(1, 4, 5, 5), 2.0).shape == (1, 3, 3)


def test_the_loss_is_square_for_small_and_linear_for_large_errors():
    weights = torch.ones(1, 1, 1)

    def loss(error):
        return robust_loss(torch.full((1, 4, 2, 2), error), torch.zeros(1, 4, 2, 2), weights).item()

    assert loss(0.0) == 0
    assert loss(HUBER / 50) == pytest.approx(4 * loss(HUBER / 100), rel=0.01)
    assert loss(200.0) == pytest.approx(2 * loss(100.0), rel=0.01)
    assert robust_loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), 3 * weights).item() == pytest.approx(3 * loss(1.0))


@pytest.mark.parametrize("stage", STAGES)
def test_good_settings_pass(stage):
    Distillation(steps=8, teacher_steps=28, later=stage).check()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 9}, "1 to 8 steps"),
        ({"steps": 0}, "1 to 8 steps"),
        ({"teacher_steps": 7}, "Raise teacher_steps"),
        ({"grid": 6}, "multiple of few_steps"),
        ({"later": "gan"}, "no stage 'gan'"),
    ],
)
def test_bad_settings_are_one_sentence(changes, message):
    with pytest.raises(Step1XError, match=message):
        replace(SETTINGS, **changes).check()


def test_the_metadata_name_steps_guidance_and_teacher():
    metadata = Distillation(steps=8, teacher_steps=28, teacher_cfg=6.0).metadata("v1.1")
    assert json.loads(metadata.pop("step1x_edit.teacher")) == {"version": "v1.1", "steps": 32, "cfg": 6.0}
    assert metadata == {"step1x_edit.steps": "8", "step1x_edit.cfg": "1"}
