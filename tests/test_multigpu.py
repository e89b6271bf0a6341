"""The stock MultiGPU CFG Split: the two prompts on two devices give the edit that one device gives. The devices here are two names of the CPU."""

import threading

import comfy.model_management
import pytest
import tiny_models
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file
from stock_nodes import NODES

from step1x_core.guidance import NormLimiter
from step1x_core.host.caching import apply_teacache
from step1x_core.host.encoding import encode_edit
from step1x_core.host.loading import load_model, load_text_encoder
from step1x_core.host.region import apply_region
from step1x_core.host.sampling import flow_sigmas, sample, set_guidance_interval, set_norm_limiter
from step1x_core.region import RegionSettings
from step1x_core.teacache import TeaCacheState

STEPS = 8
FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0)

if "MultiGPU_WorkUnits" not in NODES:
    pytest.skip("This ComfyUI has no MultiGPU CFG Split.", allow_module_level=True)


@pytest.fixture(autouse=True)
def inference(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda **kwargs: [FIRST, SECOND])
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module", params=["v1.1", "v1.2"])
def parts(request, models, vae, photo, tmp_path_factory):
    """A tiny model, loud enough for the norm limiter to act, and an edit for it. v1.2's two prompts differ in length."""
    file = {"v1.1": tiny_models.V11_FILE, "v1.2": tiny_models.V12_FILE}[request.param]
    weights = load_file(models / "diffusion_models" / file)
    weights["final_layer.linear.weight"] *= 5
    path = tmp_path_factory.mktemp("loud") / file
    save_file(weights, path)
    clip = load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, request.param)
    return load_model(path, request.param), encode_edit(clip, vae, photo, 'write "OPEN" on the cup', "", 192)


def run(model, edit, steps=STEPS, cfg=6.0, seed=7):
    positive, negative, latent = edit
    return sample(model, positive, negative, latent, flow_sigmas(steps, latent["samples"]), cfg, seed, callback=lambda *args: None)["samples"]


def split(model):
    return NODES["MultiGPU_WorkUnits"].execute(model, 2).args[0]


NODES_OF_THE_PACK = {
    "nothing": lambda model: model,
    "limiter": lambda model: set_norm_limiter(model, NormLimiter(0.5, 0.8)),
    "interval": lambda model: set_guidance_interval(model, 0.2, 0.7),
    "teacache": lambda model: apply_teacache(model, 0.2),
    "region": lambda model: apply_region(model, RegionSettings(similarity=-0.15, reuse=0.0)),
    "interval and teacache": lambda model: apply_teacache(set_guidance_interval(model, 0.0, 0.5), 0.2),
}


@pytest.mark.parametrize("name", NODES_OF_THE_PACK)
def test_the_split_edit_is_the_plain_one(parts, name):
    """Whichever node comes first."""
    model, edit = parts
    patch = NODES_OF_THE_PACK[name]
    plain = run(patch(model), edit)
    if name != "nothing":
        assert (plain - run(model, edit)).abs().max() > 0.01
    for patched in (split(patch(model)), patch(split(model))):
        assert (run(patched, edit) - plain).abs().max() < 1e-5 * plain.abs().max()


def test_each_device_has_its_own_weights_and_prompt(parts):
    model, edit = parts
    both = split(apply_teacache(model, 0.2))
    [clone] = both.get_additional_models_with_key("multigpu")
    first, second = (part.model.diffusion_model for part in (both, clone))
    assert first is model.model.diffusion_model and second is not first and second.version == first.version
    seen = {first: [], second: []}
    hooks = [transformer.double_blocks[0].register_forward_hook(lambda block, args, out, seen=seen[transformer]: seen.append((out[0].shape[0], threading.get_ident())))
             for transformer in seen]
    run(both, edit)
    for hook in hooks:
        hook.remove()
    # TeaCache skips for each prompt by itself.
    assert all(0 < len(calls) < STEPS and {size for size, _ in calls} == {1} for calls in seen.values())
    assert len({thread for calls in seen.values() for _, thread in calls}) == 2


def test_a_guidance_interval_leaves_one_device_idle_outside(parts):
    model, edit = parts
    both = split(set_guidance_interval(model, 0.0, 0.5))
    transformers = [model.model.diffusion_model, both.get_additional_models_with_key("multigpu")[0].model.diffusion_model]
    calls = {}
    hooks = [transformer.double_blocks[0].register_forward_hook(lambda block, *args: calls.update({block: calls.get(block, 0) + 1})) for transformer in transformers]
    run(both, edit)
    for hook in hooks:
        hook.remove()
    assert [calls[transformer.double_blocks[0]] for transformer in transformers] == [STEPS, STEPS // 2]


def test_scaled_fp8_is_made_again_for_the_second_device(models, clip, vae, photo):
    model = load_model(models / "diffusion_models" / tiny_models.V11_FILE, fp8=True)
    edit = encode_edit(clip, vae, photo, "make the cup red", "", 192)
    both = split(model)
    [clone] = both.get_additional_models_with_key("multigpu")
    weights = [part.model.diffusion_model.single_blocks[0].linear1.weight for part in (both, clone)]
    assert all(isinstance(weight, QuantizedTensor) for weight in weights) and weights[0] is not weights[1]
    plain = run(model, edit)
    assert (run(both, edit) - plain).abs().max() < 1e-4 * plain.abs().max()


def test_a_prompt_that_moves_to_another_device_is_computed_anew():
    state = TeaCacheState(1e9)
    for _ in range(2):
        state.begin(torch.ones(1, 4, 8), False)
        state.residual = torch.ones(1, 4, 8)
    assert not state.ran
    assert state.begin(torch.ones(1, 4, 8, device="meta"), False)
