"""The stock TorchCompileModel: one graph for all steps, and what cannot live with it.

Attention is torch's, as on a graphics card: the one that the host takes on a CPU asks for the free memory, which breaks the graph.
"""

from dataclasses import replace

import pytest
import tiny_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.sampling.sampler import flow_sigmas, sample
from step1x_core.host.speed.teacache import apply_teacache


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, and no gradients."""
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        yield


def with_torch_attention(path):
    model = load_model(path).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda attention, *args, **kwargs: (
        attention_pytorch.__wrapped__(*args, **kwargs)
    )
    return model


# One block of each kind: tracing takes as long as there are blocks.
SMALL = replace(tiny_models.TINY_TRANSFORMER, depth=1, depth_single=1, connector_depth=1)


def small_model(folder, name, version):
    tiny_models.write_transformer(folder / name, version, SMALL)
    return with_torch_attention(folder / name)


@pytest.fixture(scope="module")
def v11(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("small"), tiny_models.V11_FILE, "v1.1")


@pytest.fixture(scope="module")
def v12(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("small"), tiny_models.V12_FILE, "v1.2")


def compiled(model) -> tuple:
    """The model behind the stock node, and a backend that counts its graphs."""
    counter = CompileCounter()
    return TorchCompileModel.execute(model, counter).args[0], counter


def run(model, size=16, steps=3, seed=1, cfg=4.0):
    positive, negative, latent = tiny_models.made_up_edit(
        model.model.diffusion_model.version, size, (30, 20), tiny_models.TINY_TRANSFORMER.text
    )
    return sample(
        model, positive, negative, latent, flow_sigmas(steps, latent["samples"]), cfg, seed, callback=lambda *args: None
    )["samples"]


@pytest.mark.once
def test_only_new_shapes_compile_again_and_nothing_breaks_a_graph(v11):
    fast, counter = compiled(v11)
    for change in ({}, {"seed": 2}, {"steps": 5}, {"cfg": 2.0}):
        torch.testing.assert_close(run(fast, **change), run(v11, **change), rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1, change
    for change in ({"size": 24}, {"size": 24, "seed": 2}, {}):
        torch.testing.assert_close(run(fast, **change), run(v11, **change), rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 2, change
    assert not counters["graph_break"]


@pytest.mark.once
def test_prompts_of_two_lengths_are_two_graphs(v12):
    fast, counter = compiled(v12)
    for change in ({}, {"seed": 2, "steps": 5}):
        torch.testing.assert_close(run(fast, **change), run(v12, **change), rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 2 and not counters["graph_break"]


def test_teacache_would_be_frozen_and_is_refused_in_either_order(v11):
    """The host drops torch's guards on transformer_options, so that every step would do what the first one did."""
    fast, _ = compiled(v11)
    for both in (apply_teacache(fast, 0.2), compiled(apply_teacache(v11, 0.2))[0]):
        with pytest.raises(Step1XError, match="'TorchCompileModel' would keep .* Remove one of the two"):
            run(both)
    run(apply_teacache(v11, 0.2))
