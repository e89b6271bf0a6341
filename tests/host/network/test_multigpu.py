"""The stock MultiGPU CFG Split: the two prompts on two devices give the edit that one device gives. The devices here are two names of the CPU."""

import threading

import comfy.model_management
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from split_checks import PATCHES, STEPS, difference, loud_model, run, split
from stock_nodes import NODES

from step1x_core.host.network import turns
from step1x_core.host.network.turns import Turns
from step1x_core.host.sampling.sampler import set_guidance_interval
from step1x_core.host.speed.teacache import apply_teacache
from step1x_core.speed.teacache import TeaCacheState

if "MultiGPU_WorkUnits" not in NODES:
    pytest.skip("This ComfyUI has no MultiGPU CFG Split.", allow_module_level=True)


@pytest.fixture(autouse=True)
def inference(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda **kwargs: [torch.device("cpu"), torch.device("cpu", 0)])
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module", params=["v1.1", "v1.2"])
def model(request, tmp_path_factory):
    return loud_model(tmp_path_factory.mktemp("loud"), request.param)


@pytest.fixture(scope="module")
def unpatched(model):
    """What the model draws without any patch."""
    with torch.inference_mode():
        return run(model)


@pytest.fixture
def first_blocks():
    """Calls of the first blocks of models: lists of (batch size, thread), one for each."""
    hooks = []

    def watch(models):
        calls = [[] for _ in models]
        for part, seen in zip(models, calls):
            block = part.model.diffusion_model.double_blocks[0]
            hooks.append(
                block.register_forward_hook(
                    lambda block, args, out, seen=seen: seen.append((out[0].shape[0], threading.get_ident()))
                )
            )
        return calls

    yield watch
    for hook in hooks:
        hook.remove()


def parts(model) -> list:
    """The model of each device."""
    return [model, *model.get_additional_models_with_key("multigpu")]


@pytest.mark.parametrize("name", PATCHES)
def test_the_split_edit_is_the_plain_one(model, unpatched, name):
    """Whichever node comes first."""
    patch = PATCHES[name]
    plain = run(patch(model))
    assert (difference(plain, unpatched) > 0.001) == (name != "nothing")
    for patched in (split(patch(model)), patch(split(model))):
        assert difference(run(patched), plain) < 1e-5


def test_each_device_has_its_own_weights_and_prompt(model, first_blocks):
    both = split(apply_teacache(model, 0.2))
    first, second = (part.model.diffusion_model for part in parts(both))
    assert first is model.model.diffusion_model and second is not first and second.version == first.version
    calls = first_blocks(parts(both))
    run(both)
    # TeaCache skips for each prompt by itself.
    assert all(0 < len(seen) < STEPS and {size for size, _ in seen} == {1} for seen in calls)
    assert len({thread for seen in calls for _, thread in seen}) == 2


def test_the_devices_take_turns_at_each_block(model, monkeypatch):
    taken = []

    class Counted(Turns):
        def taken(self):
            taken.append(threading.get_ident())
            return super().taken()

    monkeypatch.setattr(turns, "TURNS", Counted())
    run(model)
    assert not taken
    transformer = model.model.diffusion_model
    run(split(model))
    assert len(taken) == 2 * STEPS * (len(transformer.double_blocks) + len(transformer.single_blocks)) and len(set(taken)) == 2


def test_a_guidance_interval_leaves_one_device_idle_outside(model, first_blocks):
    both = split(set_guidance_interval(model, 0.0, 0.5))
    calls = first_blocks(parts(both))
    run(both)
    assert [len(seen) for seen in calls] == [STEPS, STEPS // 2]


def test_scaled_fp8_is_made_again_for_the_second_device(tmp_path):
    model = loud_model(tmp_path, "v1.1", quantise="fp8")
    both = split(model)
    weights = [part.model.diffusion_model.single_blocks[0].linear1.weight for part in parts(both)]
    assert all(isinstance(weight, QuantizedTensor) for weight in weights) and weights[0] is not weights[1]
    assert difference(run(both), run(model)) < 1e-4


def test_a_prompt_that_moves_to_another_device_is_computed_anew():
    state = TeaCacheState(1e9)
    for _ in range(2):
        state.begin(torch.ones(1, 4, 8), False)
        state.residual = torch.ones(1, 4, 8)
    assert not state.ran
    assert state.begin(torch.ones(1, 4, 8, device="meta"), False)
