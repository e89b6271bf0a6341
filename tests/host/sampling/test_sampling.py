"""Guidance, schedule and the sampling paths on the host's own samplers."""

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.network import model as model_module
from step1x_core.host.network.model import on_device
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.sampling.sampler import (
    HOOKS,
    check_model,
    fit_latent,
    flow_sigmas,
    sample,
    set_guidance_interval,
    set_norm_limiter,
    with_norm_limiter,
)
from step1x_core.host.speed.teacache import apply_teacache
from step1x_core.sampling.guidance import NormLimiter, patch_norm
from step1x_core.sampling.schedule import sigma_schedule
from step1x_core.speed.teacache import TeaCacheState


def quiet(*args):
    pass


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def loud_model(tmp_path_factory):
    """A model whose guidance differences have norms well above 1, so that the limiter acts."""
    path = tmp_path_factory.mktemp("loud") / "loud-v1p1.safetensors"
    weights = tiny_models.random_weights(tiny_models.transformer_shapes("v1.1", tiny_models.TINY_TRANSFORMER), seed=1)
    weights["final_layer.linear.weight"] *= 20
    save_file(weights, path)
    return load_model(path)


@pytest.fixture(scope="module")
def edit(clip, vae, photo):
    return encode_edit(clip, vae, photo, "make the cup red", "", 256)


def run(model, edit, steps=3, cfg=6.0, seed=7, denoise=1.0, latent=None, **kwargs):
    positive, negative, source = edit
    latent = latent or source
    return sample(
        model,
        positive,
        negative,
        latent,
        flow_sigmas(steps, latent["samples"], denoise),
        cfg,
        seed,
        callback=quiet,
        **kwargs,
    )["samples"]


def test_encode_edit_gives_both_prompts_the_picture(edit, photo):
    positive, negative, latent = edit
    assert latent["samples"].shape == (1, 16, 26, 38)  # 304x208 pixels from 600x400 at level 256
    for cond in (positive, negative):
        assert cond[0][1]["reference_latents"][0] is latent["samples"]
    assert not torch.equal(positive[0][0], negative[0][0])


def test_same_seed_same_picture_other_seed_or_prompt_another(model, clip, vae, photo, edit):
    first = run(model, edit)
    assert torch.equal(first, run(model, edit))
    assert not torch.allclose(first, run(model, edit, seed=8))
    assert not torch.allclose(first, run(model, encode_edit(clip, vae, photo, "make the cup blue", "", 256)))
    assert not torch.allclose(first, run(model, encode_edit(clip, vae, photo.flip(1), "make the cup red", "", 256)))


def test_decode_returns_to_the_source_size_or_stays(model, vae, edit, photo):
    latent = {"samples": run(model, edit)}
    assert decode_edit(vae, latent).shape == (1, 208, 304, 3)
    resized = decode_edit(vae, latent, photo)
    assert resized.shape == photo.shape
    assert torch.equal(resized, (resized * 255).round() / 255)
    fitting = torch.zeros(1, 208, 304, 3)
    assert torch.equal(decode_edit(vae, latent, fitting), decode_edit(vae, latent))


def test_guidance_interval_runs_the_unconditional_pass_inside_it_only(model, edit):
    rows = []

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    def limited(start, end, cfg=6.0):
        patched = set_guidance_interval(model, start, end)
        patched.add_wrapper("diffusion_model", count)
        rows.clear()
        return run(patched, edit, steps=4, cfg=cfg)

    official = run(model, edit, steps=4)
    assert torch.equal(limited(0.0, 1.0), official) and sum(rows) == 8
    assert not torch.allclose(limited(0.0, 0.5), official) and [sum(rows), rows[-1]] == [6, 1]
    limited(0.5, 1.0)
    assert [sum(rows), rows[0]] == [6, 1]
    # Without guidance anywhere, the negative prompt and CFG are as good as not there.
    unguided = limited(0.0, 0.0)
    assert sum(rows) == 4 and torch.allclose(unguided, limited(0.0, 0.0, cfg=2.0), atol=1e-5)
    torch.testing.assert_close(
        unguided, run(set_norm_limiter(model, NormLimiter(truncate=1.0)), edit, steps=4, cfg=1.0), rtol=1e-4, atol=1e-4
    )
    # A second interval takes the first one's place, and another node's function stays in the chain.
    torch.testing.assert_close(run(set_guidance_interval(set_guidance_interval(model, 0, 0), 0, 1), edit, steps=4), official)
    chained = model.clone()
    chained.set_model_sampler_calc_cond_batch_function(lambda args: [torch.zeros_like(args["input"])] * 2)
    assert torch.equal(run(set_guidance_interval(chained, 0, 1), edit, steps=4), run(chained, edit, steps=4))
    with pytest.raises(Step1XError, match="start must not exceed end"):
        set_guidance_interval(model, 0.6, 0.5)


def test_loader_switches_the_limiter_on_and_setting_it_again_replaces_it(model):
    assert model.model_options[HOOKS] == [NormLimiter()]
    changed = set_norm_limiter(model, NormLimiter(truncate=0.5))
    assert changed.model_options[HOOKS] == [NormLimiter(truncate=0.5)] and model.model_options[HOOKS] == [NormLimiter()]
    assert with_norm_limiter(changed) is changed


def test_stock_loaded_model_gets_the_limiter_from_our_sampler(models, model, edit):
    stock = comfy.sd.load_diffusion_model(str(models / "diffusion_models" / tiny_models.V11_FILE))
    assert HOOKS not in stock.model_options
    assert with_norm_limiter(stock).model_options[HOOKS] == [NormLimiter()]
    assert torch.equal(run(with_norm_limiter(stock), edit), run(model, edit))


def test_limiter_acts_only_above_its_threshold(loud_model, edit):
    model = loud_model
    official, off = run(model, edit, steps=6), run(set_norm_limiter(model, NormLimiter(truncate=1.0)), edit, steps=6)
    always = run(set_norm_limiter(model, NormLimiter(truncate=0.0)), edit, steps=6)
    assert not torch.allclose(official, off) and not torch.allclose(official, always)
    # Sigmas of this schedule above 0.93: only the first, so a threshold just below 1 is the same.
    sigmas = flow_sigmas(6, edit[2]["samples"])
    assert (sigmas > 0.93).sum() == 1
    assert torch.equal(run(set_norm_limiter(model, NormLimiter(truncate=0.95)), edit, steps=6), official)


def test_limiter_chains_with_other_pre_cfg_hooks(model, edit):
    seen = []

    def spy(args):
        seen.append(args["conds_out"])
        return args["conds_out"]

    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(spy)
    assert torch.equal(run(patched, edit), run(model, edit)) and len(seen) == 3
    assert "sampler_cfg_function" not in patched.model_options


def test_cfg_one_leaves_the_unconditional_pass_out_where_the_limiter_does_nothing(loud_model, edit):
    rows = []

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    def counted(model, **settings):
        patched = model.clone()
        patched.add_wrapper("diffusion_model", count)
        rows.clear()
        return run(patched, edit, steps=8, **settings), list(rows)

    limited = int((flow_sigmas(8, edit[2]["samples"])[:-1] > 0.93).sum())
    out, passes = counted(loud_model, cfg=1.0)
    assert 0 < limited < 8 and sum(passes) == 8 + limited and passes[-1] == 1
    assert sum(counted(loud_model, cfg=1.5)[1]) == 16
    # Behind the limited steps: what the host does at CFG 1, to the bit.
    late, passes = counted(loud_model, cfg=1.0, denoise=0.5)
    assert torch.equal(
        late, counted(set_norm_limiter(loud_model, NormLimiter(truncate=1.0)), cfg=1.0, denoise=0.5)[0]
    ) and set(passes) == {1}
    # In the limited steps: as before, up to the rounding of what is added and taken away again; a hook that may look at the other pass gets it.
    watched = loud_model.clone()
    watched.set_model_sampler_pre_cfg_function(lambda args: args["conds_out"])
    both, passes = counted(watched, cfg=1.0)
    assert sum(passes) == 16
    torch.testing.assert_close(out, both, rtol=1e-3, atol=1e-3)
    assert sum(counted(set_norm_limiter(loud_model, NormLimiter(truncate=0.0)), cfg=1.0)[1]) == 16


def test_cfg_one_still_uses_the_unconditional_pass_where_the_limiter_needs_it(loud_model, edit, clip, vae, photo):
    model = loud_model
    other_negative = (edit[0], encode_edit(clip, vae, photo, "x", "something else", 256)[1], edit[2])
    assert not torch.allclose(run(model, edit, cfg=1.0, steps=2), run(model, other_negative, cfg=1.0, steps=2))
    off = set_norm_limiter(model, NormLimiter(truncate=1.0))
    assert torch.equal(run(off, edit, cfg=1.0, steps=2), run(off, other_negative, cfg=1.0, steps=2))


def test_limiter_lets_a_guider_without_negative_pass(model, edit):
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": edit[0]})
    latent = edit[2]["samples"]
    noise = comfy.sample.prepare_noise(latent, 7)
    out = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), flow_sigmas(2, latent), disable_pbar=True, seed=7)
    assert torch.isfinite(out).all() and out.std() > 0.1


def test_patch_norm_of_odd_sizes():
    difference = torch.zeros(1, 2, 3, 5)
    difference[0, :, 2, 4] = torch.tensor([3.0, 4.0])
    difference[0, 0, 0, 0] = difference[0, 0, 1, 1] = 2.0
    norm = patch_norm(difference)
    assert norm.shape == (1, 1, 3, 5) and norm[0, 0, 2, 4] == 5
    assert torch.allclose(norm[0, 0, :2, :2], torch.full((2, 2), 8.0).sqrt()) and norm[0, 0, 0, 2] == 0


def test_ksampler_path_is_close_to_ours(model, edit):
    """KSampler's 'simple' scheduler with the stock ModelSamplingFlux patch approximates the official schedule."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    latent = edit[2]["samples"]
    (patched,) = ModelSamplingFlux().patch(model, 1.15, 0.5, latent.shape[-1] * 8, latent.shape[-2] * 8)
    noise = comfy.sample.prepare_noise(latent, 7)
    found = comfy.sample.sample(patched, noise, 4, 6.0, "euler", "simple", edit[0], edit[1], latent, disable_pbar=True, seed=7)
    expected = run(model, edit, steps=4)
    assert (found - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "uni_pc"])
def test_other_samplers_run(model, edit, sampler):
    out = run(model, edit, steps=3, sampler_name=sampler)
    assert torch.isfinite(out).all() and out.std() > 0.1


def test_denoise_starts_from_the_picture(model, edit):
    source = edit[2]["samples"]
    assert torch.equal(run(model, edit, steps=8, denoise=0.0), source)
    distances = [float((run(model, edit, steps=8, denoise=d) - source).norm()) for d in (0.15, 0.5, 1.0)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_noise_mask_keeps_the_unmasked_part(model, edit):
    source = edit[2]["samples"]
    mask = torch.zeros(1, 1, *source.shape[-2:])
    mask[..., : source.shape[-1] // 2] = 1
    out = run(model, edit, latent={"samples": source, "noise_mask": mask})
    half = source.shape[-1] // 2
    assert torch.allclose(out[..., half:], source[..., half:], atol=1e-4) and not torch.allclose(out[..., :half], source[..., :half])


def test_text_to_image_has_no_reference_tokens(model, clip):
    cond = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a fox", "")]
    latent = {"samples": torch.zeros(1, 16, 16, 24)}
    tokens = []
    hook = model.model.diffusion_model.final_layer.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    out = sample(model, *cond, latent, flow_sigmas(2, latent["samples"]), 6.0, 1, callback=quiet)["samples"]
    hook.remove()
    assert out.shape == (1, 16, 16, 24) and out.std() > 0.1 and set(tokens) == {8 * 12}


def test_batch_of_pictures_equals_single_edits(model, clip, vae, photo):
    pair = torch.cat((photo, photo.flip(2)))
    positive, negative, latent = encode_edit(clip, vae, pair, "make it red", "", 256)
    assert positive[0][0].shape == (2, 640, 64) and latent["samples"].shape[0] == 2
    together = run(model, (positive, negative, latent))
    noise = comfy.sample.prepare_noise(latent["samples"], 7)
    for i in range(2):
        single = encode_edit(clip, vae, pair[i:i + 1], "make it red", "", 256)
        alone = comfy.sample.sample_custom(
            model,
            noise[i : i + 1],
            6.0,
            comfy.samplers.sampler_object("euler"),
            flow_sigmas(3, latent["samples"]),
            *single[:2],
            single[2]["samples"],
            disable_pbar=True,
            seed=7,
        )
        assert torch.allclose(together[i:i + 1], alone, atol=1e-3)


def test_second_reference_changes_the_result(model, edit):
    positive, negative, latent = edit
    extra = torch.randn(1, 16, 10, 14, generator=torch.Generator().manual_seed(0))
    two = [[[c, {**e, "reference_latents": [*e["reference_latents"], extra]}] for c, e in cond] for cond in (positive, negative)]
    assert not torch.allclose(run(model, (*two, latent)), run(model, edit))


def test_memory_estimate_counts_the_reference(model):
    plain = model.model.memory_required([2, 16, 128, 128])
    with_reference = model.model.memory_required([2, 16, 128, 128], {"ref_latents": [[2, 16, 128, 128]]})
    assert with_reference == pytest.approx(2 * plain)


def test_a_conditioning_goes_to_the_device_of_the_sampling(edit):
    (context, extra), meta = edit[0][0], torch.device("meta")
    moved = on_device({"cross_attn": context, "device": meta, "noise": context, "text_ids": None, "strength": 1.0, **extra})
    assert set(moved) == {"cross_attn", "attention_mask", "reference_latents"} and len(moved["reference_latents"]) == 1
    assert {tensor.device for tensor in (moved["cross_attn"], moved["attention_mask"], *moved["reference_latents"])} == {meta}


def test_the_transformer_is_given_the_moved_conditioning(model, edit, monkeypatch):
    (context, extra), meta = edit[0][0], torch.device("meta")
    monkeypatch.setattr(model_module, "distinct_tokens", lambda x, mask: 1)  # has to look at values
    conds = model.model.extra_conds(cross_attn=context, device=meta, noise=torch.zeros(1, 16, 8, 8), **extra)
    assert {tensor.device for tensor in (conds["c_crossattn"].cond, conds["text_mask"].cond, *conds["ref_latents"].cond)} == {meta}


def test_conditioning_of_another_model_is_refused(model, edit):
    foreign = [[torch.zeros(1, 256, 4096), {}]]
    with pytest.raises(Step1XError, match="4096 channels, expected 64"):
        run(model, (foreign, foreign, edit[2]))


def test_concatenated_conditionings_are_refused(model, edit):
    from nodes import ConditioningConcat

    (joined,) = ConditioningConcat().concat(edit[0], edit[1])
    with pytest.raises(Step1XError, match="1280 text tokens, but a mask of 640: .* cannot be concatenated"):
        run(model, (joined, edit[1], edit[2]))


@pytest.mark.parametrize("shape", [(1, 4, 26, 38), (1, 16, 1, 26, 38)])
def test_latents_of_another_model_are_refused(model, edit, shape):
    positive, negative, _ = edit
    with pytest.raises(Step1XError, match="The latent has shape .* belongs to another model"):
        run(model, edit, latent={"samples": torch.ones(shape)})
    foreign = [[[c, {**e, "reference_latents": [torch.ones(shape)]}] for c, e in cond] for cond in (positive, negative)]
    with pytest.raises(Step1XError, match="The reference latent has shape .* belongs to another model"):
        run(model, (*foreign, edit[2]))


def test_empty_latents_of_other_models_are_adapted(model, edit):
    """An empty latent of FLUX.2: 128 channels at a sixteenth of the size."""
    other = {"samples": torch.zeros(1, 128, 13, 19), "downscale_ratio_spacial": 16}
    fitted = fit_latent(model, other)
    assert fitted["samples"].shape == (1, 16, 26, 38) and "downscale_ratio_spacial" not in fitted and other["samples"].shape[1] == 128
    sigmas = flow_sigmas(1, fitted["samples"])
    results = [
        sample(model, *edit[:2], latent, sigmas, 6.0, 7, callback=quiet)["samples"]
        for latent in (other, {"samples": torch.zeros(1, 16, 26, 38)})
    ]
    assert torch.equal(*results)


def test_v10_without_a_picture_warns_once(models, edit, caplog):
    model = load_model(models / "diffusion_models" / tiny_models.V10_FILE)
    with caplog.at_level("WARNING"):
        run(model, edit, steps=1)
        assert "only edits images" not in caplog.text
        run(
            model,
            (
                *[
                    [[c, {k: v for k, v in e.items() if k != "reference_latents"}] for c, e in cond]
                    for cond in edit[:2]
                ],
                edit[2],
            ),
            steps=2,
        )
    assert caplog.text.count("only edits images") == 1


def test_foreign_parts_are_refused_by_name(clip, vae, photo):
    class Patcher:
        model = object()

    class FourChannels:
        latent_channels, latent_dim = 4, 2

    class Video:
        latent_channels, latent_dim = 16, 3

    class OtherClip:
        tokenizer = object()

    with pytest.raises(Step1XError, match="Expected a Step1X-Edit model"):
        check_model(Patcher())
    with pytest.raises(Step1XError, match="4 channels"):
        encode_edit(clip, FourChannels(), photo, "x", "", 512)
    with pytest.raises(Step1XError, match="Load the FLUX VAE .*, not that of Qwen-Image"):
        encode_edit(clip, Video(), photo, "x", "", 512)
    with pytest.raises(Step1XError, match="another model"):
        encode_edit(OtherClip(), vae, photo, "x", "", 512)
    with pytest.raises(Step1XError, match="empty image batch"):
        encode_edit(clip, vae, photo[:0], "x", "", 512)
    with pytest.raises(Step1XError, match="too narrow"):
        encode_edit(clip, vae, torch.zeros(1, 4, 4000, 3), "x", "", 256)


def test_schedule_depends_on_size_and_ends_at_zero():
    small, large = flow_sigmas(28, torch.zeros(1, 16, 64, 64)), flow_sigmas(28, torch.zeros(1, 16, 128, 128))
    for sigmas in (small, large):
        assert len(sigmas) == 29 and sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all()
    assert (large[1:-1] > small[1:-1]).all() and (small[1:-1] > sigma_schedule(28)[1:-1]).all()


def test_teacache_measures_in_float32():
    img = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    state = TeaCacheState(0.2)
    state.begin(img, False)
    assert torch.equal(state.previous, torch.nn.functional.layer_norm(img.float(), (64,), eps=1e-6))


def test_teacache_at_threshold_zero_is_exact_and_skips_above(model, edit):
    calls = []
    hook = model.model.diffusion_model.double_blocks[0].register_forward_hook(lambda *args: calls.append(1))
    plain = run(model, edit, steps=6)
    assert torch.equal(run(apply_teacache(model, 0.0), edit, steps=6), plain) and len(calls) == 12
    calls.clear()
    cached = run(apply_teacache(model, 100.0), edit, steps=6)
    hook.remove()
    assert len(calls) == 2 and torch.isfinite(cached).all() and not torch.allclose(cached, plain)
