"""Region denoising: plan, region and rows, without ComfyUI."""

import pytest
import torch

from step1x_core.speed.region import RegionSettings, full_steps, token_rows


def test_plan_at_28_steps_and_at_any_other_number():
    assert [i for i, full in enumerate(full_steps(28, RegionSettings())) if full] == [0, 1, 2, 3, 4, 5, 15, 26, 27]
    for steps in range(1, 101):
        full = full_steps(steps, RegionSettings())
        assert len(full) == steps and full[0] and full[-1] and full.count(False) == pytest.approx((1 - 0.2 - 2 / 28) * steps - 1, abs=1.5)
    assert all(full_steps(20, RegionSettings(warmup=1.0, refreshes=20))) and full_steps(20, RegionSettings(refreshes=0)).count(False) == 15


def test_rows_are_filled_up_with_a_token_of_the_same_picture():
    edited = torch.tensor([[[0, 1], [0, 1]], [[0, 0], [1, 0]]]).bool()
    assert token_rows(edited, 3).tolist() == [[1, 3], [2, 2]]
    edited[1] = True
    assert token_rows(edited, 3).tolist() == [[1, 3, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6]]
