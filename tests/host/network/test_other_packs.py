"""Other packs that run the transformer's blocks in their own way, beside what of ours decides which blocks run: refused in the first call, in any order.

The stand-ins do what the packs do: the TeaCache pack puts a method in place of forward_orig while its function wrapper calls the model and keeps a residual;
First Block Cache (WaveSpeed) puts one module in place of all blocks for as long.
"""

import re
from contextlib import contextmanager
from types import MethodType
from unittest import mock

import pytest
import torch
from all_blocks import AllBlocks
from comfy.ldm.flux.model import Flux
from comfy.patcher_extension import WrappersMP

from step1x_core.errors import Step1XError
from step1x_core.host.network.foreign import foreign_parts
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.host.sampling.sampler import flow_sigmas, sample, set_guidance_interval
from step1x_core.host.speed.region import apply_region
from step1x_core.host.speed.teacache import apply_teacache
from step1x_core.speed.region import RegionSettings

STEPS = 4


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def edit(clip, vae, photo):
    return encode_edit(clip, vae, photo, "make the cup red", "", 256)


def run(model, edit, cfg=6.0):
    positive, negative, latent = edit
    sigmas = flow_sigmas(STEPS, latent["samples"])
    return sample(model, positive, negative, latent, sigmas, cfg, 7, callback=lambda *args: None)["samples"]


def cached_forward(self, img, *args, transformer_options={}, **kwargs):
    """A forward pass that adds what the blocks gave in the call before, as if the step were left out."""
    out = Flux.forward_orig(self, img, *args, transformer_options=transformer_options, **kwargs)
    previous = getattr(self, "previous_residual", None)
    self.previous_residual = out
    return out if previous is None else (out + previous) / 2


@contextmanager
def teacache_pack(transformer):
    with mock.patch.object(transformer, "forward_orig", MethodType(cached_forward, transformer)):
        yield
    vars(transformer).pop("previous_residual", None)


@contextmanager
def block_cache(transformer):
    own = transformer.double_blocks, transformer.single_blocks
    transformer.double_blocks = torch.nn.ModuleList([AllBlocks(*own)])
    transformer.single_blocks = torch.nn.ModuleList()
    try:
        yield
    finally:
        transformer.double_blocks, transformer.single_blocks = own


@contextmanager
def replaced_forward(transformer):
    def forward(self, x, timestep, context, *args, transformer_options={}, **kwargs):
        return type(self).forward(self, x, timestep, context, *args, transformer_options=transformer_options, **kwargs)

    with mock.patch.object(transformer, "forward", MethodType(forward, transformer)):
        yield


SWAPS = {"TeaCache": teacache_pack, "First Block Cache": block_cache, "forward": replaced_forward}


def by_function(model, swap):
    """Through the host's model_function_wrapper."""
    def wrapper(apply_model, params):
        with swap(model.model.diffusion_model):
            return apply_model(params["input"], params["timestep"], **params["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def by_wrapper(model, swap):
    """Through the host's wrappers around the transformer's call."""
    def wrapper(executor, *args, **kwargs):
        with swap(model.model.diffusion_model):
            return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another_cache", wrapper)
    return model


OURS = {
    "Step1X-Edit Speed (TeaCache)": lambda model: apply_teacache(model, 0.3),
    "Step1X-Edit Speed (region)": lambda model: apply_region(model, RegionSettings()),
    "Step1X-Edit Speed (guided part)": lambda model: set_guidance_interval(model, 0.0, 0.5),
}


@pytest.fixture(scope="module")
def alone(model, edit):
    """What each of them makes without another pack."""
    return {node: run(patched(model), edit) for node, patched in OURS.items()}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("theirs_first", [True, False])
@pytest.mark.parametrize("way", [by_function, by_wrapper])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("node", OURS)
def test_two_that_run_the_blocks_are_refused_in_the_first_call(model, edit, alone, node, swap, way, theirs_first):
    if way is by_wrapper and swap == "forward":
        pytest.skip("the wrappers are called by the function that would be replaced")
    patches = [lambda m: way(m, SWAPS[swap]), OURS[node]]
    both = model
    for patch in patches if theirs_first else patches[::-1]:
        both = patch(both)
    calls = []
    hook = model.model.diffusion_model.final_layer.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        with pytest.raises(Step1XError, match=f"'{re.escape(node)}' cannot be combined with another node pack .*Remove one of the two"):
            run(both, edit)
    finally:
        hook.remove()
    assert not calls and not foreign_parts(model.model.diffusion_model)
    if theirs_first:
        assert torch.equal(run(OURS[node](model), edit), alone[node])


@pytest.mark.parametrize("node", ["Step1X-Edit Speed (TeaCache)", "Step1X-Edit Speed (region)"])
@pytest.mark.parametrize("name", ["forward", "forward_orig"])
def test_a_part_that_is_replaced_for_good_is_refused_too(model, edit, node, name):
    transformer = model.model.diffusion_model
    function = getattr(Flux, name)
    with mock.patch.object(transformer, name, MethodType(function, transformer)):
        with pytest.raises(Step1XError, match=f"'{re.escape(node)}' cannot be combined .*{name}"):
            run(OURS[node](model), edit)


def test_another_packs_cache_alone_and_a_lasting_function_beside_the_interval_are_left_alone(model, edit):
    plain, interval = run(model, edit), run(OURS["Step1X-Edit Speed (guided part)"](model), edit)
    assert torch.allclose(run(by_function(model, block_cache), edit), plain, atol=1e-4)
    transformer = model.model.diffusion_model
    with mock.patch.object(transformer, "forward_orig", MethodType(Flux.forward_orig, transformer)):
        assert torch.allclose(run(OURS["Step1X-Edit Speed (guided part)"](model), edit), interval, atol=1e-4)


@pytest.mark.once
def test_ours_go_together_with_a_function_that_swaps_nothing(model, edit):
    def call(apply_model, params):
        return apply_model(params["input"], params["timestep"], **params["c"])

    for ours in OURS.values():
        patched = ours(model)
        expected = run(patched, edit)
        patched.set_model_unet_function_wrapper(call)
        assert torch.equal(run(patched, edit), expected)


def without_reference(conditioning):
    return [[states, {key: value for key, value in entry.items() if key != "reference_latents"}] for states, entry in conditioning]


@pytest.mark.parametrize("lacking", ["positive", "negative", "one of two"])
def test_a_prompt_without_the_reference_of_the_other_is_refused(model, edit, lacking):
    """Impact Pack's wildcard puts a prompt of its own in place of the instruction."""
    positive, negative, latent = edit
    bare = without_reference(positive)
    prompts = {
        "positive": (bare, negative),
        "negative": (positive, without_reference(negative)),
        "one of two": (positive + bare, negative),
    }[lacking]
    name = "negative" if lacking == "negative" else "positive"
    with pytest.raises(Step1XError, match=f"Input '{name}' has no reference image"):
        run(model, (*prompts, latent))


def test_text_to_image_and_a_negative_that_is_not_looked_at_are_not(model, edit):
    positive, negative, latent = edit
    assert run(model, (without_reference(positive), without_reference(negative), latent)).isfinite().all()
    unlimited = model.clone()
    unlimited.model_options.pop("disable_cfg1_optimization", None)
    assert torch.equal(run(unlimited, (positive, without_reference(negative), latent), 1.0), run(unlimited, edit, 1.0))
