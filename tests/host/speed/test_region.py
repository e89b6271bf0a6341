"""Region-aware denoising: what is chosen, what is computed, and that nothing else changes."""

import comfy.model_management
import comfy.sampler_helpers
import demo_model
import numpy as np
import pytest
import tiny_models
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_torch_compile import TorchCompileModel

from miniature.scenes import judge, pair_at
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.sampling.sampler import flow_sigmas, sample, set_guidance_interval
from step1x_core.host.speed.region import WRAPPER_KEY, apply_region, region_denoiser
from step1x_core.host.speed.teacache import apply_teacache
from step1x_core.images import from_uint8, truncate_uint8
from step1x_core.speed.region import RegionRun, RegionSettings, edited_tokens, full_steps

STEPS = 8
# The tiny models draw noise: a tenth of their tokens is less alike to the source than this, about half are near one of those.
PART = RegionSettings(similarity=-0.15, reuse=0.0)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def v12(models):
    return load_model(models / "diffusion_models" / tiny_models.V12_FILE)


@pytest.fixture(scope="module")
def edit(clip, vae, photo):
    return encode_edit(clip, vae, photo, "make the cup red", "", 192)


@pytest.fixture(scope="module")
def edit_v12(models, vae, photo):
    return encode_edit(load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2"), vae, photo, "make the cup red", "", 192)


def run(model, edit, steps=STEPS, cfg=6.0, seed=7, callback=lambda *args: None, sampler="euler", **latent):
    positive, negative, source = edit
    latent = source | latent
    return sample(model, positive, negative, latent, flow_sigmas(steps, latent["samples"]), cfg, seed, sampler, callback)["samples"]


def shares(model) -> list[float]:
    """The part of the tokens that each step of the last run computed."""
    return region_denoiser(model).step_shares


def stream(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_object_is_found_with_a_border_and_a_speck_is_not():
    source, result = stream(1, 16, 128, 128, seed=1), stream(1, 16, 128, 128, seed=1)
    result[..., 40:60, 80:100] *= -1
    result[..., 4:6, 4:6] *= -1
    edited = edited_tokens(result, source, 0.88)
    # 10x10 tokens, less one by the erosion, but for its corners, and two more by the dilation.
    assert edited.shape == (1, 64, 64) and edited[0, 20:30, 40:50].all() and edited.sum() == 12 * 12 and not edited[0, :8, :8].any()
    small = edited_tokens(result[..., 40:57, 80:101], source[..., 40:57, 80:101], 0.88)
    assert small.shape == (1, 9, 11) and small.all()


def test_the_mask_limits_the_region_and_no_edit_means_everywhere():
    source, result = stream(2, 16, 20, 17, seed=1), stream(2, 16, 20, 17, seed=1)
    result[0] *= -1
    mask = torch.zeros(2, 16, 20, 17)
    mask[:, :, :7, 16:] = 1
    edited = edited_tokens(result, source, 0.88, mask)
    assert edited[0].sum() == 4 and edited[0, :4, 8].all() and edited[1].all()


def test_velocity_is_carried_on_at_the_rate_of_the_run():
    """Two pictures whose velocities shrink at rates of their own, one too fast to be used again."""
    rates, direction, start = torch.tensor([0.1, 3.0])[:, None, None, None], stream(2, 16, 4, 4, seed=1), stream(2, 16, 4, 4, seed=2)
    velocity = [direction * torch.exp(rates * sigma) for sigma in (0.8, 0.75, 0.7)]
    levels = [torch.tensor(sigma) for sigma in (0.8, 0.75, 0.7)]
    state = RegionRun(RegionSettings(reuse=0.02), 20)
    x = start
    for sigma, v in zip(levels[:2], velocity):
        state.edited = torch.ones(2, 2, 2, dtype=torch.bool)
        state.edited[:, 0, 0] = False
        state.remember(sigma, x, x - sigma * v)
        x = x - 0.05 * v
    assert state.reusable(levels[2]).tolist() == [True, False]
    predicted = state.predicted(levels[2])
    torch.testing.assert_close(predicted[:, :, 2:], (x - levels[2] * velocity[2])[:, :, 2:], rtol=1e-4, atol=1e-4)
    assert torch.equal(predicted[..., :2, :2], state.denoised[..., :2, :2])
    state.settings = RegionSettings(reuse=0)
    assert not state.reusable(levels[1]).any()


def call(model, denoiser, mode, x, conds=(0, 1), plain=False):
    """The transformer's velocity for two pictures per conditioning."""
    transformer = model.model.diffusion_model
    denoiser.mode = mode
    options = {"uuids": list(conds), "wrappers": {WrappersMP.DIFFUSION_MODEL: {WRAPPER_KEY: [denoiser.forward]}}}
    if plain:
        options["patches"] = {"attn1_patch": [lambda q, k, v, **kwargs: {}]}
    layout = {}
    if transformer.version == "v1.2":
        layout = {
            "text_ids": stream(4, 5, 3, seed=4).view(torch.int32),
            "text_embeds": stream(4, 5, 3584, seed=5),
            "quoted_mask": torch.ones(4, 5),
        }
    rows = [2 * cond + picture for cond in conds for picture in (0, 1)]
    context = stream(4, 5, transformer.connector.S.c_embedder.linear_1.in_features, seed=2)[rows]
    layout = {name: tensor[rows][..., :context.shape[-1]] for name, tensor in layout.items()}
    x = torch.cat([x] * len(conds))
    reference = stream(2, 16, 8, 8, seed=3).repeat(len(conds), 1, 1, 1)
    return transformer(x, torch.full((len(x),), 0.5), context, ref_latents=[reference], transformer_options=options, **layout)


@pytest.mark.parametrize("plain", [False, True], ids=["fused blocks", "the host's blocks"])
@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_a_part_is_computed_as_in_the_whole(model, v12, version, plain):
    model = v12 if version == "v1.2" else model
    denoiser = region_denoiser(apply_region(model, RegionSettings()))
    denoiser.run = RegionRun(RegionSettings(), STEPS)
    denoiser.run.edited = torch.zeros(2, 4, 4, dtype=torch.bool)
    denoiser.run.edited[0, 1:3, 1:3] = True
    denoiser.run.edited[1, :, 3] = denoiser.run.edited[1, 0, 0] = True
    inside = denoiser.run.edited.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].repeat(2, 1, 1, 1).expand(-1, 16, -1, -1)
    x = stream(2, 16, 8, 8, seed=1)
    whole = call(model, denoiser, "full", x, plain=plain)
    assert torch.equal(call(model, denoiser, "record", x, plain=plain), whole)
    denoiser.call_shares.clear()
    part = call(model, denoiser, "region", x, plain=plain)
    assert denoiser.call_shares == [5 / 32]
    torch.testing.assert_close(part[inside], whole[inside], rtol=1e-4, atol=1e-4)
    # Outside the region the model does not look at its input.
    elsewhere = torch.where(inside[:2], x, x + 1)
    torch.testing.assert_close(call(model, denoiser, "region", elsewhere, plain=plain)[inside], whole[inside], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(call(model, denoiser, "full", elsewhere, plain=plain)[inside], whole[inside], rtol=1e-3, atol=1e-3)
    # The host may go over to one conditioning after the other in the middle of a run.
    for cond in (0, 1):
        own = slice(2 * cond, 2 * cond + 2)
        torch.testing.assert_close(
            call(model, denoiser, "region", x, [cond], plain)[inside[own]],
            whole[own][inside[own]],
            rtol=1e-4,
            atol=1e-4,
        )
    # A picture that is edited everywhere is exact beside one that is not.
    denoiser.run.edited[1] = True
    torch.testing.assert_close(
        call(model, denoiser, "region", elsewhere, plain=plain)[1::2],
        call(model, denoiser, "full", elsewhere, plain=plain)[1::2],
        rtol=1e-4,
        atol=1e-4,
    )


def test_an_edit_everywhere_or_nowhere_is_exact(model, edit):
    exact = run(model, edit)
    for similarity in (1.0, -1.0):
        patched = apply_region(model, RegionSettings(similarity=similarity))
        assert torch.equal(run(patched, edit), exact) and shares(patched) == [1.0] * STEPS
    positive, negative, latent = edit
    words = [
        [[tensor, {k: v for k, v in values.items() if k != "reference_latents"}] for tensor, values in cond]
        for cond in (positive, negative)
    ]
    patched = apply_region(model, PART)
    assert torch.equal(run(patched, (*words, latent)), run(model, (*words, latent))) and shares(patched) == [1.0] * STEPS


@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_only_the_region_is_computed_and_the_rest_is_kept(model, v12, edit, edit_v12, version):
    model, edit = (v12, edit_v12) if version == "v1.2" else (model, edit)
    seen = []
    hook = model.model.diffusion_model.double_blocks[0].register_forward_hook(
        lambda block, args, kwargs, out: seen.append(out[0].shape[1]), with_kwargs=True
    )
    patched = apply_region(model, PART)
    steps = []
    out = run(patched, edit, callback=lambda step, denoised, x, total: steps.append(denoised.clone()))
    hook.remove()
    calls = len(seen) // STEPS
    full = full_steps(STEPS, PART)
    assert shares(patched) == [seen[i * calls] / max(seen) for i in range(STEPS)]
    assert all((share == 1) == whole for share, whole in zip(shares(patched), full)) and region_denoiser(patched).share < 0.8
    assert torch.isfinite(out).all() and not torch.allclose(out, run(model, edit))
    for i in range(1, STEPS):
        kept = (steps[i] == steps[i - 1]).all(dim=1).float().mean()
        assert kept == 0 if full[i] else 0.2 < kept < 0.9


@pytest.mark.sampled(5)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 13])
def test_step_counts(model, edit, steps):
    patched = apply_region(model, PART)
    run(patched, edit, steps=4)
    assert torch.equal(run(patched, edit, steps=steps), run(apply_region(model, PART), edit, steps=steps))
    assert [share == 1 for share in shares(patched)] == full_steps(steps, PART)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "uni_pc"])
def test_samplers(model, edit, sampler):
    patched = apply_region(model, RegionSettings(similarity=-0.15))
    assert torch.isfinite(run(patched, edit, sampler=sampler)).all() and min(shares(patched)) < 0.7


def test_steps_are_left_out_where_little_changes(model, edit):
    patched = apply_region(model, RegionSettings(similarity=-0.15, reuse=1.0))
    out = run(patched, edit)
    left_out = {i for i, share in enumerate(shares(patched)) if share == 0}
    assert (
        torch.isfinite(out).all()
        and len(left_out) >= 2
        and left_out <= {i for i, full in enumerate(full_steps(STEPS, PART)) if not full}
    )


def with_mask(rows, columns):
    mask = torch.zeros(1, 1, 152, 224)
    mask[..., rows, columns] = 1
    return mask


def test_inpainting_computes_what_is_painted(model, edit):
    mask = with_mask(slice(40, 80), slice(64, 128))
    patched = apply_region(model, RegionSettings(similarity=1.0, reuse=0.0))
    out = run(patched, edit, noise_mask=mask)
    assert min(shares(patched)) < 0.2
    small = torch.nn.functional.interpolate(mask, out.shape[-2:], mode="bilinear")[0, 0]
    torch.testing.assert_close(out[..., small == 0], edit[2]["samples"][..., small == 0])
    assert not torch.allclose(out[..., small == 1], edit[2]["samples"][..., small == 1])
    everything = torch.ones_like(mask)
    assert torch.equal(run(patched, edit, noise_mask=everything), run(model, edit, noise_mask=everything))


@pytest.mark.once
@pytest.mark.parametrize("reuse", [0.0, 1.0])
def test_a_batch_gives_what_its_pictures_give_alone(model, edit, reuse):
    patched = apply_region(model, RegionSettings(similarity=1.0, reuse=reuse))
    masks = [with_mask(slice(40, 80), slice(64, 128)), with_mask(slice(0, 152), slice(0, 40)), torch.ones(1, 1, 152, 224)]
    alone, left_out = [], []
    for i, mask in enumerate(masks):
        alone.append(run(patched, edit, noise_mask=mask, batch_index=[i]))
        left_out.append(shares(patched).count(0))
    assert all((steps > 0) == (reuse > 0) for steps in left_out[:2]) and left_out[2] == 0
    samples = edit[2]["samples"].expand(3, -1, -1, -1)
    batch = run(patched, edit, samples=samples, noise_mask=torch.cat(masks), batch_index=[0, 1, 2])
    torch.testing.assert_close(batch, torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_conditionings_together_or_apart(model, edit, monkeypatch):
    together = run(apply_region(model, PART), edit)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, cond_shapes={}: 1e15 if shape[0] > 1 else 1.0)
    rows = []
    patched = apply_region(model, PART)
    patched.add_wrapper(
        WrappersMP.DIFFUSION_MODEL,
        lambda executor, x, *args, **kwargs: rows.append(len(x)) or executor(x, *args, **kwargs),
    )
    apart = run(patched, edit)
    assert rows == [1] * 2 * STEPS and min(shares(patched)) < 0.7
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)


def test_a_conditioning_that_begins_later_is_computed_in_full(model, edit):
    positive, negative, latent = edit
    late = [[positive[0][0], positive[0][1] | {"start_percent": 0.4}], [positive[0][0] * 0.5, positive[0][1] | {"end_percent": 0.4}]]
    patched = apply_region(model, RegionSettings(similarity=-0.15, reuse=0.0, refreshes=0))
    assert torch.isfinite(run(patched, (late, negative, latent), steps=12)).all() and max(shares(patched)[3:-1]) > min(
        shares(patched)[3:-1]
    )
    guided_late = set_guidance_interval(patched, 0.4, 1.0)
    assert torch.isfinite(run(guided_late, edit, steps=12)).all() and max(shares(patched)[3:-1]) > min(shares(patched)[3:-1])


def test_steps_in_which_no_conditioning_is_in_force(model, edit):
    late = [[[side[0][0], side[0][1] | {"start_percent": 0.6}]] for side in edit[:2]]
    patched = apply_region(model, RegionSettings(similarity=-0.15, reuse=0.0, refreshes=0))
    assert torch.isfinite(run(patched, (*late, edit[2]), steps=6)).all() and shares(patched)[0] == 0.0 < shares(patched)[-1]


class Stop(Exception):
    pass


def test_nothing_survives_a_run_or_a_cancelled_one(model, edit):
    patched = apply_region(model, PART)
    first = run(patched, edit)
    denoiser = region_denoiser(patched)
    held = []

    def cancel(step, *args):
        if step == 3:
            held.append(len(denoiser.cache))
            raise Stop

    with pytest.raises(Stop):
        run(patched, edit, seed=8, callback=cancel)
    blocks = model.model.diffusion_model
    assert held == [2 * (len(blocks.double_blocks) + len(blocks.single_blocks))]
    assert not denoiser.cache and denoiser.run is None and denoiser.reference is None
    assert torch.equal(run(patched, edit), first)


def test_the_host_makes_room_for_what_is_kept(model, edit, monkeypatch):
    wanted, sizes = [], []

    def load(models, memory_required=0, **kwargs):
        wanted.append(memory_required)
        return original(models, memory_required=memory_required, **kwargs)

    def measure(step, *args):
        kept = [tensor for pair in denoiser.cache.values() for tensor in pair]
        sizes.append(sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}.values()))

    original = comfy.model_management.load_models_gpu
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    run(model, edit)
    patched = apply_region(model, PART)
    denoiser = region_denoiser(patched)
    kept = []
    prepare = denoiser.cache_bytes
    monkeypatch.setattr(denoiser, "cache_bytes", lambda *args: kept.append(prepare(*args)) or kept[-1])
    run(patched, edit, callback=measure)
    assert kept == [max(sizes)] and wanted[1] - wanted[0] >= kept[0]


def test_what_does_not_go_together_is_refused_in_either_order(model, edit):
    patched = apply_region(model, PART)
    others = {
        "TeaCache": lambda m: apply_teacache(m, 0.2),
        "EasyCache": lambda m: EasyCacheNode.execute(m, 0.2, 0.15, 0.95, False)[0],
        "LazyCache": lambda m: LazyCacheNode.execute(m, 0.2, 0.15, 0.95, False)[0],
        "TorchCompileModel": lambda m: TorchCompileModel.execute(m, "inductor")[0],
    }
    for name, other in others.items():
        for both in (other(patched), apply_region(other(model), PART)):
            with pytest.raises(
                Step1XError,
                match=f"'Step1X-Edit Speed \\(region\\)' cannot work together with .*{name}.*Remove one of the two",
            ):
                run(both, edit)
    assert torch.isfinite(run(patched, edit)).all()


def test_a_second_node_takes_the_first_ones_place_and_the_input_stays_as_it_is(model, edit):
    exact = run(model, edit)
    patched = apply_region(apply_region(model, RegionSettings(similarity=-0.15, reuse=1.0)), RegionSettings(similarity=1.0))
    assert torch.equal(run(patched, edit), exact) and torch.equal(run(model, edit), exact)


def test_another_nodes_attention_and_patches_stay_in_use(model, edit):
    calls = []
    patched = apply_region(model, PART)
    patched.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda attention, q, *args, **kwargs: calls.append(q.shape[2]) or attention(q, *args, **kwargs)
    )
    patched.set_model_post_input_patch(lambda args: calls.append(args["img"].shape[1]) or args)
    torch.testing.assert_close(run(patched, edit), run(apply_region(model, PART), edit), rtol=1e-4, atol=1e-4)
    assert len(set(calls)) >= 3


@pytest.mark.once
def test_local_edits_of_the_demo_model_succeed_with_less_than_half_of_the_tokens():
    import comfy.sd
    import comfy.utils

    folder = demo_model.FOLDER
    model = apply_region(load_model(folder / "diffusion_models" / demo_model.MODEL_FILE), RegionSettings())
    clip = load_text_encoder(folder / "text_encoders" / demo_model.MLLM_FILE)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / "vae" / demo_model.VAE_FILE)))
    pair = pair_at(1, 0, "heldout")
    image = from_uint8(pair.source)[None]
    out = run(model, encode_edit(clip, vae, image, pair.instruction, "", demo_model.SIZE_LEVEL), demo_model.STEPS, demo_model.CFG, seed=0)
    assert judge(pair, truncate_uint8(decode_edit(vae, {"samples": out}, image)[0]).numpy().astype(np.uint8)).success
    assert region_denoiser(model).share < 0.5
