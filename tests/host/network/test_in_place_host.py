"""A host that works in place, as ComfyUI's language model does from 0.33 on: what it is given may come back as anything, and no result of ours may change by it."""

import functools

import comfy.ldm.flux.model
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.text_encoders import llama
from test_sampling import run

from step1x_core.host.checkpoints.loading import load_text_encoder
from step1x_core.host.network.model import Step1XEditModel
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.prompts.text_encoder import TEXT_ENCODER_NAME
from step1x_core.host.sampling.sampler import set_guidance_interval
from step1x_core.host.speed.region import apply_region
from step1x_core.host.training.train import predict
from step1x_core.prompts.v11 import IMAGE_PAD_ID
from step1x_core.reasoning.token_sampling import Sampling
from step1x_core.speed.region import RegionSettings


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def clip_v12(float_file):
    return load_text_encoder(float_file, "v1.2")


def tensors(value) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def copied(value):
    if torch.is_tensor(value):
        return value.clone()
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def spoils(monkeypatch, owner, name: str, *kept: str) -> list[int]:
    """Let a function of the host overwrite what it was given once it is done, but for the arguments `kept`. Returns the list of how many tensors each call spoilt."""
    function, spoilt = getattr(owner, name), []

    @functools.wraps(function)
    def spoiling(*args, **kwargs):
        out = copied(function(*args, **kwargs))
        given = tensors([args, {key: value for key, value in kwargs.items() if key not in kept}])
        with torch.no_grad():
            for tensor in given:
                tensor.fill_(True if tensor.dtype == torch.bool else 77)
        spoilt.append(len(given))
        return out

    monkeypatch.setattr(owner, name, spoiling)
    return spoilt


def result(clip, sequence):
    return [x.clone() for x in clip.cond_stage_model.qwen25_7b.transformer.encode(sequence, "cpu", hide_zeros=False)]


def test_v12_text_embeds_are_those_of_transformers_whatever_the_blocks_write(clip_v12, transformers_model, monkeypatch):
    """The host's block of 0.33 ends in torch.add(residual, x, out=x of the start)."""
    block = llama.TransformerBlock.forward

    def in_place(self, x, *args, **kwargs):
        out, cache = block(self, x.clone(), *args, **kwargs)
        return torch.add(out, 0, out=x), cache

    monkeypatch.setattr(llama.TransformerBlock, "forward", in_place)
    tokens = clip_v12.tokenize('say "hi"', images=[torch.rand(1, 80, 100, 3, generator=torch.Generator().manual_seed(0))])
    sequence = [token for token, _ in tokens[TEXT_ENCODER_NAME][0]]
    at = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
    _, extra = clip_v12.encode_from_tokens_scheduled(tokens)[0]
    before, after = (
        transformers_model.language_model.embed_tokens(torch.tensor(ids)).bfloat16().float()
        for ids in (sequence[90:at], sequence[at + 1 :])
    )
    assert IMAGE_PAD_ID not in sequence and len(before) > 1 and len(after) > 1
    assert torch.equal(extra["text_embeds"][0, :len(before)], before) and torch.equal(extra["text_embeds"][0, -len(after):], after)


def test_language_model(clip_v12, monkeypatch):
    sequence = [token for token, _ in clip_v12.tokenize("a cup", images=[torch.rand(1, 80, 100, 3)])[TEXT_ENCODER_NAME][0]]
    model = clip_v12.cond_stage_model.qwen25_7b.transformer
    texts = [[1, 2, 3, 4, 5], [6, 7]]

    def replies():
        return model.generate(texts, "cpu", 8, [Sampling(temperature=0)] * 2)

    expected, written = result(clip_v12, sequence), replies()
    # Keys and values are the result; the host's own loop gives all blocks the same rotations.
    blocks = spoils(monkeypatch, llama.TransformerBlock, "forward", "past_key_value", "freqs_cis")
    assert replies() == written and len(blocks) == 2 * len(model.model.layers)
    monkeypatch.undo()
    spoilt = spoils(monkeypatch, llama.Llama2_, "forward")
    assert all(torch.equal(a, b) for a, b in zip(result(clip_v12, sequence), expected, strict=True))
    assert len(spoilt) == 1
    # The embeddings and the positions at least.
    assert min(spoilt) >= 2


@pytest.fixture
def edit(clip, vae, photo):
    return encode_edit(clip, vae, photo, "make the cup red", "", 256)


def test_transformer_and_sampler(model, edit, monkeypatch):
    reference, mask = edit[0][0][1]["reference_latents"][0], torch.ones(1, 1, 26, 38)
    mask[..., :10] = 0
    latent = {**edit[2], "noise_mask": mask}
    settings = RegionSettings(similarity=1.0, reuse=0.0)
    expected = [
        run(patched, edit, steps=6, latent=latent)
        for patched in (model, set_guidance_interval(model, 0.5, 1.0), apply_region(model, settings))
    ]
    held = [*tensors([edit[0], edit[1], edit[2]]), mask]
    before = copied(held)

    flux = comfy.ldm.flux.model.Flux
    spoilt = [
        spoils(monkeypatch, flux, "forward_orig", "transformer_options"),
        spoils(monkeypatch, flux, "process_img", "transformer_options"),
        spoils(monkeypatch, comfy.sample, "sample_custom"),
    ]

    def cfg_in_place(cfg_function):
        def function(model, cond_pred, uncond_pred, *args, **kwargs):
            out = cfg_function(model, cond_pred.clone(), uncond_pred.clone(), *args, **kwargs)
            cond_pred.fill_(77)
            return out.clone()
        return function

    monkeypatch.setattr(comfy.samplers, "cfg_function", cfg_in_place(comfy.samplers.cfg_function))
    found = [
        run(patched, edit, steps=6, latent=latent)
        for patched in (model, set_guidance_interval(model, 0.5, 1.0), apply_region(model, settings))
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True)) and reference.abs().max() < 77
    assert all(calls and min(calls) > 0 for calls in spoilt)


def test_region_keeps_what_the_sampler_overwrites(model, edit, monkeypatch):
    """The prediction that goes back to the sampler is the one that later steps copy from."""
    settings = RegionSettings(similarity=-0.15, reuse=0.0)
    expected = run(apply_region(model, settings), edit, steps=12)
    attention, predict_noise = [], comfy.samplers.CFGGuider.predict_noise

    def override(function, q, k, v, *args, **kwargs):
        out = function(q, k, v, *args, **kwargs).clone()
        if kwargs["transformer_options"].get("uuids"):
            attention.append(len(q))
        return out

    def step(self, x, timestep, model_options={}, seed=None):
        out = predict_noise(self, x, timestep, model_options, seed)
        kept = out.clone()
        out.fill_(77)
        return kept

    patched = apply_region(model, settings)
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(run(patched, edit, steps=12), expected) and attention
    monkeypatch.setattr(comfy.samplers.CFGGuider, "predict_noise", step)
    assert torch.equal(run(apply_region(model, settings), edit, steps=12), expected)


def test_vae(clip, vae, photo, edit, monkeypatch):
    picture, latent = photo.clone(), edit[2]["samples"].clone()
    expected = decode_edit(vae, edit[2])
    spoilt = [spoils(monkeypatch, comfy.sd.VAE, name) for name in ("encode", "decode")]
    again = encode_edit(clip, vae, picture, "make the cup red", "", 256)
    assert torch.equal(picture, photo) and torch.equal(again[2]["samples"], latent)
    assert torch.equal(decode_edit(vae, again[2]), expected) and torch.equal(again[2]["samples"], latent)
    assert all(calls == [1] for calls in spoilt)


def test_training_prediction(model, edit, monkeypatch):
    x, s = torch.randn(1, 16, 26, 38, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5])
    cond, extra = edit[0][0]
    extra = {"reference_latents": extra["reference_latents"], "attention_mask": extra["attention_mask"]}
    expected, held = predict(model, x, s, (cond, extra)), copied([x, s])
    spoils(monkeypatch, Step1XEditModel, "apply_model", "transformer_options", "c_crossattn", "ref_latents", "text_mask")
    assert torch.equal(predict(model, x, s, (cond, extra)), expected)
    assert torch.equal(x, held[0]) and torch.equal(s, held[1])
