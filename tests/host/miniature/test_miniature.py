"""The miniature's networks against the product's modules, and its training command."""

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
from test_training import SIZE, SMALL, as_the_product, shapes_of
from tiny_models import random_weights
from torch import nn

import miniature.mllm
from miniature.autoencoder import Autoencoder, channel_statistics, fold_normalization
from miniature.data import BLOCK, PairStream, Pool, Tokenizer, find_tokenizer
from miniature.mllm import DemoMLLM
from miniature.model import DemoTransformer
from miniature.sampling import edit
from miniature.scenes import pair_at
from miniature.train import load_autoencoder, load_networks
from miniature.trainer import Trainer, averaged_weights
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.sampling.sampler import flow_sigmas, sample
from step1x_core.prompts.v11 import prompt_ids


def seeded(module, seed=0):
    """The module's own state dict filled with random weights."""
    weights = random_weights(shapes_of(module), seed)
    module.load_state_dict(weights)
    return module.eval(), weights


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


def test_pool_drops_the_oldest_pairs(tokenizer):
    stream, pool = (
        PairStream(5, 96, tokenizer),
        Pool(2 * BLOCK, 96, torch.device("cpu"), lambda pictures: torch.zeros(len(pictures), 16, 12, 12)),
    )
    blocks = [stream.get() for _ in range(3)]
    for block in blocks:
        pool.add(block)
    assert len(pool) == 2 * BLOCK
    assert np.array_equal(pool.tensors["ids"].numpy(), np.concatenate((blocks[2]["ids"], blocks[1]["ids"])))
    batch = pool.sample(8, torch.Generator().manual_seed(0), ("source", "target_latent", "length"))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "source": (8, 96, 96, 3),
        "target_latent": (8, 16, 12, 12),
        "length": (8,),
    }


def trainer_for(folder, stream, resume=False):
    torch.manual_seed(0)
    networks = nn.ModuleDict(
        {"mllm": nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4)})}), "vae": nn.Linear(4, 4)}
    )
    return Trainer(
        "edit",
        folder,
        networks,
        {"mllm": 0.01, "vae": 0.01},
        minutes=1,
        steps=40,
        seed=0,
        device=torch.device("cpu"),
        metadata={},
        stream=stream,
        warm_up=2,
        resume=resume,
    )


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


@pytest.mark.once
def test_smoke_run_learns_and_its_files_load(tmp_path):
    """The command that CI runs; then the exported files go through the ordinary loaders and make the same edit as the training code."""
    run, models = tmp_path / "run", tmp_path / "models"
    script = [sys.executable, str(PACK / "miniature" / "train.py")]
    output = subprocess.run([*script, "--smoke", "--side", "96", "--out", run], check=True, capture_output=True, text=True).stdout
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
