"""The training objective: noise levels, order, learning rate and loss curve, without ComfyUI."""

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch

from step1x_core.errors import Step1XError
from step1x_core.training.loss_curve import draw_losses, draw_progress, smooth
from step1x_core.training.objective import (
    COSINE,
    TARGET,
    Settings,
    add_noise,
    check_resumed,
    draw,
    flow_loss,
    learning_rate,
    pair_at,
    shift_noise_level,
)


def test_noise_levels_are_shifted_to_the_noisy_end():
    s = shift_noise_level(torch.tensor([0.0, 0.5, 1.0]))
    assert torch.allclose(s, torch.tensor([0.0, 3.1582 * 0.5 / (1 + 2.1582 * 0.5), 1.0]))
    levels = torch.cat([draw(0, position, (1, 1, 1, 1))[0] for position in range(2000)])
    # The median of sigmoid(N(0, 1)) is 0.5, its quartiles sigmoid(+-0.6745).
    expected = shift_noise_level(torch.sigmoid(torch.tensor([-0.6745, 0.0, 0.6745])))
    assert torch.allclose(levels.quantile(torch.tensor([0.25, 0.5, 0.75])), expected, atol=0.03)


def test_loss_is_zero_for_the_straight_path_alone():
    x0, noise = torch.randn(2, 2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    s = torch.tensor([0.25, 0.75])
    x = add_noise(x0, noise, s)
    assert torch.allclose(x[1], 0.25 * x0[1] + 0.75 * noise[1])
    velocity = (x - x0) / s[:, None, None, None]
    assert flow_loss(velocity, x0, noise).max() < 1e-10
    assert torch.allclose(flow_loss(velocity + 2, x0, noise), torch.full((2,), 4.0))


def test_every_epoch_takes_every_pair_in_another_order():
    epochs = [[pair_at(3, epoch * 10 + i, 10) for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert [pair_at(4, i, 10) for i in range(10)] != epochs[0]


def test_learning_rate_rises_and_falls():
    settings = Settings(steps=10, learning_rate=1.0, warmup=4, schedule=COSINE)
    rates = [learning_rate(settings, step) for step in range(10)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[7] == pytest.approx(0.5) and rates[9] < 0.1
    assert learning_rate(Settings(steps=10), 9) == 1e-4


def test_targets_are_the_304_official_layers():
    shapes = tiny_models.transformer_shapes("v1.1", tiny_models.FULL_TRANSFORMER)
    names = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    targets = [name for name in names if TARGET.fullmatch(name)]
    assert len(targets) == 304 and "double_blocks.18.txt_mod.lin" in targets and "single_blocks.37.modulation.lin" in targets
    assert not any(name.startswith(("connector", "final_layer", "img_in", "txt_in")) for name in targets)


def test_curve_shows_single_losses_and_their_mean():
    assert np.allclose(smooth([4.0, 2.0]), [4.0, 2.0]) and np.allclose(smooth([float(i) for i in range(40)])[10:12], [9.5, 10.5])
    pictures = [np.asarray(draw_losses(losses)) for losses in ([0.0], [1.0], [1.0, 0.5, 0.25], [0.25, 0.5, 1.0])]
    assert all(picture.shape == pictures[0].shape for picture in pictures) and not np.array_equal(pictures[2], pictures[3])
    assert draw_progress([1.0], [np.zeros((64, 192, 3), np.uint8)]).height > pictures[0].shape[0]


@pytest.mark.parametrize("name, value", [("rank", 2), ("alpha", 3.0), ("seed", 7), ("batch", 2), ("accumulation", 4), ("ema", 0.5)])
def test_a_training_goes_on_only_with_what_its_state_was_made_with(name, value):
    settings = Settings(steps=5)
    stored = dataclasses.asdict(settings)
    check_resumed(stored, dataclasses.replace(settings, steps=9, learning_rate=0.5, schedule=COSINE, warmup=3), "x")
    with pytest.raises(Step1XError, match=f"uses {name} .* but {name} is now {value}"):
        check_resumed(stored, dataclasses.replace(settings, **{name: value}), "x")
