"""Few-step LoRAs: what the defaults become, which passes run, and what the language model is spared."""


import comfy.samplers
import pytest
import tiny_models
import torch
from bad_input_host import Given, Host
from safetensors.torch import save_file

from step1x_core.editing.batches import lay_out
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.checkpoints.lora import apply_lora_file, load_lora_file
from step1x_core.host.editing.batch import edit_batch
from step1x_core.host.left_out import LEFT_OUT
from step1x_core.host.network.blocks import FP8_ATTENTION
from step1x_core.host.prompts.encoding import encode_edit
from step1x_core.host.prompts.text_encoder import Step1XTextModel
from step1x_core.host.sampling.few_steps import few_steps, reads_negative, version_defaults
from step1x_core.host.sampling.sampler import flow_sigmas, model_sigmas, sample, set_guidance_interval, with_norm_limiter
from step1x_core.host.speed.presets import apply_speed, settings_of
from step1x_core.host.speed.region import apply_region
from step1x_core.host.speed.teacache import apply_teacache
from step1x_core.sampling.few_steps import FewSteps
from step1x_core.speed.presets import BALANCED, EXACT, FAST
from step1x_core.speed.region import RegionSettings

TEACHER = {"version": "v1.1", "steps": 28, "cfg": 6.0}
FOUR = FewSteps(4, 1.0, None, TEACHER)
OWN = FewSteps(3, 1.0, (1.0, 0.75, 0.25, 0.0))


def lora_tensors(scale: float = 0.3) -> dict:
    g = torch.Generator().manual_seed(0)
    name = "lora_unet_single_blocks_0_linear2"
    rows, columns = 64, 64 + 256
    return {f"{name}.lora_down.weight": torch.randn(2, columns, generator=g) * scale,
            f"{name}.lora_up.weight": torch.randn(rows, 2, generator=g) * scale, f"{name}.alpha": torch.tensor(2.0)}


@pytest.fixture(autouse=True)
def inference():
    """As in the host's executor."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LoRA files with the same tensors: few-step ones by their settings, and a plain one under None."""
    folder, out = tmp_path_factory.mktemp("loras"), {}
    for name, settings in {"four": FOUR, "own": OWN, "one": FewSteps(1), "guided": FewSteps(4, 2.0), "plain": None}.items():
        out[name] = folder / f"{name}.safetensors"
        save_file(lora_tensors(), out[name], metadata=settings.metadata() if settings else {"ss_steps": "100"})
    return out


@pytest.fixture(scope="module")
def edit(clip, vae, photo):
    with torch.inference_mode():
        return encode_edit(clip, vae, photo, "make the cup red", "", 256)


def counting(model):
    """A clone of the model, and the list of how many rows each pass of its transformer has."""
    rows, model = [], model.clone()

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    model.add_wrapper("diffusion_model", count)
    return model, rows


def run(model, edit, steps=0, cfg=0.0, latent=None, seed=7):
    positive, negative, source = edit
    latent = latent or source
    model = with_norm_limiter(model)
    steps, cfg = version_defaults(model, steps, cfg)
    sigmas = model_sigmas(model, steps, latent["samples"])
    return sample(model, positive, negative, latent, sigmas, cfg, seed, callback=lambda *args: None)["samples"]


def test_the_loras_settings_become_the_defaults_and_reach_clones(model, files):
    fast = apply_lora_file(model, files["four"], 1.0)
    assert version_defaults(fast, 0, 0.0) == (4, 1.0) and version_defaults(fast.clone().clone(), 0, 3.0) == (4, 3.0)
    assert few_steps(fast).teacher == TEACHER
    # Neither the model that it was applied to, nor a LoRA without such settings.
    assert few_steps(model) is None and version_defaults(model, 0, 0.0) == (28, 6.0)
    assert few_steps(apply_lora_file(model, files["plain"], 1.0)) is None
    assert few_steps(apply_lora_file(model, files["four"], 0.0)) is None
    # A plain LoRA after it leaves them, and so does a later node.
    assert version_defaults(set_guidance_interval(apply_lora_file(fast, files["plain"], 0.5), 0, 0.5), 0, 0.0) == (4, 1.0)


def test_zero_is_the_same_as_the_settings_by_hand_without_limiter_and_negative_pass(model, edit, files):
    fast, rows = counting(apply_lora_file(model, files["four"], 1.0))
    out = run(fast, edit)
    assert rows == [1] * 4
    # The host itself, without any of our guidance, on the same weights.
    plain = apply_lora_file(model, files["plain"], 1.0)
    plain.model_options.pop("sampler_pre_cfg_function")
    plain.model_options.pop("disable_cfg1_optimization", None)
    latent = edit[2]["samples"]
    noise = torch.randn(latent.shape, generator=torch.manual_seed(7))
    expected = comfy.sample.sample_custom(
        plain,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        flow_sigmas(4, latent),
        edit[0],
        edit[1],
        latent,
        disable_pbar=True,
        seed=7,
    )
    assert torch.equal(out, expected)
    assert not torch.allclose(out, run(model, edit, steps=4, cfg=1.0))
    # Without the LoRA's settings, v1.1 shapes its first steps with the negative prompt at CFG 1, too.
    stock, rows = counting(apply_lora_file(model, files["plain"], 1.0))
    run(stock, edit, steps=4, cfg=1.0)
    assert sum(rows) > 4


def test_a_lora_distilled_with_guidance_keeps_the_negative_pass(model, edit, files):
    guided, rows = counting(apply_lora_file(model, files["guided"], 1.0))
    run(guided, edit)
    assert sum(rows) == 8 and reads_negative(guided, 0.0)
    # And CFG above 1 on one that was distilled for CFG 1 guides as ever.
    forced, rows = counting(apply_lora_file(model, files["four"], 1.0))
    assert torch.equal(run(forced, edit, cfg=6.0), run(apply_lora_file(model, files["plain"], 1.0), edit, steps=4, cfg=6.0))
    assert sum(rows) == 8


def test_its_own_schedule_is_followed_at_its_steps_only(model, edit, files):
    own, latent = apply_lora_file(model, files["own"], 1.0), edit[2]["samples"]
    assert model_sigmas(own, 3, latent).tolist() == [1.0, 0.75, 0.25, 0.0]
    assert model_sigmas(own, 3, latent, 0.67).tolist() == [1.0, 0.75, 0.25, 0.0]
    assert model_sigmas(own, 3, latent, 0.5).tolist() == [0.75, 0.25, 0.0]
    assert torch.equal(model_sigmas(own, 5, latent), flow_sigmas(5, latent))
    assert torch.equal(model_sigmas(model, 3, latent), flow_sigmas(3, latent))


def test_two_of_them_with_other_settings_are_refused(model, files):
    fast = apply_lora_file(model, files["four"], 1.0)
    with pytest.raises(
        Step1XError,
        match="distilled for 3 steps, CFG 1, its own schedule, but another one on the model for 4 steps, CFG 1 .*strength to 0",
    ):
        apply_lora_file(fast, files["own"], 0.5)
    assert few_steps(apply_lora_file(fast, files["four"], 0.5)) == FOUR
    assert few_steps(apply_lora_file(fast, files["own"], 0.0)) == FOUR


def test_a_teacher_of_another_version_is_told(models, files, caplog):
    other = load_model(models / "diffusion_models" / tiny_models.V10_FILE)
    assert other.model.diffusion_model.version == "v1.0"
    caplog.set_level("WARNING")
    apply_lora_file(other, files["four"], 1.0)
    assert "distilled from Step1X-Edit v1.1, but the model is v1.0" in caplog.text


def test_damaged_settings_are_refused_with_the_files_name(model, tmp_path):
    path = tmp_path / "odd.safetensors"
    save_file(lora_tensors(), path, metadata={"step1x_edit.steps": "many"})
    assert load_lora_file(path)
    with pytest.raises(Step1XError, match=r"odd.safetensors: the metadata entry step1x_edit.steps is 'many'; expected a number of steps"):
        apply_lora_file(model, path, 1.0)


def test_teacache_is_refused_in_either_order(model, edit, files):
    fast = apply_lora_file(model, files["four"], 1.0)
    says = r"cannot be combined with a few-step LoRA \(4 steps, CFG 1\): every step changes too much"
    for mode in (BALANCED, FAST):
        with pytest.raises(Step1XError, match=says):
            apply_speed(fast, mode, settings_of({"mode": mode}))
    assert apply_speed(fast, EXACT, settings_of({"mode": EXACT})) is fast
    later = apply_lora_file(apply_teacache(model, 0.3), files["four"], 1.0)
    with pytest.raises(Step1XError, match=says):
        run(later, edit)


@pytest.mark.parametrize("name, steps", [("one", 1), ("own", 3), ("four", 4)])
def test_region_denoising_runs_at_few_steps(model, edit, files, name, steps):
    fast = apply_lora_file(model, files[name], 1.0)
    whole, rows = counting(apply_region(fast, RegionSettings(similarity=1.0)))
    torch.testing.assert_close(run(whole, edit), run(fast, edit), rtol=1e-3, atol=1e-3)
    assert rows == [1] * steps
    part = run(apply_region(fast, RegionSettings(similarity=0.5, refreshes=0)), edit)
    assert torch.isfinite(part).all()


def test_masks_and_batches(model, clip, vae, photo, edit, files):
    fast, source = apply_lora_file(model, files["four"], 1.0), edit[2]["samples"]
    mask = torch.zeros(1, 1, *source.shape[-2:])
    half = source.shape[-1] // 2
    mask[..., :half] = 1
    out = run(fast, edit, latent={"samples": source, "noise_mask": mask})
    assert torch.allclose(out[..., half:], source[..., half:], atol=1e-4) and not torch.allclose(out[..., :half], source[..., :half])
    pair = encode_edit(clip, vae, torch.cat((photo, photo.flip(2))), "make it red", "", 256, with_negative=False)
    counted, rows = counting(fast)
    assert run(counted, pair).shape[0] == 2 and rows == [2] * 4


def test_fp8_weights_and_the_mark_of_fp8_attention(models, edit, files):
    fp8 = load_model(models / "diffusion_models" / tiny_models.V11_FILE, quantise="fp8")
    fast, rows = counting(apply_lora_file(fp8, files["four"], 1.0))
    fast.model_options["transformer_options"][FP8_ATTENTION] = lambda q, k, v: pytest.fail("not on this device")
    out = run(fast, edit)
    assert rows == [1] * 4 and torch.isfinite(out).all() and version_defaults(fast, 0, 0.0) == (4, 1.0)
    assert not torch.allclose(out, run(fp8, edit, steps=4, cfg=1.0))


def test_what_reads_the_negative_prompt(model, models, files):
    v12 = load_model(models / "diffusion_models" / tiny_models.V12_FILE, "v1.2")
    fast = apply_lora_file(model, files["four"], 1.0)
    assert [reads_negative(m, cfg) for m in (model, fast, v12) for cfg in (0.0, 1.0, 2.0)] == [
        True,
        True,
        True,
        False,
        False,
        True,
        True,
        False,
        True,
    ]
    hooked = fast.clone()
    hooked.set_model_sampler_pre_cfg_function(lambda args: args["conds_out"], disable_cfg1_optimization=True)
    assert reads_negative(hooked, 0.0)


@pytest.fixture
def asked(monkeypatch):
    """How many prompts the language model encodes."""
    forward, prompts = Step1XTextModel.forward, []
    monkeypatch.setattr(Step1XTextModel, "forward", lambda self, tokens: prompts.append(1) or forward(self, tokens))
    return prompts


def test_the_negative_prompt_is_left_out_and_refused_where_something_reads_it(model, clip, vae, photo, edit, files, asked):
    positive, negative, latent = encode_edit(clip, vae, photo, "make the cup red", "", 256, with_negative=False)
    assert len(asked) == 1 and torch.equal(positive[0][0], edit[0][0][0]) and LEFT_OUT not in positive[0][1]
    fast = apply_lora_file(model, files["four"], 1.0)
    assert torch.equal(run(fast, (positive, negative, latent)), run(fast, edit))
    assert torch.equal(run(fast, (positive, None, latent)), run(fast, edit))
    with pytest.raises(Step1XError, match="negative prompt was not encoded, .* disconnect 'model' from 'Step1X-Edit Encode'"):
        run(fast, (positive, negative, latent), cfg=2.0)
    with pytest.raises(Step1XError, match="was not encoded"):
        run(model, (positive, negative, latent), steps=2, cfg=1.0)  # v1.1 limits its first steps
    # The host's own sampler node, and the stock nodes that change a conditioning, on the way to it.
    from nodes import ConditioningCombine, ConditioningSetTimestepRange, KSampler

    (changed,) = ConditioningSetTimestepRange().set_range(ConditioningCombine().combine(negative, negative)[0], 0.0, 1.0)
    (out,) = KSampler().sample(fast, 7, 2, 1.0, "euler", "simple", positive, changed, latent)
    assert torch.isfinite(out["samples"]).all()
    with pytest.raises(Step1XError, match="was not encoded"):
        KSampler().sample(fast, 7, 2, 2.0, "euler", "simple", positive, changed, latent)


def test_a_batch_encodes_one_prompt_an_edit(model, clip, vae, photo, files, asked):
    items = lay_out([photo], ["make it red\nmake it blue"], [1], "all")
    pictures, report = edit_batch("few", apply_lora_file(model, files["four"], 1.0), clip, vae, items, "", 64, 0, 0.0, "euler")
    assert len(pictures) == 2 and len(asked) == 2, report


@pytest.fixture(scope="module")
def host(model, clip, vae):
    with pytest.MonkeyPatch.context() as patch:
        yield Host(patch, model, clip, vae)


def test_encode_leaves_the_negative_out_for_a_connected_few_step_model(host, files, asked, shown):
    fast = apply_lora_file(host.model, files["four"], 1.0)
    _, negative, _ = host.encode(model=Given(fast)).made()
    assert len(asked) == 1 and negative[0][1][LEFT_OUT]
    assert [text for _, text in shown] == ["negative prompt not encoded (the model's default is CFG 1)"]
    asked.clear()
    _, negative, _ = host.encode(model=Given(host.model)).made()
    assert len(asked) == 2 and LEFT_OUT not in negative[0][1] and len(shown) == 1
    host.encode(model=Given(host.vae)).says("Expected a Step1X-Edit model")


def test_the_sampler_does_not_ask_for_a_negative_prompt_that_it_does_not_read(host, files, shown):
    """So another pack's text encoder does not run for it."""
    fast = apply_lora_file(host.model, files["four"], 1.0)
    for model, steps, cfg, expected in ((fast, 0, 0.0, False), (fast, 2, 1.0, False), (host.model, 1, 1.0, True), (fast, 1, 2.0, True)):
        host.sample(model=Given(model), steps=steps, cfg=cfg).made()
        asked = [data["node"] for event, data in host.messages if event == "executing" and data["node"]]
        assert any(node.endswith(".negative") for node in asked) is expected and any(node.endswith(".positive") for node in asked)
    assert shown[0][1] == "4 steps, CFG 1 (defaults of the few-step LoRA)"
    host.sample(model=Given(host.vae)).says("Expected a Step1X-Edit model")
