"""The host's own nodes with our objects, on the shipped miniature model: each has to do to a real edit what docs/stock_nodes.md says."""


import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.model_management
import comfy.ops
import demo_model
import folder_paths
import numpy as np
import pytest
import tiny_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfyui_version import __version__ as HOST_VERSION
from PIL import Image
from safetensors.torch import save_file
from stock_nodes import FEW, NODES, PAIRS, SAME, SAME_WORDS, SEED, SIZE, SOURCE, STEPS, Demo, difference, distance, made, right, run

from miniature.scenes import judge
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.sampling.sampler import flow_sigmas, sample, set_norm_limiter, with_norm_limiter
from step1x_core.images import from_uint8, truncate_uint8
from step1x_core.sampling.guidance import NormLimiter

LEFT, RIGHT = (slice(None), slice(0, 60)), (slice(None), slice(68, None))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo():
    return Demo()


@pytest.fixture
def block_calls(demo):
    """The sizes of the batches that went through the transformer."""
    calls = []
    hook = demo.model.model.diffusion_model.double_blocks[0].register_forward_hook(lambda module, args, out: calls.append(out[0].shape[0]))
    yield calls
    hook.remove()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The host reads and writes under tmp_path."""
    for name in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path))
    for name in ("diffusion_models", "loras", "upscale_models"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


# Sampling


def test_ksampler_with_model_sampling_flux_is_our_sampler(demo):
    positive, negative, latent = demo.edit()
    ours = sample(
        demo.model,
        positive,
        negative,
        latent,
        flow_sigmas(FEW, latent["samples"]),
        demo_model.CFG,
        SEED,
        callback=lambda *args: None,
    )
    assert difference(demo.plain(steps=FEW), ours) < SAME
    assert all(right(kind, demo.picture(demo.plain(kind, steps))) for kind, steps in (("recolour", STEPS), ("recolour", FEW), ("add", FEW)))
    unshifted = run("BasicScheduler", model=demo.model, scheduler="simple", steps=STEPS)[0]
    assert torch.allclose(demo.sigmas(), flow_sigmas(STEPS, latent["samples"])) and not torch.allclose(demo.sigmas(), unshifted, atol=0.1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "sampler, scheduler",
    [
        ("heun", "beta"),
        ("dpmpp_2m", "sgm_uniform"),
        ("euler_ancestral", "normal"),
        ("uni_pc", "simple"),
        ("res_multistep", "kl_optimal"),
        ("lcm", "karras"),
    ],
)
def test_samplers_and_schedulers(demo, sampler, scheduler):
    assert right("recolour", demo.picture(demo.ksampler(sampler_name=sampler, scheduler=scheduler)))


def test_ksampler_advanced_in_two_halves(demo):
    positive, negative, latent = demo.edit()
    shared = {
        "model": demo.shifted(),
        "noise_seed": SEED,
        "steps": FEW,
        "cfg": demo_model.CFG,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": positive,
        "negative": negative,
    }
    half = FEW // 2
    first = run(
        "KSamplerAdvanced",
        **shared,
        add_noise="enable",
        latent_image=latent,
        start_at_step=0,
        end_at_step=half,
        return_with_leftover_noise="enable",
    )[0]
    assert not made("recolour", demo.picture(first))
    whole = run(
        "KSamplerAdvanced",
        **shared,
        add_noise="disable",
        latent_image=first,
        start_at_step=half,
        return_with_leftover_noise="disable",
    )[0]
    assert difference(whole, demo.plain(steps=FEW)) < SAME


def test_custom_sampling_in_one_go_and_split(demo):
    positive, negative, _ = demo.edit()
    guider = run("CFGGuider", model=demo.model, positive=positive, negative=negative, cfg=demo_model.CFG)[0]
    assert difference(demo.custom(guider, demo.sigmas(FEW))[0], demo.plain(steps=FEW)) < SAME
    high, low = run("SplitSigmas", sigmas=demo.sigmas(FEW), step=FEW // 2)
    noisy, guess = demo.custom(guider, high)
    assert difference(noisy, guess) > 1
    assert difference(demo.custom(guider, low, latent=noisy, noise=run("DisableNoise")[0])[0], demo.plain(steps=FEW)) < SAME


def test_another_seed_is_another_picture_of_the_same_edit(demo):
    positive, negative, _ = demo.edit()
    guider = run("CFGGuider", model=demo.model, positive=positive, negative=negative, cfg=demo_model.CFG)[0]
    other, _ = demo.custom(guider, demo.sigmas(), noise=run("RandomNoise", noise_seed=SEED + 1)[0])
    assert difference(other, demo.plain()) > 0.1 and right("recolour", demo.picture(other))


def test_basic_guider_runs_without_a_negative(demo, block_calls):
    guider = run("BasicGuider", model=demo.model, conditioning=demo.edit()[0])[0]
    assert right("recolour", demo.picture(demo.custom(guider, demo.sigmas())[0]))
    assert block_calls == [1] * STEPS


def test_dual_guider_weighs_two_instructions(demo):
    positive, negative, _ = demo.edit()
    for strength, followed, ignored in ((demo_model.CFG, "recolour", "add"), (0.0, "add", "recolour")):
        guider = run("DualCFGGuider", model=demo.model, cond1=positive, cond2=demo.edit("add")[0], negative=negative, cfg_conds=strength,
                     cfg_cond2_negative=demo_model.CFG, style="regular")[0]
        pixels = demo.picture(demo.custom(guider, demo.sigmas(FEW))[0])
        assert made(followed, pixels) and not made(ignored, pixels)


def test_perp_neg_with_the_negative_as_its_empty_prompt_is_plain_guidance(demo):
    positive, negative, _ = demo.edit()
    guider = run(
        "PerpNegGuider",
        model=demo.model,
        positive=positive,
        negative=negative,
        empty_conditioning=negative,
        cfg=demo_model.CFG,
        neg_scale=1.0,
    )[0]
    assert difference(demo.custom(guider, demo.sigmas(FEW))[0], demo.plain(steps=FEW)) < SAME


@pytest.mark.parametrize("node", [name for name in ("DualCFGGuider", "DualModelGuider") if name in NODES])
def test_guiders_that_mix_themselves_leave_out_the_limiter(demo, node):
    positive, negative, _ = demo.edit()
    inputs = {
        "DualCFGGuider": {
            "cond1": positive,
            "cond2": negative,
            "cfg_conds": demo_model.CFG,
            "cfg_cond2_negative": 1.0,
            "style": "regular",
        },
        "DualModelGuider": {"model_negative": demo.model, "positive": positive, "cfg": demo_model.CFG},
    }
    out = demo.custom(run(node, model=demo.model, negative=negative, **inputs[node])[0], demo.sigmas(FEW))[0]
    unlimited = demo.ksampler(set_norm_limiter(demo.model, NormLimiter(truncate=1.0)), steps=FEW)
    assert difference(out, unlimited) < SAME < 0.01 < difference(out, demo.plain(steps=FEW)) and right("recolour", demo.picture(out))


@pytest.mark.parametrize("node", ["EmptySD3LatentImage", "EmptyLatentImage"])
def test_empty_latents_at_full_denoise(demo, node):
    empty = run(node, width=SIZE, height=SIZE)[0]
    assert difference(demo.ksampler(latent=empty, steps=FEW), demo.plain(steps=FEW)) < SAME


# Masks


def test_mask_painted_into_the_picture_limits_the_edit(demo, folders):
    alpha = np.full((SIZE, SIZE), 255, np.uint8)
    alpha[:, :SIZE // 2] = 0
    Image.fromarray(np.dstack((SOURCE, alpha))).save(folders / "painted.png")
    image, mask = run("LoadImage", image="painted.png")
    assert torch.equal(image, from_uint8(SOURCE)[None])
    masked = run("SetLatentNoiseMask", samples=demo.edit()[2], mask=mask)[0]
    out = demo.ksampler(kind="background", latent=masked)
    pixels = demo.picture(out)
    assert distance(pixels, PAIRS["background"].target, LEFT) < 0.04 and distance(pixels, SOURCE, RIGHT) < 0.04
    assert torch.allclose(out["samples"][..., SIZE // 16:], demo.edit()[2]["samples"][..., SIZE // 16:], atol=1e-5)
    assert made("background", demo.picture(demo.plain("background", FEW))) and not made("background", pixels)
    # An inpainting model's extra channels are not read: the same picture.
    positive, negative, latent = run(
        "InpaintModelConditioning",
        positive=demo.edit("background")[0],
        negative=demo.edit("background")[1],
        vae=demo.vae,
        pixels=image,
        mask=mask,
        noise_mask=True,
    )
    assert difference(demo.ksampler(positive=positive, negative=negative, latent=latent), out) < SAME


def test_vae_encode_for_inpaint_hides_nothing_from_the_reference(demo):
    mask = torch.zeros(1, SIZE, SIZE)
    mask[..., :SIZE // 2] = 1
    latent = run("VAEEncodeForInpaint", pixels=from_uint8(SOURCE)[None], vae=demo.vae, mask=mask)[0]
    pixels = demo.picture(demo.ksampler(kind="background", latent=latent))
    assert distance(pixels, PAIRS["background"].target, LEFT) < 0.04 and distance(pixels, SOURCE, RIGHT) < 0.04


def test_differential_diffusion_edits_where_the_mask_is_grey(demo):
    mask = torch.zeros(1, SIZE, SIZE)
    mask[..., :44], mask[..., 44:86] = 1, 0.5
    latent = run("SetLatentNoiseMask", samples=demo.edit()[2], mask=mask)[0]
    grey, outside = (slice(None), slice(52, 80)), (slice(None), slice(96, None))
    target = PAIRS["background"].target
    mixed, gradual = (demo.picture(demo.ksampler(model, kind="background", latent=latent)) for model in
                      (None, run("DifferentialDiffusion", model=demo.model)[0]))
    assert distance(mixed, target, grey) > 0.08 > 0.04 > distance(gradual, target, grey)
    assert distance(gradual, SOURCE, outside) < 0.04


def test_composites_join_edits(demo):
    region = torch.from_numpy(PAIRS["recolour"].region)[None].float()
    edited = run("VAEDecode", samples=demo.plain(), vae=demo.vae)[0]
    joined = run("ImageCompositeMasked", destination=from_uint8(SOURCE)[None], source=edited, x=0, y=0, resize_source=False, mask=region)[0]
    pixels = truncate_uint8(joined[0]).numpy()
    assert right("recolour", pixels) and np.array_equal(pixels[~PAIRS["recolour"].region], SOURCE[~PAIRS["recolour"].region])
    both = run("LatentCompositeMasked", destination=demo.plain("add"), source=demo.plain(), x=0, y=0, resize_source=False, mask=region)[0]
    assert all(made(kind, demo.picture(both)) for kind in ("recolour", "add")) and not made("recolour", demo.picture(demo.plain("add")))


# Pictures and latents


def test_vae_nodes(demo):
    image = from_uint8(SOURCE)[None]
    assert torch.equal(run("VAEEncode", pixels=image, vae=demo.vae)[0]["samples"], demo.edit()[2]["samples"])
    assert np.array_equal(truncate_uint8(run("VAEDecode", samples=demo.plain(), vae=demo.vae)[0][0]).numpy(), demo.picture(demo.plain()))
    tiled = run("VAEDecodeTiled", samples=demo.plain(), vae=demo.vae, tile_size=96, overlap=32)[0]
    assert right("recolour", truncate_uint8(tiled[0]).numpy()) and not torch.equal(tiled, demo.vae.decode(demo.plain()["samples"]))
    latent = run("VAEEncodeTiled", pixels=image, vae=demo.vae, tile_size=96, overlap=32)[0]
    positive, negative = ([[cond, extra | {"reference_latents": [latent["samples"]]}] for cond, extra in c] for c in demo.edit()[:2])
    assert 0.01 < difference(latent, demo.edit()[2])
    assert right("recolour", demo.picture(demo.ksampler(positive=positive, negative=negative, latent=latent)))


def test_reference_latent_is_what_the_edit_looks_at(demo):
    _, _, latent = demo.edit()
    bare = [[[cond, {k: v for k, v in extra.items() if k != "reference_latents"}] for cond, extra in c] for c in demo.edit()[:2]]
    assert distance(demo.picture(demo.ksampler(positive=bare[0], negative=bare[1], steps=FEW)), SOURCE) > 0.1
    positive, negative = (run("ReferenceLatent", conditioning=c, latent=latent)[0] for c in bare)
    assert difference(demo.ksampler(positive=positive, negative=negative, steps=FEW), demo.plain(steps=FEW)) < SAME


def test_scaling_before_the_edit(demo):
    large = run("ImageScaleBy", image=from_uint8(SOURCE)[None], upscale_method="lanczos", scale_by=3.0)[0]
    small = run("ImageScale", image=large, upscale_method="area", width=SIZE, height=SIZE, crop="disabled")[0]
    kontext = run("FluxKontextImageScale", image=small)[0]
    assert kontext.shape == (1, 1024, 1024, 3)
    positive, negative, latent = demo.encode(kontext, PAIRS["recolour"].instruction)
    assert right("recolour", demo.picture(demo.ksampler(positive=positive, negative=negative, latent=latent)))


@pytest.mark.parametrize(
    "node, size",
    [
        ("LatentUpscale", {"upscale_method": "bicubic", "width": 2 * SIZE, "height": 2 * SIZE, "crop": "disabled"}),
        ("LatentUpscaleBy", {"upscale_method": "bislerp", "scale_by": 2.0}),
    ],
)
def test_latent_upscaling_after_the_edit(demo, node, size):
    image = run("VAEDecode", samples=run(node, samples=demo.plain(), **size)[0], vae=demo.vae)[0]
    assert image.shape == (1, 2 * SIZE, 2 * SIZE, 3)
    small = run("ImageScale", image=image, upscale_method="area", width=SIZE, height=SIZE, crop="disabled")[0]
    assert (
        made("recolour", truncate_uint8(small[0]).numpy())
        and distance(truncate_uint8(small[0]).numpy(), PAIRS["recolour"].target) < 0.06
    )


def test_upscale_model_after_the_edit(demo, folders):
    save_file(tiny_models.pixel_repeater(), folders / "repeat.safetensors")
    image = run("VAEDecode", samples=demo.plain(), vae=demo.vae)[0].clamp(0, 1)
    large = run("ImageUpscaleWithModel", upscale_model=run("UpscaleModelLoader", model_name="repeat.safetensors")[0], image=image)[0]
    assert torch.allclose(large, image.repeat_interleave(4, 1).repeat_interleave(4, 2), atol=1e-5)


def test_batches_of_latents(demo):
    latent = demo.edit()[2]
    two = demo.ksampler(latent=run("RepeatLatentBatch", samples=latent, amount=2)[0], steps=FEW)
    assert all(right("recolour", demo.picture(two, i)) for i in range(2)) and (two["samples"][0] - two["samples"][1]).abs().max() > 0.1
    assert difference(run("LatentFromBatch", samples=two, batch_index=0, length=1)[0], demo.plain(steps=FEW)) < SAME


def test_batches_of_pictures(demo):
    pictures = run("ImageBatch", image1=from_uint8(SOURCE)[None], image2=from_uint8(SAME_WORDS.source)[None])[0]
    positive, negative, latent = demo.encode(pictures, SAME_WORDS.instruction)
    single = run("VAEEncode", pixels=pictures[1:], vae=demo.vae)[0]
    joined = run("LatentBatch", samples1=demo.edit()[2], samples2=single)[0]
    assert joined["samples"].shape == latent["samples"].shape and torch.allclose(joined["samples"], latent["samples"], atol=1e-4)
    out = demo.ksampler(positive=positive, negative=negative, latent=joined, steps=FEW)
    # Joined latents have the same noise each, as when sampled alone.
    assert difference(run("LatentFromBatch", samples=out, batch_index=0, length=1)[0], demo.plain("background", FEW)) < 1e-3
    assert right("background", demo.picture(out)) and judge(SAME_WORDS, demo.picture(out, 1)).success


def test_saved_latents_and_pictures(demo, folders):
    NODES["SaveLatent"]().save(demo.plain(), "edit")
    loaded = run("LoadLatent", latent=next(folders.glob("*.latent")).name)[0]
    assert torch.equal(loaded["samples"], demo.plain()["samples"])
    image = run("VAEDecode", samples=loaded, vae=demo.vae)[0]
    shown = NODES["SaveImage"]().save_images(image)["ui"]["images"] + NODES["PreviewImage"]().save_images(image)["ui"]["images"]
    compared = NODES["ImageCompare"].execute(image_a=from_uint8(SOURCE)[None], image_b=image).ui
    pixels = [np.asarray(Image.open(folders / entry["filename"])) for entry in (*shown, *compared["b_images"])]
    assert len(pixels) == 3 and all(np.array_equal(p, demo.picture(demo.plain())) for p in pixels)
    assert np.array_equal(np.asarray(Image.open(folders / compared["a_images"][0]["filename"])), SOURCE)


# Conditionings


def test_zero_out_as_negative(demo):
    negative = run("ConditioningZeroOut", conditioning=demo.edit()[1])[0]
    out = demo.ksampler(negative=negative)
    assert not negative[0][0].any() and difference(out, demo.plain()) > 0.1 and right("recolour", demo.picture(out))


def test_combined_instructions_each_under_its_mask(demo):
    positive, other = demo.edit()[0], demo.edit("add")[0]
    twice = run("ConditioningCombine", conditioning_1=positive, conditioning_2=positive)[0]
    assert difference(demo.ksampler(positive=twice, steps=FEW), demo.plain(steps=FEW)) < SAME
    region = torch.from_numpy(PAIRS["add"].region)[None].float()
    masked = [
        run("ConditioningSetMask", conditioning=c, mask=mask, strength=1.0, set_cond_area="default")[0]
        for c, mask in ((positive, 1 - region), (other, region))
    ]
    pixels = demo.picture(demo.ksampler(positive=run("ConditioningCombine", conditioning_1=masked[0], conditioning_2=masked[1])[0]))
    assert made("recolour", pixels) and made("add", pixels)


@pytest.mark.parametrize("change, followed, ignored", [(0.5, "add", "recolour"), (0.95, "recolour", "add")])
def test_timestep_range_hands_over_to_another_instruction(demo, change, followed, ignored):
    ranges = [run("ConditioningSetTimestepRange", conditioning=demo.edit(kind)[0], start=start, end=end)[0]
              for kind, start, end in (("recolour", 0.0, change), ("add", change, 1.0))]
    pixels = demo.picture(demo.ksampler(positive=run("ConditioningCombine", conditioning_1=ranges[0], conditioning_2=ranges[1])[0]))
    assert made(followed, pixels) and not made(ignored, pixels)


def test_average_takes_the_mask_of_the_first(demo):
    positive, other = demo.edit()[0], demo.edit("add")[0]
    one, none = (
        run(
            "ConditioningAverage", conditioning_to=positive, conditioning_from=other, conditioning_to_strength=strength
        )[0]
        for strength in (1.0, 0.0)
    )
    assert (
        torch.equal(one[0][0], positive[0][0])
        and torch.equal(none[0][0], other[0][0])
        and torch.equal(none[0][1]["attention_mask"], positive[0][1]["attention_mask"])
    )
    pixels = demo.picture(demo.ksampler(positive=none))
    assert made("add", pixels) and not made("recolour", pixels)


def test_stock_text_encoding(demo):
    image, instruction = from_uint8(SOURCE)[None], PAIRS["recolour"].instruction
    blind = run("CLIPTextEncode", clip=demo.clip, text=instruction)[0]
    seeing = run("TextEncodeQwenImageEdit", clip=demo.clip, prompt=instruction, image=image)[0]
    results = [
        made(
            "recolour",
            demo.picture(demo.ksampler(positive=run("ReferenceLatent", conditioning=c, latent=demo.edit()[2])[0])),
        )
        for c in (blind, seeing)
    ]
    assert results == [False, True]


# Model patches


@pytest.mark.sampled(2)
@pytest.mark.parametrize("node, inputs", [
    ("APG", {}), ("CFGZeroStar", {}), ("RescaleCFG", {}), ("CFGNorm", {}), ("TCFG", {}), ("NAGuidance", {}),
    ("SkipLayerGuidanceDiT", {"double_layers": "1", "single_layers": "1", "scale": 1.0, "start_percent": 0.0, "end_percent": 0.5}),
    ("SkipLayerGuidanceDiTSimple", {"double_layers": "1", "single_layers": "1"}),
])
def test_guidance_patches(demo, node, inputs):
    out = demo.ksampler(run(node, model=demo.model, **inputs)[0])
    assert difference(out, demo.plain()) > 0.01 and right("recolour", demo.picture(out))


@pytest.mark.parametrize("node, threshold", [("EasyCache", 0.2), ("LazyCache", 0.1)])
def test_caches_skip_steps_and_keep_the_edit(demo, block_calls, node, threshold):
    out = demo.ksampler(run(node, model=demo.model, reuse_threshold=threshold)[0], steps=12)
    assert len(block_calls) <= 9 and right("recolour", demo.picture(out))


@pytest.mark.once  # test_compile.py has the tiny model in every host
def test_compiled_model(demo):
    """With the backend that only traces: the default one gives the same after a minute of compiling. With torch's attention, as on a graphics card: the
    host's for a CPU asks for the free memory, which makes a graph of every block's halves."""
    model = demo.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda attention, *args, **kwargs: (
        attention_pytorch.__wrapped__(*args, **kwargs)
    )
    assert difference(demo.ksampler(run("TorchCompileModel", model=model, backend="eager")[0], steps=FEW), demo.plain(steps=FEW)) < SAME


def test_merging_models(demo):
    nothing = run("ModelMergeSubtract", model1=demo.model, model2=demo.model, multiplier=1.0)[0]
    for model, whole in ((nothing, False), (run("ModelMergeAdd", model1=nothing, model2=demo.model)[0], True),
                         (run("ModelMergeSimple", model1=demo.model, model2=nothing, ratio=1.0)[0], True),
                         (run("ModelMergeSimple", model1=demo.model, model2=nothing, ratio=0.5)[0], False)):
        out = demo.ksampler(model, steps=FEW)
        assert difference(out, demo.plain(steps=FEW)) < SAME if whole else not made("recolour", demo.picture(out))
    ratios = {key: 1.0 for key in NODES["ModelMergeFlux1"].INPUT_TYPES()["required"] if not key.startswith("model")} | {"img_in.": 0.25}
    merged = run("ModelMergeFlux1", model1=demo.model, model2=nothing, **ratios)[0]
    assert merged.patches["diffusion_model.connector.S.input_embedder.weight"][0][0] == 0.75


def test_saved_model(demo, folders):
    NODES["ModelSave"]().save(demo.model, "saved")
    path = next(folders.glob("*.safetensors"))
    assert difference(demo.ksampler(load_model(path), steps=FEW), demo.plain(steps=FEW)) < SAME
    stock = run("UNETLoader", unet_name=path.name, weight_dtype="default")[0]
    assert difference(demo.ksampler(with_norm_limiter(stock), steps=FEW), demo.plain(steps=FEW)) < SAME
    without_limiter = demo.ksampler(stock)
    assert difference(without_limiter, demo.plain()) > 0.01 and right("recolour", demo.picture(without_limiter))


def test_stock_lora_loader(demo, folders):
    """A LoRA that takes the last layer's weights away."""
    up, values, down = torch.linalg.svd(demo.model.model.diffusion_model.final_layer.linear.weight.float(), full_matrices=False)
    name = "lora_unet_final_layer_linear"
    save_file(
        {
            f"{name}.lora_up.weight": (-up * values).contiguous(),
            f"{name}.lora_down.weight": down.contiguous(),
            f"{name}.alpha": torch.tensor(float(len(values))),
        },
        folders / "off.safetensors",
    )
    off = run("LoraLoaderModelOnly", model=demo.model, lora_name="off.safetensors", strength_model=1.0)[0]
    assert not made("recolour", demo.picture(demo.ksampler(off, steps=FEW)))
    on_again = run("LoraLoaderModelOnly", model=off, lora_name="off.safetensors", strength_model=-1.0)[0]
    assert difference(demo.ksampler(on_again, steps=FEW), demo.plain(steps=FEW)) < SAME


if "MultiGPU_WorkUnits" in NODES:
    def test_two_devices_share_the_prompts(demo, block_calls, monkeypatch):
        monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda **kwargs: [torch.device("cpu"), torch.device("cpu", 0)])
        split = run("MultiGPU_WorkUnits", model=demo.model, max_gpus=2)[0]
        [clone] = split.get_additional_models_with_key("multigpu")
        calls = []
        clone.model.diffusion_model.double_blocks[0].register_forward_hook(lambda module, args, out: calls.append(out[0].shape[0]))
        assert difference(demo.ksampler(split, steps=FEW), demo.plain(steps=FEW)) < SAME
        assert block_calls == calls == [1] * FEW
        assert (
            difference(
                demo.ksampler(run("SelectModelDevice", model=demo.model, device="cpu")[0], steps=FEW),
                demo.plain(steps=FEW),
            )
            < SAME
        )

    def test_cfg_override(demo):
        assert (
            difference(
                demo.ksampler(run("CFGOverride", model=demo.model, cfg=demo_model.CFG)[0], cfg=6.0, steps=FEW),
                demo.plain(steps=FEW),
            )
            < SAME
        )
else:
    print(
        f"ComfyUI {HOST_VERSION} has no MultiGPU_WorkUnits, SelectModelDevice, DualModelGuider and CFGOverride; they are tested in newer ones."
    )


def train(demo, conditioning) -> tuple:
    inputs = {
        "latents": demo.edit()[2],
        "positive": conditioning,
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "steps": 2,
        "learning_rate": 1e-3,
        "rank": 4,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": True,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    node = NODES["TrainLoraNode"]
    if "quantized_backward" in {entry.id for entry in node.define_schema().inputs}:
        inputs["quantized_backward"] = False
    return node.execute(model=[demo.model], **{name: [value] for name, value in inputs.items()}).result


def test_lora_training_knows_no_reference_picture(demo):
    weight = demo.model.model.diffusion_model.final_layer.linear.weight
    before = weight.clone()
    with pytest.raises(TypeError, match="0-d tensor"):
        train(demo, demo.edit()[0])
    text_only = run("CLIPTextEncode", clip=demo.clip, text="a red cross")[0]
    lora, losses, steps = train(demo, text_only)[:3]
    assert len(losses["loss"]) == steps == 2 and lora["diffusion_model.connector.S.input_embedder.lora_up.weight"].any()
    assert torch.equal(weight, before)
