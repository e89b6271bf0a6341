"""The training code's networks against the product's modules, the sampler's parts, and a short training run."""

import dataclasses
import json
import subprocess
import sys

import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch
from conftest import PACK
from safetensors.torch import save_file
from tiny_models import TransformerSize, mllm_shapes, random_weights, transformer_shapes, vae_shapes
from torch import nn

import miniature.mllm
from miniature.autoencoder import Autoencoder, channel_statistics, fold_normalization
from miniature.data import BLOCK, PairStream, Pool, Tokenizer, find_tokenizer
from miniature.mllm import DemoMLLM, vision_pictures
from miniature.model import DemoSize, DemoTransformer, GroundingHeads, folded_attention, parameter_bytes, to_tokens
from miniature.sampling import edit, guided_velocity
from miniature.scenes import pair_at
from miniature.train import load_autoencoder, load_networks, sample_times
from miniature.trainer import Trainer, averaged_weights
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.sampling.sampler import flow_sigmas, sample
from step1x_core.images import to_vision_size
from step1x_core.prompts.v11 import prompt_ids
from step1x_core.sampling.guidance import NormLimiter
from step1x_core.sampling.schedule import sigma_schedule

SIZE = DemoSize()
SMALL = dataclasses.replace(SIZE, hidden=64, depth=1, depth_single=2, text_kv_heads=1, vision=64, vision_full_attention=(1, 2))


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def seeded(module, seed=0):
    """The module's own state dict filled with random weights."""
    weights = random_weights(shapes_of(module), seed)
    module.load_state_dict(weights)
    return module.eval(), weights


def test_tensor_names_and_shapes_are_the_real_ones():
    size = TransformerSize(hidden=SIZE.hidden, head_dim=SIZE.head_dim, depth=SIZE.depth, depth_single=SIZE.depth_single, text=SIZE.text,
                           connector=SIZE.connector, connector_depth=SIZE.connector_depth, vector=SIZE.vector)
    assert shapes_of(DemoTransformer(SIZE)) == transformer_shapes("v1.1", size)
    assert shapes_of(DemoMLLM(SIZE)) == mllm_shapes(SIZE.mllm_config(), lm_head=False)
    assert shapes_of(Autoencoder()) == vae_shapes()


def test_all_files_together_stay_below_30_megabytes():
    assert parameter_bytes(DemoTransformer(SIZE), DemoMLLM(SIZE), Autoencoder()) < 29.5e6


@pytest.fixture(scope="module", params=[SIZE, SMALL], ids=["default", "small"])
def transformers(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("transformer") / "model-v1p1.safetensors"
    ours, weights = seeded(DemoTransformer(request.param))
    save_file(weights, path)
    patcher = load_model(path, model_options={"dtype": torch.float32})
    comfy.model_management.load_models_gpu([patcher])
    return ours, patcher.model.diffusion_model


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_transformer_equals_the_products(transformers, size):
    ours, product = transformers
    generator = torch.Generator().manual_seed(1)
    x, ref = torch.randn(2, 2, 16, *size, generator=generator)
    mask = (torch.arange(640) < torch.tensor([[280], [300]])).long()
    cond = torch.randn(2, 640, SIZE.text, generator=generator) * mask[..., None]
    t = torch.tensor([1.0, 0.3])
    expected = product(x.clone(), t, context=cond, ref_latents=[ref], text_mask=mask)
    assert torch.allclose(ours(x, t, cond, mask, ref), expected, atol=1e-4)
    # Padding cut down to a few positions that stand for all of it.
    assert torch.allclose(ours(x, t, cond[:, :304], mask[:, :304], ref), expected, atol=1e-4)


@pytest.fixture(scope="module", params=[SIZE, SMALL], ids=["default", "small"])
def text_encoders(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("mllm") / "mllm.safetensors"
    ours, weights = seeded(DemoMLLM(request.param))
    save_file(weights, path, metadata={"step1x_edit_config": json.dumps(request.param.mllm_config())})
    return ours, load_text_encoder(path, model_options={"dtype": torch.float32})


def as_the_product(picture):
    """uint8 [S, S, 3] -> whole values as float [3, s, s]."""
    return to_vision_size(picture.float() / 255).float().movedim(-1, 0)


PROMPTS = ["make the red circle blue", "", "delete the star!", "把文字“OPEN”改成“SALE”。", 'change the text "TEA" to "BUS"']


@torch.no_grad()
def test_text_encoder_equals_the_products(text_encoders, monkeypatch):
    ours, clip = text_encoders
    # Our resize rounds a few values the other way; the network itself is compared on the very same pixels.
    monkeypatch.setattr(miniature.mllm, "vision_pictures", lambda pictures: torch.stack([as_the_product(p) for p in pictures]))
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 128, 128, 3), dtype=np.uint8))
    after = [prompt_ids(prompt, clip.tokenizer.token_ids)[1] for prompt in PROMPTS]
    assert 0 in after[2]
    lengths = torch.tensor([len(ids) for ids in after])
    ids = torch.tensor([[*ids, *[151643] * (40 - len(ids))] for ids in after])
    cond, mask = ours(pictures, ids, lengths)
    for i, prompt in enumerate(PROMPTS):
        expected, extra = clip.encode_from_tokens_scheduled(clip.tokenize(prompt, images=[pictures[i:i + 1].float() / 255]))[0]
        assert torch.equal(mask[i], extra["attention_mask"][0])
        assert torch.allclose(cond[i], expected[0], atol=1e-4)
    short, short_mask = ours(pictures, ids, lengths, total=304)
    assert torch.equal(short, cond[:, :304]) and torch.equal(short_mask, mask[:, :304])


def test_pictures_are_resized_as_pillow_does():
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 128, 128, 3), dtype=np.uint8))
    difference = (vision_pictures(pixels)[0] - as_the_product(pixels[0])).abs()
    assert difference.max() <= 2 and difference.mean() < 0.01


@torch.no_grad()
def test_autoencoder_equals_the_hosts(tmp_path):
    ours, weights = seeded(Autoencoder())
    weights["vae_scale"], weights["vae_shift"] = torch.tensor(0.3611), torch.tensor(0.1159)
    ours.load_state_dict(weights)
    save_file(weights, tmp_path / "vae.safetensors")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(tmp_path / "vae.safetensors")))
    pictures = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(2))
    latents = vae.encode(pictures)
    assert torch.allclose(ours.encode(pictures.movedim(-1, 1) * 2 - 1), latents, atol=1e-3)
    decoded = (ours.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(decoded.movedim(1, -1), vae.decode(latents), atol=1e-3)


@torch.no_grad()
def test_folding_normalises_every_channel():
    vae, _ = seeded(Autoencoder())
    pictures = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    fold_normalization(vae, pictures)
    mean, std = channel_statistics(vae.encode_pictures(pictures))
    assert torch.allclose(mean, torch.zeros(16), atol=1e-3) and torch.allclose(std, torch.ones(16), atol=1e-3)


@pytest.mark.parametrize("t", [0.97, 0.5])
def test_guidance_equals_the_products(t):
    cond, uncond, x = torch.randn(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(4))
    sigma = torch.tensor([t])
    denoised = NormLimiter()({"conds": [1, 1], "conds_out": [x - t * cond, x - t * uncond], "sigma": sigma})
    expected = (x - (denoised[1] + 6 * (denoised[0] - denoised[1]))) / t
    assert torch.allclose(guided_velocity(cond, uncond, t, 6.0), expected, atol=1e-4)


def test_times_follow_the_samplers_schedule():
    times = sample_times(100_000, 64, torch.device("cpu"), torch.Generator().manual_seed(0))
    expected = sigma_schedule(10, 64).flip(0)
    assert torch.allclose(times.quantile(torch.linspace(0, 1, 11)), expected, atol=0.01)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(find_tokenizer(None))


def test_workers_deliver_the_same_pairs_as_the_main_process(tokenizer):
    stream, reference = PairStream(5, 96, tokenizer, workers=1), PairStream(5, 96, tokenizer)
    try:
        for _ in range(2):
            assert np.array_equal(stream.get(), reference.get())
    finally:
        stream.close()


def test_attention_with_the_bias_as_features_equals_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 24, 32, generator=generator)
    bias = torch.zeros(2, 1, 1, 24)
    bias[0, ..., 10:14], bias[1, ..., 20:] = 4.61, -1e4
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, 5, 24, -1))
    assert torch.allclose(folded_attention(q, k, v, bias), expected, atol=1e-5)
    assert not torch.allclose(folded_attention(q, k, v, bias * 0), expected, atol=1e-2)


def test_grounding_heads_learn_where_the_edit_takes_place():
    """Tokens that hold the region's cells, pooled as their grids demand: the loss goes to zero, and only for the right places."""
    torch.manual_seed(0)
    heads = GroundingHeads(SMALL)
    region = (torch.rand(4, 16, 16) < 0.3).float()
    tokens = torch.zeros(4, 256, SMALL.connector)
    tokens[..., 0] = region.flatten(1)
    seen = torch.zeros(4, 64, SMALL.hidden)
    seen[..., :4] = to_tokens(region[:, None])
    optimizer = torch.optim.Adam(heads.parameters(), 0.3)
    for _ in range(150):
        optimizer.zero_grad()
        heads(tokens, seen, region).sum().backward()
        optimizer.step()
    assert heads(tokens, seen, region).max() < 0.05
    assert heads(tokens, seen, region.flip(1)).min() > 1


def test_pool_drops_the_oldest_pairs(tokenizer):
    stream, pool = PairStream(5, 96, tokenizer), Pool(2 * BLOCK, 96, torch.device("cpu"), lambda pictures: torch.zeros(len(pictures), 16, 12, 12))
    blocks = [stream.get() for _ in range(3)]
    for block in blocks:
        pool.add(block)
    assert len(pool) == 2 * BLOCK
    assert np.array_equal(pool.tensors["ids"].numpy(), np.concatenate((blocks[2]["ids"], blocks[1]["ids"])))
    batch = pool.sample(8, torch.Generator().manual_seed(0), ("source", "target_latent", "length"))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {"source": (8, 96, 96, 3), "target_latent": (8, 16, 12, 12), "length": (8,)}


def trainer_for(folder, stream, resume=False):
    torch.manual_seed(0)
    networks = nn.ModuleDict({"mllm": nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4)})}), "vae": nn.Linear(4, 4)})
    return Trainer("edit", folder, networks, {"mllm": 0.01, "vae": 0.01}, minutes=1, steps=40, seed=0, device=torch.device("cpu"), metadata={}, stream=stream,
                   warm_up=2, resume=resume)


def test_resumed_training_goes_on_where_it_stopped(tmp_path, tokenizer):
    stream = PairStream(0, 96, tokenizer)

    def steps(trainer, count):
        for _ in range(count):
            ids = torch.randint(5, (8,), generator=trainer.generator)
            trainer.update((trainer.modules["vae"](trainer.modules["mllm"]["model"]["embed_tokens"](ids)) - 1).square().mean())

    whole = trainer_for(tmp_path, stream)
    steps(whole, 10)
    whole.save()
    steps(whole, 10)
    again = trainer_for(tmp_path, stream, resume=True)
    assert again.step == 10
    steps(again, 10)
    for name, average in whole.averages.items():
        # The optimiser's moments are kept in bf16.
        assert torch.allclose(again.averages[name], average, atol=1e-3)
    exported = averaged_weights(tmp_path / "edit.safetensors", "mllm", 9)["model.embed_tokens.weight"]
    assert exported[:5].any(dim=1).all() and not exported[5:].any()


def test_smoke_run_learns_and_its_files_load(tmp_path):
    """The command that CI runs; then the exported files go through the ordinary loaders and make the same edit as the training code."""
    run, models = tmp_path / "run", tmp_path / "models"
    script = [sys.executable, str(PACK / "miniature" / "train.py")]
    output = subprocess.run([*script, "--smoke", "--out", run], check=True, capture_output=True, text=True).stdout
    assert "smoke: vae loss" in output and "smoke: edit loss" in output
    subprocess.run([*script, "export", "--run", run, "--to", models], check=True, capture_output=True)

    model = load_model(models / "step1x-edit-demo.safetensors")
    clip = load_text_encoder(models / "qwen_2.5_vl_demo.safetensors")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "ae_demo.safetensors")))
    picture = torch.from_numpy(pair_at(0, 0, "heldout").source)
    prompt = "make the picture grayscale!"
    positive, negative, latent = encode_edit(clip, vae, picture[None].float() / 255, prompt, "", 128)
    found = decode_edit(vae, sample(model, positive, negative, latent, flow_sigmas(4, latent["samples"]), 1.0, 7))[0]

    networks, _ = load_networks(run, torch.device("cpu"))
    expected = edit(networks["transformer"], networks["mllm"], load_autoencoder(run, torch.device("cpu")), picture[None], [prompt],
                    Tokenizer(find_tokenizer(None)), steps=4, cfg=1.0, seed=7)[0]
    assert (found - expected.float() / 255).abs().mean() < 0.02
