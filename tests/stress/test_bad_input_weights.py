"""Damaged and foreign text encoders, VAEs and LoRAs, and what comes of weights that are no numbers."""

import json
import pickle
import shutil
import struct

import pytest
import tiny_models
import torch
from bad_input_files import (
    DAMAGED,
    INCOMPLETE,
    LANGUAGE,
    LORA,
    MODEL,
    NAN,
    NO_WEIGHTS,
    QKV,
    TYPES,
    UNREADABLE,
    VAE,
    WRONG,
    Bomb,
    changed,
    check,
    load,
    load_model,
    without,
    write,
)
from bad_input_host import Given, peak_memory, running_host, use_models
from safetensors.torch import load_file, save

from step1x_core.checkpoints.detection import CONFIG_KEY

# Nodes and their checks are the same in every host. A sample of the cases shows what a further host makes of them.
pytestmark = pytest.mark.sampled(11)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_models")


@pytest.fixture(scope="module")
def host(root, models, model, clip, vae):
    with running_host(model, clip, vae, lambda patch: use_models(patch, root, models)) as host:
        yield host


@pytest.fixture(scope="module")
def memory(host):
    return peak_memory()


@pytest.fixture(scope="module")
def weights(models):
    return load_file(models / "diffusion_models" / tiny_models.V11_FILE)


@pytest.fixture(scope="module")
def language_weights():
    """A language model with a small vocabulary: nothing is encoded with it."""
    config = {**tiny_models.TINY_MLLM, "vocab_size": 64}
    return tiny_models.random_weights(tiny_models.mllm_shapes(config), 2, torch.bfloat16), config


@pytest.fixture(scope="module")
def vae_weights():
    return tiny_models.random_weights(tiny_models.vae_shapes(), 3)


def language(name, value):
    return lambda w, config: (w, {CONFIG_KEY: json.dumps({**config, name: value})})


def vision(name, value):
    return lambda w, config: (w, {CONFIG_KEY: json.dumps({**config, "vision_config": {**config["vision_config"], name: value}})})


LANGUAGE_SIZED = (
    "model.norm.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "visual.patch_embed.proj.weight",
    "visual.merger.mlp.2.weight",
)
MISFIT = "which does not match its weights. Download it again"
LANGUAGE_MODELS = {
    **{
        f"without_{key}": (lambda w, config, key=key: (without(key)(w), {CONFIG_KEY: json.dumps(config)}), INCOMPLETE)
        for key in (
            "model.norm.weight",
            "model.embed_tokens.weight",
            "model.layers.1.mlp.down_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "visual.blocks.0.mlp.gate_proj.weight",
            "visual.blocks.1.norm2.weight",
            "visual.merger.ln_q.weight",
        )
    },
    "text_only": (lambda w, config: without("visual.")(w), "has no vision tower"),
    "vision_only": (lambda w, config: without("model.", "lm_head")(w), "is not a Qwen2.5-VL model"),
    "t5": (
        lambda w, config: {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(3, 3)},
        "is not a Qwen2.5-VL model",
    ),
    "clip": (
        lambda w, config: {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 3)},
        "is not a Qwen2.5-VL model",
    ),
    **{
        f"{kind}_for_{key}": (
            lambda w, config, key=key, shape=shape: ({**w, key: torch.zeros(shape)}, {CONFIG_KEY: json.dumps(config)}),
            f"{WRONG}|{MISFIT}",
        )
        for key in LANGUAGE_SIZED
        for kind, shape in (("scalar", ()), ("vector", (3,)), ("no_columns", (10**12, 0)))
    },
    **{
        f"{name}_matrix": (
            lambda w, config, dtype=dtype: (
                {**w, "model.layers.0.mlp.up_proj.weight": w["model.layers.0.mlp.up_proj.weight"].to(dtype)},
                {CONFIG_KEY: json.dumps(config)},
            ),
            NO_WEIGHTS,
        )
        for name, dtype in TYPES.items()
    },
    **{
        f"configuration_{name}": (
            lambda w, config, text=text: (w, {CONFIG_KEY: text}),
            "is damaged. Download the file again",
        )
        for name, text in UNREADABLE.items()
        if text
    },
    "heads_as_text": (language("num_attention_heads", "2"), "could not be loaded"),
    "heads_negative": (language("num_attention_heads", -2), MISFIT),
    "theta_zero": (language("rope_theta", 0), MISFIT),
    "theta_as_text": (language("rope_theta", "x"), MISFIT),
    "epsilon_as_text": (language("rms_norm_eps", "x"), MISFIT),
    "scaling_as_text": (language("rope_scaling", "x"), "could not be loaded"),
    **{
        f"section_{name}": (language("rope_scaling", {"mrope_section": value}), MISFIT)
        for name, value in {
            "short": [1, 2],
            "text": "abc",
            "negative": [-4, 14, 6],
            "empty": [],
            "long": [16, 24, 24],
        }.items()
    },
    "text_config_as_text": (language("text_config", "x"), "could not be loaded"),
    "vision_config_as_null": (language("vision_config", None), "could not be loaded"),
    "vision_heads_zero": (vision("num_heads", 0), MISFIT),
    "vision_heads_seven": (vision("num_heads", 7), MISFIT),
    "vision_window_zero": (vision("window_size", 0), MISFIT),
    "vision_window_as_text": (vision("window_size", "a"), MISFIT),
    "vision_blocks_as_number": (vision("fullatt_block_indexes", 5), MISFIT),
    "quantisation_no_json": (
        lambda w, config: (w, {CONFIG_KEY: json.dumps(config), "_quantization_metadata": "{"}),
        "could not be loaded",
    ),
    "quantisation_number": (
        lambda w, config: (w, {CONFIG_KEY: json.dumps(config), "_quantization_metadata": '{"layers": 5}'}),
        "could not be loaded",
    ),
    "cut": (lambda w, config: save(w)[:5000], f"{LANGUAGE} {DAMAGED}"),
    "html": (lambda w, config: b"<!DOCTYPE html>" * 50, f"{LANGUAGE} {DAMAGED}"),
    "pickle": (lambda w, config: pickle.dumps(Bomb()), f"{LANGUAGE} {DAMAGED}"),
    "empty": (lambda w, config: b"", f"{LANGUAGE} {DAMAGED}"),
    "header_claims_100_megabytes": (
        lambda w, config: struct.pack("<Q", 99_999_999) + save(w)[8:],
        f"{LANGUAGE} {DAMAGED}",
    ),
}


@pytest.mark.parametrize("change, expected", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_language_models(host, root, memory, language_weights, change, expected):
    write(root / "text_encoders" / LANGUAGE, change(*language_weights))
    check(host, memory, load(host, "Step1XEditMLLM", LANGUAGE, device="cpu"), expected)


VAES = {
    **{
        f"without_{key}": (without(key), INCOMPLETE)
        for key in ("taesd_encoder.0.weight", "taesd_encoder.14.bias", "taesd_decoder.19.weight", "taesd_encoder.")
    },
    **{
        f"{kind}_for_{key}": (changed(key, lambda t, shape=shape: torch.zeros(shape)), WRONG)
        for key in ("taesd_decoder.1.weight", "taesd_encoder.0.weight")
        for kind, shape in (("scalar", ()), ("vector", (3,)), ("matrix", (3, 3)), ("no_columns", (10**12, 0)))
    },
    **{
        f"{name}_kernel": (changed("taesd_encoder.0.weight", lambda t, dtype=dtype: t.to(dtype)), NO_WEIGHTS)
        for name, dtype in TYPES.items()
    },
    "no_vae": (lambda w: {"a": torch.zeros(1)}, "does not contain a VAE that ComfyUI recognises"),
    "transformer": (lambda w: {"img_in.weight": torch.zeros(4, 4)}, "does not contain a VAE that ComfyUI recognises"),
    "first_layer_of_a_vae": (lambda w: {"decoder.conv_in.weight": torch.zeros(512, 16, 3, 3)}, f"{WRONG}|{INCOMPLETE}"),
    "vector_as_first_layer": (lambda w: {"decoder.conv_in.weight": torch.zeros(4)}, WRONG),
    "first_layer_of_a_diffusers_vae": (
        lambda w: {"decoder.up_blocks.0.resnets.0.norm1.weight": torch.zeros(4)},
        f"{WRONG}|{INCOMPLETE}|does not contain a VAE",
    ),
    "cut": (lambda w: save(w)[:-1], f"{VAE} {DAMAGED}"),
    "html": (lambda w: b"<!DOCTYPE html>" * 50, f"{VAE} {DAMAGED}"),
    "pickle": (lambda w: pickle.dumps(Bomb()), f"{VAE} {DAMAGED}"),
    "empty": (lambda w: b"", f"{VAE} {DAMAGED}"),
    "whole": (lambda w: w, None),
}


def load_with_vae(host, root, content):
    """The model of a diffusers folder whose VAE this is."""
    repository = root / "diffusers" / "bad-v1p1"
    for name in ("transformer", "vae"):
        (repository / name).mkdir(parents=True, exist_ok=True)
        (repository / name / "config.json").write_text("{}")
    if not (repository / "transformer" / MODEL).is_file():
        shutil.copy(root / "diffusion_models" / tiny_models.V11_FILE, repository / "transformer" / MODEL)
    write(repository / "vae" / VAE, content)
    return load_model(host, "bad-v1p1/", version="v1.1")


@pytest.mark.parametrize("change, expected", VAES.values(), ids=VAES)
def test_vaes(host, root, memory, vae_weights, change, expected):
    check(host, memory, load_with_vae(host, root, change(vae_weights)), expected)


LAYER = "lora_unet_double_blocks_0_img_attn_qkv"
DOWN, UP, ALPHA = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.alpha"
GOOD_LORA = {DOWN: torch.full((4, 64), 0.1), UP: torch.full((192, 4), 0.1), ALPHA: torch.tensor(4.0)}
UNFIT = "This LoRA (is incomplete|contains|does not fit.* Choose another|could not be loaded.* Try another file)"


def tensors(**named):
    names = {"down": DOWN, "up": UP, "alpha": ALPHA}
    return {**GOOD_LORA, **{names.get(name, f"{LAYER}.{name}"): tensor for name, tensor in named.items()}}


LORAS = {
    "whole": (GOOD_LORA, None),
    "with_a_layer_that_only_flux_has": (
        {
            **GOOD_LORA,
            "transformer.time_text_embed.guidance_embedder.linear_1.lora_A.weight": torch.ones(4, 256),
            "transformer.time_text_embed.guidance_embedder.linear_1.lora_B.weight": torch.ones(64, 4),
        },
        None,
    ),
    "without_up": ({DOWN: GOOD_LORA[DOWN]}, "matches no layer|does not fit|is incomplete"),
    "without_down": ({UP: GOOD_LORA[UP]}, UNFIT),
    "ranks_differ": (tensors(down=torch.ones(8, 64)), UNFIT),
    "columns_differ": (tensors(down=torch.ones(4, 32)), UNFIT),
    "rows_differ": (tensors(up=torch.ones(100, 4)), UNFIT),
    "rank_of_zero": (tensors(down=torch.zeros(0, 64), up=torch.zeros(192, 0)), UNFIT),
    "scalar_down": (tensors(down=torch.tensor(1.0)), UNFIT),
    "scalar_up": (tensors(up=torch.tensor(1.0)), UNFIT),
    "vector_down": (tensors(down=torch.ones(64)), UNFIT),
    "convolution": (tensors(down=torch.ones(4, 64, 3, 3)), UNFIT),
    "middle": (tensors(**{"lora_mid.weight": torch.ones(3, 3)}), UNFIT),
    "reshaped": (tensors(reshape_weight=torch.ones(3)), UNFIT),
    "magnitude_of_another_layer": (tensors(dora_scale=torch.ones(3)), UNFIT),
    "two_alphas": (tensors(alpha=torch.ones(2)), UNFIT),
    "two_zero_alphas": (tensors(alpha=torch.zeros(2)), UNFIT),
    "no_alpha_in_its_tensor": (tensors(alpha=torch.zeros(0)), UNFIT),
    "zero_alpha_and_scalar_down": (tensors(alpha=torch.tensor(0.0), down=torch.tensor(1.0)), UNFIT),
    "difference_of_another_shape": ({"diffusion_model.img_in.diff": torch.ones(3, 3)}, UNFIT),
    "bias_of_another_shape": ({"diffusion_model.img_in.diff_b": torch.ones(3)}, UNFIT),
    "replacement_of_another_shape": ({"diffusion_model.img_in.set_weight": torch.ones(3, 3)}, UNFIT),
    "half_of_a_loha": ({f"{LAYER}.hada_w1_a": torch.ones(3, 3)}, UNFIT),
    **{f"{name}_matrix": (tensors(down=torch.ones(4, 64).to(dtype)), NO_WEIGHTS) for name, dtype in TYPES.items()},
    "sdxl": (
        {
            "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(4, 320),
            "lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(320, 4),
        },
        "matches no layer of the Step1X-Edit model",
    ),
    "text_encoder_only": (
        {"lora_te_x.lora_up.weight": torch.ones(3, 3), "lora_te_x.lora_down.weight": torch.ones(3, 3)},
        "matches no layer of the Step1X-Edit model",
    ),
    "no_lora": ({"a": torch.ones(1)}, "matches no layer of the Step1X-Edit model"),
    "cut": (save(GOOD_LORA)[:-1], f"{LORA} {DAMAGED}"),
    "html": (b"<!DOCTYPE html>" * 50, f"{LORA} {DAMAGED}"),
    "pickle": (pickle.dumps(Bomb()), f"{LORA} {DAMAGED}"),
    "empty": (b"", f"{LORA} {DAMAGED}"),
}


def load_lora(host, strength=1.0):
    return load(host, "Step1XEditLoadLora", LORA, strength=strength)


@pytest.mark.parametrize("content, expected", LORAS.values(), ids=LORAS)
def test_loras(host, root, memory, content, expected):
    write(root / "loras" / LORA, content)
    check(host, memory, load_lora(host), expected)


def test_pickled_lora_is_not_opened(host, root, memory):
    (root / "loras" / "bad_lora.pt").write_bytes(pickle.dumps(Bomb()))
    check(host, memory, load(host, "Step1XEditLoadLora", "bad_lora.pt"), "is not a safetensors file. Only safetensors")


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("key", [QKV, "final_layer.linear.bias", "connector.S.input_embedder.weight"])
def test_model_weights_that_are_no_numbers_are_found_by_our_sampler(host, root, weights, key, value):
    """Reading 25 GB of weights to look for them would take as long as the edit."""
    write(root / "diffusion_models" / MODEL, changed(key, lambda t: torch.full_like(t, value))(weights))
    loaded, _ = load_model(host).made()
    host.refuses(host.sample(model=Given(loaded)), "Sampling returned NaN or Inf values, .* download the file again")


def test_the_stock_sampler_goes_on_as_the_host_does(host, root, weights):
    write(root / "diffusion_models" / MODEL, changed(QKV, lambda t: t * NAN)(weights))
    loaded, _ = load_model(host).made()
    inputs = {name: Given(value) for name, value in zip(("positive", "negative", "latent_image"), host.encoded)}
    (latent,) = host.run(
        "KSampler",
        model=Given(loaded),
        **inputs,
        seed=1,
        steps=1,
        cfg=6.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    ).made()
    assert latent["samples"].isnan().any()
    host.still_edits()


@pytest.mark.parametrize("key, value", [(DOWN, NAN), (UP, float("inf")), (ALPHA, NAN)])
def test_lora_weights_that_are_no_numbers(host, root, key, value):
    write(root / "loras" / LORA, {**GOOD_LORA, key: torch.full_like(GOOD_LORA[key], value)})
    (patched,) = load_lora(host).made()
    host.refuses(host.sample(model=Given(patched)), "Sampling returned NaN or Inf values")


@pytest.mark.parametrize(
    "part, says",
    [
        ("taesd_encoder.", "The VAE encoder returned NaN or Inf values"),
        ("taesd_decoder.", "The VAE decoder returned NaN or Inf values"),
    ],
)
def test_vae_weights_that_are_no_numbers(host, root, vae_weights, part, says):
    _, loaded = load_with_vae(host, root, {key: t * NAN if key.startswith(part) else t for key, t in vae_weights.items()}).made()
    broken = host.encode(vae=Given(loaded)) if part == "taesd_encoder." else host.decode(host.encoded[2], vae=Given(loaded))
    host.refuses(broken, f"{says}; .* Download the VAE again")


def test_language_model_weights_that_are_no_numbers(host, root):
    config = tiny_models.TINY_MLLM
    broken = changed("model.norm.weight", lambda t: t * NAN)(tiny_models.random_weights(tiny_models.mllm_shapes(config), 2, torch.bfloat16))
    write(root / "text_encoders" / LANGUAGE, (broken, {CONFIG_KEY: json.dumps(config)}))
    (loaded,) = load(host, "Step1XEditMLLM", LANGUAGE, device="cpu").made()
    host.refuses(host.encode(clip=Given(loaded)), "The text encoder returned NaN or Inf values; .* Download")
    thought = host.call("Step1XEditThinkPrompt", clip=Given(loaded))
    host.refuses(thought, "The language model returned NaN values; .* Download", from_the_start=True)


def test_good_files_load_and_edit_as_before_after_all_of_that(host, models, root):
    loaded, own_vae = load_with_vae(host, root, (models / "vae" / tiny_models.VAE_FILE).read_bytes()).made()
    (sampled,) = host.sample(model=Given(loaded)).made()
    assert torch.equal(host.decode(sampled, vae=Given(own_vae)).made()[0], host.expected)
