"""'Step1X-Edit Speed': what its modes do to a model, what it says, and its widgets through the host's executor."""

import importlib.util
import logging
import math
import sys

import pytest
import torch
from app.node_replace_manager import NodeReplaceManager
from bad_input_host import NOT_CONVERTED, TOO_LARGE, TOO_SMALL, Given, Host
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from loop_host import NAME

import nodes
from step1x_core.errors import Step1XError
from step1x_core.host.network.blocks import FP8_ATTENTION
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.host.sampling.sampler import COND_BATCH, flow_sigmas, sample, set_guidance_interval
from step1x_core.host.speed import fp8_attention
from step1x_core.host.speed.fp8_attention import NO_CARD, attend_fp8
from step1x_core.host.speed.presets import apply_speed, settings_of
from step1x_core.host.speed.region import apply_region, region_denoiser
from step1x_core.host.speed.teacache import WRAPPER_KEY, apply_teacache
from step1x_core.speed.presets import (
    ALL_STEPS,
    BALANCED,
    EXACT,
    FAST,
    PRESETS,
    REGION,
    TEACACHE,
    SpeedSettings,
    described,
)
from step1x_core.speed.region import RegionSettings

GUIDED = {"start_percent": 0.25, "end_percent": 0.75}
PART = {"similarity": 0.5, "warmup": 0.3, "refreshes": 2, "reuse": 0.1}
CUSTOM = {
    TEACACHE: {"threshold": 0.4, "attention": "exact"} | GUIDED,
    REGION: PART | GUIDED,
    ALL_STEPS: {"attention": "exact"} | GUIDED,
}


@pytest.fixture(scope="module")
def edit(clip, vae, photo):
    return encode_edit(clip, vae, photo, "make the cup red", "", 256)


def run(model, edit, steps=8):
    positive, negative, source = edit
    with torch.inference_mode():
        sigmas = flow_sigmas(steps, source["samples"])
        return sample(model, positive, negative, source, sigmas, 6.0, 7, callback=lambda *args: None)["samples"]


def teacache_of(model):
    return next((wrapper.__self__ for wrapper in model.get_wrappers(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)), None)


def chosen(mode, model, **values):
    return apply_speed(model, mode, settings_of({"mode": mode, **values}))


@pytest.fixture
def data_centre(monkeypatch):
    """A machine that has what fp8 attention needs, as far as anyone asks before it runs."""
    monkeypatch.setattr(fp8_attention, "cudnn_is_fastest", lambda device: True)
    monkeypatch.setattr(fp8_attention, "kernels_on", lambda device: object())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_exact_is_the_model_as_it_is(model, edit):
    assert torch.equal(run(chosen(EXACT, model), edit), run(model, edit))
    assert chosen(EXACT, model) is model


@pytest.mark.once
@pytest.mark.parametrize("mode, single", [
    (BALANCED, lambda model: apply_teacache(model, 0.3)),
    (FAST, lambda model: set_guidance_interval(apply_teacache(model, 0.3), 0.0, 0.5)),
    (TEACACHE, lambda model: set_guidance_interval(apply_teacache(model, 0.4), 0.25, 0.75)),
    (REGION, lambda model: set_guidance_interval(apply_region(model, RegionSettings(**PART)), 0.25, 0.75)),
    (ALL_STEPS, lambda model: set_guidance_interval(model, 0.25, 0.75)),
])
def test_a_mode_is_the_single_functions(model, edit, mode, single):
    assert torch.equal(run(chosen(mode, model, **CUSTOM.get(mode, {})), edit), run(single(model), edit))


def test_the_patches_hold_the_values_of_their_mode(model):
    balanced, fast = chosen(BALANCED, model), chosen(FAST, model)
    assert teacache_of(balanced).threshold == teacache_of(fast).threshold == 0.3
    assert COND_BATCH not in balanced.model_options and fast.model_options[COND_BATCH].end == 0.5
    custom = chosen(TEACACHE, model, **CUSTOM[TEACACHE])
    interval = custom.model_options[COND_BATCH]
    assert (teacache_of(custom).threshold, interval.start, interval.end) == (0.4, 0.25, 0.75)
    assert region_denoiser(chosen(REGION, model, **CUSTOM[REGION])).settings == RegionSettings(**PART)
    assert teacache_of(model) is None and COND_BATCH not in model.model_options


def test_two_nodes_in_a_row_add_up_and_the_same_kind_is_replaced(model):
    both = chosen(ALL_STEPS, chosen(BALANCED, model), attention="exact", start_percent=0.0, end_percent=0.6)
    assert teacache_of(both).threshold == 0.3 and both.model_options[COND_BATCH].end == 0.6
    again = chosen(TEACACHE, both, threshold=0.5, attention="exact", start_percent=0.0, end_percent=1.0)
    assert teacache_of(again).threshold == 0.5 and again.model_options[COND_BATCH].end == 0.6


def test_fp8_attention_is_used_where_it_can_run(model, data_centre):
    changed = chosen(FAST, model)
    assert changed.model_options["transformer_options"][FP8_ATTENTION] is attend_fp8
    for mode in (BALANCED, EXACT):
        assert FP8_ATTENTION not in chosen(mode, model).model_options["transformer_options"]
    asked = chosen(ALL_STEPS, model, attention="fp8", start_percent=0.0, end_percent=1.0)
    assert asked.model_options["transformer_options"][FP8_ATTENTION] is attend_fp8


def test_a_preset_goes_on_without_it_and_a_custom_mode_refuses(model):
    assert FP8_ATTENTION not in chosen(FAST, model).model_options["transformer_options"]
    with pytest.raises(Step1XError, match="needs an NVIDIA data-centre GPU .* Set attention to exact"):
        chosen(ALL_STEPS, model, attention="fp8", start_percent=0.0, end_percent=1.0)


def last_line(caplog) -> str:
    return [record.getMessage() for record in caplog.records if record.name.endswith("speed.presets")][-1]


def test_the_log_says_in_one_line_what_was_chosen(model, caplog, data_centre, monkeypatch):
    caplog.set_level(logging.INFO)
    chosen(FAST, model)
    assert last_line(caplog) == "Step1X-Edit Speed: fast: TeaCache 0.3, guidance to 50 % of the steps, fp8 attention"
    chosen(EXACT, model)
    assert last_line(caplog) == "Step1X-Edit Speed: exact: nothing is left out"
    chosen(REGION, model, **CUSTOM[REGION])
    assert last_line(caplog) == ("Step1X-Edit Speed: custom: region: region denoising at similarity 0.5, "
                                 "guidance from 25 to 75 % of the steps")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen(FAST, model)
    assert last_line(caplog) == ("Step1X-Edit Speed: fast: TeaCache 0.3, guidance to 50 % of the steps; "
                                 "fp8 attention is not available here (no nvidia-cudnn-frontend)")
    monkeypatch.setattr(fp8_attention, "kernels_on", lambda device: None)
    chosen(FAST, model)
    assert last_line(caplog).endswith(f"; fp8 attention is not available here ({NO_CARD})")


def test_the_line_names_every_setting():
    line = described("x", SpeedSettings(threshold=0.25, fp8_attention=True, start=0.1, end=0.9))
    assert line == "Step1X-Edit Speed: x: TeaCache 0.25, guidance from 10 to 90 % of the steps, fp8 attention"


# Through the host.


@pytest.fixture(scope="module")
def host(model, clip, vae):
    with pytest.MonkeyPatch.context() as patch:
        yield Host(patch, model, clip, vae)


def choice(host) -> io.DynamicCombo.Input:
    entry, = (entry for entry in nodes.NODE_CLASS_MAPPINGS["Step1XEditSpeedPreset"].GET_SCHEMA().inputs if entry.id == "mode")
    return entry


def defaults(host, mode) -> dict:
    """The widgets of a mode as the editor sends them."""
    option, = (option for option in choice(host).options if option.key == mode)
    return {"mode": mode} | {f"mode.{entry.id}": entry.default for entry in option.inputs}


def speed(host, **inputs):
    return host.run("Step1XEditSpeedPreset", model=Given(host.model), **inputs)


def test_the_first_choice_is_what_a_new_node_has_and_the_modes_are_those_of_the_table(host):
    keys = [option.key for option in choice(host).options]
    assert keys[0] == BALANCED and set(keys) == {*PRESETS, *CUSTOM}


@pytest.mark.parametrize("mode", [*PRESETS, *CUSTOM])
def test_every_mode_edits_with_its_defaults(host, mode):
    (patched,) = speed(host, **defaults(host, mode)).made()
    latent = host.sample(model=Given(patched), steps=4).made()[0]["samples"]
    assert torch.isfinite(latent).all()
    if mode == EXACT:
        assert torch.equal(latent, host.sample(steps=4).made()[0]["samples"])
    host.still_edits()


NUMBERS = [(TEACACHE, "threshold", 0.0, 2.0), (REGION, "similarity", -1.0, 1.0), (REGION, "warmup", 0.0, 1.0),
           (REGION, "refreshes", 0, 20), (REGION, "reuse", 0.0, 1.0)]
NUMBERS += [(mode, name, 0.0, 1.0) for mode in CUSTOM for name in GUIDED]


def test_no_number_behind_a_choice_is_left_out(host):
    found = {(option.key, entry.id, entry.min, entry.max) for option in choice(host).options for entry in option.inputs
             if isinstance(entry, (io.Int.Input, io.Float.Input))}
    assert found == set(NUMBERS)


@pytest.mark.parametrize("mode, name, low, high", NUMBERS)
def test_numbers_behind_a_choice_are_checked(host, mode, name, low, high):
    whole = isinstance(low, int)
    kind_of_number = "a whole number" if whole else "a number"
    sentence = f"Input 'mode.{name}' is .*, but it takes {kind_of_number} from {low} to {high}"
    widgets = defaults(host, mode)
    for value, kind in ((low - 1, TOO_SMALL), (high + 1, TOO_LARGE), ("abc", NOT_CONVERTED)):
        assert kind in speed(host, **widgets | {f"mode.{name}": value}).refused
        speed(host, **widgets | {f"mode.{name}": Given(value)}).says(sentence)
    for value in (math.nan, math.inf, None, True):
        speed(host, **widgets | {f"mode.{name}": Given(value)}).says(sentence)
    if not whole:
        speed(host, **widgets | {f"mode.{name}": math.nan}).says(sentence)
    host.still_edits()


@pytest.mark.parametrize("value", ["nope", "", None, 5])
def test_choices_that_there_are_not(host, value):
    sentence = "The input 'mode' has none of its choices: balanced, fast, exact, .*Choose one in the node"
    host.refuses(speed(host, mode=value), sentence)
    host.refuses(speed(host, mode=Given(value)), sentence)
    nested = defaults(host, ALL_STEPS) | {"mode.attention": Given(value)}
    host.refuses(speed(host, **nested), "Input 'mode.attention' is .* one of the entries")


def test_a_guided_part_that_ends_before_it_starts(host):
    widgets = defaults(host, TEACACHE) | {"mode.start_percent": 0.8, "mode.end_percent": 0.7}
    sentence = "Guidance starts at 0.8 of the steps and ends at 0.7; .*Lower start_percent or raise end_percent"
    host.refuses(speed(host, **widgets), sentence)


ALL = {"start_percent": 0.0, "end_percent": 1.0}
OLD = {
    "Step1XTeaCache": ({"threshold": 0.35}, TEACACHE, {"threshold": 0.35, "attention": "exact", **ALL}),
    "Step1XGuidanceInterval": (
        {"start": 0.1, "end": 0.6}, ALL_STEPS, {"attention": "exact", "start_percent": 0.1, "end_percent": 0.6}),
    "Step1XRegion": (PART, REGION, PART | ALL),
    "Step1XFp8Attention": ({}, ALL_STEPS, {"attention": "fp8", **ALL}),
}


@pytest.mark.parametrize("old", OLD)
def test_the_values_of_the_four_nodes_before_it_arrive(host, old):
    """As the server replaces them in a prompt that it is sent; whoever reads the model gets the new node's."""
    manager = NodeReplaceManager()
    for offer in sys.modules[f"{NAME}.nodes.earlier"].own_replacements():
        manager.register(offer)
    values, mode, expected = OLD[old]
    prompt = {"1": {"class_type": old, "inputs": {"model": ["0", 0], **values}, "_meta": {"title": ""}},
              "2": {"class_type": "Step1XEditSampler", "inputs": {"model": ["1", 0]}, "_meta": {"title": ""}}}
    manager.apply_replacements(prompt)
    assert prompt["1"]["class_type"] == "Step1XEditSpeedPreset" and prompt["2"]["inputs"]["model"] == ["1", 0]
    inputs = prompt["1"]["inputs"]
    assert inputs.pop("model") == ["0", 0]
    assert inputs == {"mode": mode} | {f"mode.{name}": value for name, value in expected.items()}
    outcome = speed(host, **inputs)
    if old == "Step1XFp8Attention":
        return outcome.says("needs an NVIDIA data-centre GPU")  # as the node before it said on a CPU
    (patched,) = outcome.made()
    assert torch.isfinite(host.sample(model=Given(patched), steps=4).made()[0]["samples"]).all()
