"""The training code's networks against the product's modules, the sampler's parts, and a short training run."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import TransformerSize, mllm_shapes, transformer_shapes, vae_shapes
from torch import nn

from miniature.autoencoder import Autoencoder
from miniature.mllm import DemoMLLM, vision_pictures
from miniature.model import DemoSize, DemoTransformer, GroundingHeads, folded_attention, parameter_bytes, to_tokens
from miniature.sampling import guided_velocity
from miniature.train import sample_times
from step1x_core.images import to_vision_size
from step1x_core.sampling.guidance import NormLimiter
from step1x_core.sampling.schedule import sigma_schedule

SIZE = DemoSize()
SMALL = dataclasses.replace(SIZE, hidden=64, depth=1, depth_single=2, text_kv_heads=1, vision=64, vision_full_attention=(1, 2))


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_tensor_names_and_shapes_are_the_real_ones():
    size = TransformerSize(hidden=SIZE.hidden, head_dim=SIZE.head_dim, depth=SIZE.depth, depth_single=SIZE.depth_single, text=SIZE.text,
                           connector=SIZE.connector, connector_depth=SIZE.connector_depth, vector=SIZE.vector)
    assert shapes_of(DemoTransformer(SIZE)) == transformer_shapes("v1.1", size)
    assert shapes_of(DemoMLLM(SIZE)) == mllm_shapes(SIZE.mllm_config(), lm_head=False)
    assert shapes_of(Autoencoder()) == vae_shapes()


def test_all_files_together_stay_below_30_megabytes():
    assert parameter_bytes(DemoTransformer(SIZE), DemoMLLM(SIZE), Autoencoder()) < 29.5e6


def as_the_product(picture):
    """uint8 [S, S, 3] -> whole values as float [3, s, s]."""
    return to_vision_size(picture.float() / 255).float().movedim(-1, 0)


def test_pictures_are_resized_as_pillow_does():
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 128, 128, 3), dtype=np.uint8))
    difference = (vision_pictures(pixels)[0] - as_the_product(pixels[0])).abs()
    assert difference.max() <= 2 and difference.mean() < 0.01


@pytest.mark.parametrize("t", [0.97, 0.5])
def test_guidance_equals_the_products(t):
    cond, uncond, x = torch.randn(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(4))
    sigma = torch.tensor([t])
    denoised = NormLimiter()({"conds": [1, 1], "conds_out": [x - t * cond, x - t * uncond], "sigma": sigma})
    expected = (x - (denoised[1] + 6 * (denoised[0] - denoised[1]))) / t
    assert torch.allclose(guided_velocity(cond, uncond, t, 6.0), expected, atol=1e-4)


def test_times_follow_the_samplers_schedule():
    times = sample_times(100_000, 64, torch.device("cpu"), torch.Generator().manual_seed(0))
    expected = sigma_schedule(10, 64).flip(0)
    assert torch.allclose(times.quantile(torch.linspace(0, 1, 11)), expected, atol=0.01)


def test_attention_with_the_bias_as_features_equals_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 24, 32, generator=generator)
    bias = torch.zeros(2, 1, 1, 24)
    bias[0, ..., 10:14], bias[1, ..., 20:] = 4.61, -1e4
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, 5, 24, -1))
    assert torch.allclose(folded_attention(q, k, v, bias), expected, atol=1e-5)
    assert not torch.allclose(folded_attention(q, k, v, bias * 0), expected, atol=1e-2)


def test_grounding_heads_learn_where_the_edit_takes_place():
    """Tokens that hold the region's cells, pooled as their grids demand: the loss goes to zero, and only for the right places."""
    torch.manual_seed(0)
    heads = GroundingHeads(SMALL)
    region = (torch.rand(4, 16, 16) < 0.3).float()
    tokens = torch.zeros(4, 256, SMALL.connector)
    tokens[..., 0] = region.flatten(1)
    seen = torch.zeros(4, 64, SMALL.hidden)
    seen[..., :4] = to_tokens(region[:, None])
    optimizer = torch.optim.Adam(heads.parameters(), 0.3)
    for _ in range(150):
        optimizer.zero_grad()
        heads(tokens, seen, region).sum().backward()
        optimizer.step()
    assert heads(tokens, seen, region).max() < 0.05
    assert heads(tokens, seen, region.flip(1)).min() > 1


