"""Models made smaller while they are loaded: what is made, that everything else still works with them, and refusals."""

import comfy.model_management
import pytest
import tiny_models
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import load_file
from test_convert import edit, error

from step1x_core.checkpoints.conversion import MODEL_LAYERS, MODULATION_LAYERS
from step1x_core.checkpoints.formats import FORMATS
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints import quantising
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.checkpoints.lora import apply_lora
from step1x_core.host.network.blocks import PAIRED
from step1x_core.host.speed.region import apply_region, region_denoiser
from step1x_core.host.speed.teacache import apply_teacache
from step1x_core.speed.region import RegionSettings

# The largest relative error of an edit's latent against bf16, for random weights.
CHOICES = {"int8": 0.04, "int4": 0.1}
MADE = [choice for choice in CHOICES if any(FORMATS[form].host in QUANT_ALGOS for form in quantising.CHOICES[choice])]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def source(models):
    return models / "diffusion_models" / tiny_models.V11_FILE


@pytest.fixture(scope="module")
def expected(source):
    with torch.inference_mode():
        return edit(load_model(source))


def formats(model):
    """The format of each layer that the host holds quantised."""
    return {
        name: layer.quant_format
        for name, layer in model.model.diffusion_model.named_modules()
        if isinstance(getattr(layer, "weight", None), QuantizedTensor)
    }


@pytest.mark.parametrize("choice", MADE)
def test_the_large_matrices_are_quantised_and_the_edit_stays_near(source, expected, choice):
    model = load_model(source, quantise=choice)
    rebuilt = model.cached_patcher_init[0](*model.cached_patcher_init[1])
    found = formats(model)
    assert found == formats(rebuilt)
    large = {name for name in found if MODEL_LAYERS.fullmatch(f"{name}.weight")}
    assert len(large) == 2 * 8 + 2 * 2 and {found[name] for name in large} == {
        FORMATS[quantising.available_format(choice)].host
    }
    rest = set(found) - large
    assert all(MODULATION_LAYERS.fullmatch(f"{name}.weight") for name in rest) and len(rest) == 6 * (choice == "int4")
    assert 0 < error(edit(model), expected) < CHOICES[choice]


@pytest.mark.parametrize("choice", MADE)
def test_partly_loaded_it_computes_the_same(source, choice):
    whole, partly = (load_model(source, quantise=choice) for _ in range(2))
    partly.load(torch.device("cpu"), lowvram_model_memory=50_000)
    assert partly.model.model_lowvram and torch.equal(edit(partly), edit(whole))


@pytest.mark.parametrize("choice", MADE[-1:])
def test_region_denoising_and_teacache_skip_work(source, choice):
    model, rows = load_model(source, quantise=choice), []
    part = apply_region(model, RegionSettings(similarity=-0.15, reuse=0.0))
    assert torch.isfinite(edit(part, steps=6)).all() and min(region_denoiser(part).step_shares) < 1
    model.model.diffusion_model.single_blocks[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    assert torch.isfinite(edit(apply_teacache(model, 0.5), steps=6)).all() and 0 < sum(rows) < 2 * 6


@pytest.mark.parametrize("choice", MADE)
def test_a_lora_acts_on_it(source, choice):
    generator = torch.Generator().manual_seed(0)
    lora = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.randn(4, 64, generator=generator) / 8,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.randn(192, 4, generator=generator),
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(4.0),
    }
    plain = load_model(source, quantise=choice)
    exact = edit(apply_lora(load_model(source), lora, 1.0))
    changed = edit(apply_lora(plain, lora, 1.0))
    assert error(changed, exact) < 2 * CHOICES[choice] and error(changed, exact) < error(edit(plain), exact)


def test_a_host_without_the_format_refuses_the_choice(source, monkeypatch):
    for host in ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"):
        monkeypatch.delitem(QUANT_ALGOS, host, raising=False)
    for choice, name in (("int8", "int8_tensorwise"), ("int4", "asym_w4a8_int8")):
        with pytest.raises(Step1XError, match=f"'weight_dtype' is {choice}, but this ComfyUI has no {name} layers"):
            load_model(source, quantise=choice)
    monkeypatch.setitem(QUANT_ALGOS, "asym_w4a8_int8", {})
    assert quantising.available_format("int4") == "w4a8"


def test_prompts_are_paired_where_both_are_in_the_batch(source):
    """Without fp8 tensor cores nothing else changes."""
    plain, paired = (load_model(source, quantise="fp8", paired=one) for one in (False, True))
    rebuilt = paired.cached_patcher_init[0](*paired.cached_patcher_init[1])
    for model, cfg, chosen in ((plain, 6.0, False), (paired, 6.0, True), (rebuilt, 6.0, True), (paired, 1.0, True)):
        seen, block = set(), model.model.diffusion_model.single_blocks[0]
        handle = block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.add((kwargs["transformer_options"].get(PAIRED, False), len(args[0]))), with_kwargs=True
        )
        out = edit(model, cfg=cfg)
        handle.remove()
        assert all(pairs == (chosen and prompts == 2) for pairs, prompts in seen)
        assert (chosen and cfg > 1, 2 if cfg > 1 else 1) in seen
        assert cfg == 1 or torch.equal(out, edit(plain))


def test_a_quantised_file_stays_as_it_is(source):
    made = quantising.quantised(load_file(source), "fp8")
    assert quantising.quantised(made, "fp8") is made
    if MADE:
        assert quantising.quantised(made, "int8") is made


def test_cancelling_stops_before_the_next_matrix(source):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        quantising.quantised(load_file(source), "fp8")
