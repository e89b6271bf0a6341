"""The host's int8 attention as a choice of Speed."""

import pytest
import tiny_models
import torch
from comfy.ldm.modules import attention

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.speed import int8_attention
from step1x_core.host.speed.presets import apply_speed, settings_of
from step1x_core.speed.presets import ALL_STEPS, described

CHOICE = {"mode": ALL_STEPS, "attention": "int8", "start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def model(models):
    with torch.inference_mode():
        return load_model(models / "diffusion_models" / tiny_models.V11_FILE)


def test_a_host_without_it_refuses_the_choice(model, monkeypatch):
    monkeypatch.delitem(attention.REGISTERED_ATTENTION_FUNCTIONS, int8_attention.HOST_NAME, raising=False)
    with pytest.raises(Step1XError, match="int8 attention of 'Step1X-Edit Speed' needs ComfyUI 0.33.0"):
        apply_speed(model, ALL_STEPS, settings_of(CHOICE))


def test_every_block_attends_with_it_and_masked_text_does_not(model, monkeypatch):
    """Without a GPU the host has no int8 kernel: its torch attention stands in, and counts."""
    calls = []

    def counted(q, k, v, heads, **kwargs):
        calls.append((q.shape, kwargs.get("mask")))
        return attention.attention_pytorch(q, k, v, heads, **kwargs)

    monkeypatch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, int8_attention.HOST_NAME, counted)
    changed = apply_speed(model, ALL_STEPS, settings_of(CHOICE))
    network = model.model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 32, 64, generator=generator)
    with torch.inference_mode():
        results = [
            network(
                x,
                torch.tensor([0.5]),
                context,
                text_mask=(torch.arange(32) < 20).long()[None],
                ref_latents=[x],
                transformer_options=options,
            )
            for options in ({}, changed.model_options["transformer_options"])
        ]
    assert [shape[1:3] for shape, _ in calls] == [(2, 32 + 2 * 16)] * 3 + [calls[-1][0][1:3]]
    assert all(mask is None for _, mask in calls)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert "int8 attention" in described(ALL_STEPS, settings_of(CHOICE))
    assert "optimized_attention_override" not in model.model_options["transformer_options"]
