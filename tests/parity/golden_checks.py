"""The golden checks of v1.0 and v1.1, through the product's own code and the host's sampler."""

import functools
import json
import math
import tempfile
from pathlib import Path

import comfy.lora
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.latent_formats import Flux as FluxLatent
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.models.autoencoder import DiagonalGaussianDistribution
from comfy.ldm.modules.attention import optimized_attention_masked
from comfy.ops import disable_weight_init
from golden_files import MISMATCH, Errors, Golden
from golden_shapes import half, pad_weight, patches_in_row, position_ids, row_of_patches, split_tokens, token_grid
from safetensors.torch import save_file
from tiny_models import TransformerSize, random_weights, transformer_shapes

from step1x_core.checkpoints.detection import CONFIG_KEY
from step1x_core.checkpoints.keys import diffusers_to_original
from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model
from step1x_core.host.checkpoints.lora import apply_lora, lora_keys
from step1x_core.host.network.blocks import TOKENS_READ
from step1x_core.host.network.transformer import Step1XTransformer
from step1x_core.host.prompts.encoding import LATENT_CHANNELS, decode_edit
from step1x_core.host.prompts.text_encoder import Step1XTokenizer
from step1x_core.host.sampling.sampler import flow_sigmas, set_norm_limiter
from step1x_core.host.speed.teacache import TeaCache, apply_teacache
from step1x_core.images import BLACK_PICTURE, truncate_uint8, vision_sizes, working_size
from step1x_core.network.connector import Connector, TimestepEmbedder, scale_time, time_features
from step1x_core.prompts.cut import layout_states
from step1x_core.prompts.mllm import attention_mask, mrope_positions
from step1x_core.prompts.v11 import prompt_ids
from step1x_core.sampling.guidance import NormLimiter, norm_divisor, patch_norm
from step1x_core.sampling.schedule import image_to_image_start, latent_tokens, shift_mu, sigma_schedule

# The official code computes all tokens in the last block, too, and the files hold that.
READ_ALL = {TOKENS_READ: None}


def golden_model(golden: Golden):
    """The weights as a MODEL, through a checkpoint file and the pack's loader. Weights that a file leaves out are random."""
    c = golden.config
    size = TransformerSize(
        hidden=c["hidden_size"],
        head_dim=c["hidden_size"] // c["num_heads"],
        depth=c["depth"],
        depth_single=c["depth_single_blocks"],
        text=c["connector_in_channels"],
        connector=c["connector_hidden_size"],
        connector_depth=c["connector_depth"],
        vector=c["vec_in_dim"],
        channels=c["in_channels"],
        mlp_ratio=c["mlp_ratio"],
    )
    weights = {**random_weights(transformer_shapes(c["version"], size), seed=0), **golden.weights}
    weights = {name: pad_weight(name, weight) for name, weight in weights.items()}
    overrides = {k: golden.config[k] for k in ("version", "axes_dim", "theta", "connector_heads") if k in golden.config}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.safetensors"
        save_file(weights, path, metadata={CONFIG_KEY: json.dumps(overrides)})
        model = load_model(path)
        model.model.diffusion_model.to(torch.float32)
    model.model_options["transformer_options"] |= READ_ALL
    return model


def pack(model, latent: torch.Tensor) -> torch.Tensor:
    return model.process_img(latent)[0]


def check_connector(golden: Golden, errors: Errors) -> None:
    c = golden.config
    connector = Connector(
        c["connector_in_channels"],
        c["connector_hidden_size"],
        c["connector_heads"],
        c["connector_depth"],
        c["vec_in_dim"],
        "scale_factor" in golden.weights,
        optimized_attention_masked,
        dtype=torch.float32,
        operations=disable_weight_init,
    )
    connector.load_state_dict(golden.weights)
    tokens, pooled = connector(golden.inputs["x"], golden.inputs["t"], golden.inputs["mask"])
    errors.tensor(tokens, golden.outputs["encoder_hidden_states"])
    errors.tensor(pooled, golden.outputs["global_out"])


def record_intermediates(model, seen: dict) -> list:
    """Hooks that store what the golden files call the transformer's intermediates. Blocks add in place, so results are copied."""
    def store(name):
        def hook(module, args, output):
            seen[name] = output.clone() if torch.is_tensor(output) else tuple(o.clone() for o in output)
        return hook

    hooks = [model.connector.register_forward_hook(store("connector")), model.img_in.register_forward_hook(store("img_in")),
             model.txt_in.register_forward_hook(store("txt_in")), model.time_in.register_forward_hook(store("time_in")),
             model.vector_in.register_forward_hook(store("vector_in")), model.final_layer.register_forward_hook(store("final"))]
    hooks.append(model.time_in.register_forward_pre_hook(lambda module, args: seen.update(time_embedding_256=args[0].clone())))
    for kind, blocks in (("double", model.double_blocks), ("single", model.single_blocks)):
        hooks += [block.register_forward_hook(store(f"{kind}.{i}")) for i, block in enumerate(blocks)]
    return hooks


def check_dit_forward(golden: Golden, errors: Errors) -> None:
    model = golden_model(golden).model.diffusion_model
    seen = {}
    record_intermediates(model, seen)
    grid = half(golden.config["latent_h"]), half(golden.config["latent_w"])
    target, references = split_tokens(model, golden.inputs["img"], golden.inputs["img_ids"][0], grid)
    velocity = model(
        target,
        golden.inputs["timesteps"],
        golden.inputs["llm_embedding"],
        ref_latents=references,
        text_mask=golden.inputs["mask"],
        transformer_options=READ_ALL,
    )

    out = golden.outputs
    tokens, channels = grid[0] * grid[1], out["pred"].shape[-1]
    errors.equal(position_ids(model, target, references), golden.inputs["img_ids"])
    errors.tensor(pack(model, velocity)[..., :channels], out["pred"][:, :tokens])
    errors.tensor(seen["final"][..., :channels], out["pred"])
    errors.tensor(seen["connector"][0], out["connector.txt"])
    errors.tensor(seen["connector"][1], out["connector.vec"])
    errors.tensor(seen["time_in"] + seen["vector_in"], out["vec"])
    for name in out:
        if name == "time_embedding_256":
            errors.waves(seen[name], out[name])
        elif name in ("img_in", "txt_in") or name.startswith("single."):
            errors.tensor(seen[name], out[name])
        elif name.startswith("double."):
            block, stream = name.rsplit(".", 1)
            errors.tensor(seen[block][("img", "txt").index(stream)], out[name])


def check_ids(golden: Golden, errors: Errors) -> None:
    axes, theta = golden.config["axes_dim"], golden.config["theta"]
    latent = golden.inputs["latent"]
    models = {
        version: Step1XTransformer(
            version,
            {"in_channels": 8, "hidden_size": 8, "num_heads": 1, "depth": 1, "vec_in_dim": 8, "scale_factor": False},
            dtype=torch.float32,
            operations=disable_weight_init,
            in_channels=latent.shape[1],
            out_channels=latent.shape[1],
            hidden_size=sum(axes),
            num_heads=1,
            depth=1,
            depth_single_blocks=1,
            mlp_ratio=1.0,
            axes_dim=axes,
            theta=theta,
            context_in_dim=8,
            vec_in_dim=8,
            patch_size=2,
            qkv_bias=True,
            guidance_embed=False,
            txt_ids_dims=[],
        )
        for version in ("v1.0", "v1.1")
    }

    def blank(h, w):
        return torch.zeros(1, latent.shape[1], h, w)

    def ids(name, version, h, w):
        """Of a case's target and its reference. A case tells the target's size; the reference's is that of the expected table."""
        others = golden.outputs[f"{name}.{version}.img_ids"][half(h) * half(w):]
        references = [blank(*(2 * side for side in token_grid(others)))] if len(others) else []
        return position_ids(models[version], blank(h, w), references)[0]

    for name, (h, w, text, *_) in golden.config["cases"].items():
        for version in models:
            errors.equal(ids(name, version, h, w), golden.outputs[f"{name}.{version}.img_ids"])
            errors.equal(torch.zeros(text, 3), golden.outputs[f"{name}.{version}.txt_ids"])
        errors.equal(position_ids(models["v1.1"], blank(h, w), [])[0], golden.outputs[f"{name}.t2i.img_ids"])

    model = models["v1.1"]
    target = pack(model, latent)
    errors.equal(torch.cat((target, model.process_reference(golden.inputs["ref_latent"], 0)[0]), dim=1), golden.outputs["packed_img"])
    errors.equal(model.unpack(target, *latent.shape[-2:]), golden.outputs["unpacked_first_half"])
    name, (h, w, text, *_) = next(iter(golden.config["cases"].items()))
    all_ids = torch.cat((torch.zeros(text, 3), ids(name, "v1.1", h, w)))[None]
    errors.tensor(model.pe_embedder(all_ids), golden.outputs["rope_pe"])


def check_schedule(table: dict, errors: Errors) -> None:
    for row in table["schedules"]:
        latent = torch.zeros(1, 16, math.ceil(row["height"] / 16) * 2, math.ceil(row["width"] / 16) * 2)
        errors.equal(latent_tokens(*latent.shape[-2:]), row["image_seq_len"])
        errors.tensor(torch.tensor(shift_mu(row["image_seq_len"])), torch.tensor(row["mu"]))
        errors.equal(flow_sigmas(row["num_steps"], latent), torch.tensor(row["timesteps"]))
    for row in table["unshifted"]:
        errors.equal(sigma_schedule(row["num_steps"]), torch.tensor(row["timesteps"]))
    for row in table["image2image"]:
        start = image_to_image_start(row["num_steps"], row["image2image_strength"])
        sigmas = sigma_schedule(row["num_steps"], 1024)[start:]
        errors.equal(start, row["t_idx"])
        errors.equal(sigmas[0], torch.tensor(row["t"]))
        errors.equal(len(sigmas) - 1, row["remaining_steps"])


def check_cfg(golden: Golden, errors: Errors) -> None:
    """Guidance and one Euler step: the pack's hook, the host's CFG function, the host's Euler sampler."""
    x, cond, uncond = (row_of_patches(golden.inputs[name]) for name in ("x", "cond", "uncond"))
    channels = golden.inputs["x"].shape[-1]
    norm = patch_norm(cond - uncond)[:, :, ::2, ::2].flatten(1)[..., None]
    errors.tensor(norm, golden.outputs["diff_norm"])
    errors.tensor(norm_divisor(norm, golden.config["exponent"]), golden.outputs["divisor"])
    errors.tensor(norm_divisor(golden.inputs["norm_table"], golden.config["exponent"]), golden.outputs["divisor_table"])

    for name, case in golden.config["cases"].items():
        limiter = NormLimiter(case["timesteps_truncate"], golden.config["exponent"])

        def denoise(x, sigma, **kwargs):
            conds_out = limiter({"conds": [True, True], "conds_out": [x - sigma * cond, x - sigma * uncond], "sigma": sigma})
            return comfy.samplers.cfg_function(None, *conds_out, case["cfg_guidance"], x, sigma)

        x_next = sample_euler(denoise, x.clone(), torch.tensor([case["t_curr"], case["t_prev"]]), disable=True)
        errors.tensor(patches_in_row(x_next, channels), golden.outputs[f"{name}.x_next"])


def run_loop(golden: Golden, model, cfg: float, steps: int, reference: bool = True, after_step=lambda: None):
    """The denoising loop through the host's sampler -> latents after each step, in the model's own scale."""
    def callback(step, denoised, x, total):
        latents.append(x.clone())
        after_step()

    def scale_out(latent):
        return model.model.process_latent_out(latent)

    noise = golden.inputs["noise"][:1]
    sigmas = flow_sigmas(steps, noise)
    conds = []
    for row in range(2):
        extra = {"attention_mask": golden.inputs["mask"][row:row + 1]}
        if reference:
            extra["reference_latents"] = [scale_out(golden.inputs["ref_latent"][row:row + 1])]
        conds.append([[golden.inputs["llm_embedding"][row:row + 1], extra]])
    latents = []
    result = comfy.sample.sample_custom(model, noise, cfg, comfy.samplers.sampler_object("euler"), sigmas, *conds, torch.zeros_like(noise),
                                        callback=callback, disable_pbar=True, seed=0)
    return [*latents[1:], model.model.process_latent_in(result)], sigmas


def set_main_limiter(model, config: dict):
    """The norm limiter that a golden loop ran with by default: its own `main` setting where it has several, else the model's."""
    return set_norm_limiter(model, NormLimiter(config["truncates"]["main"])) if "truncates" in config else model


def check_denoise_loop(golden: Golden, errors: Errors) -> None:
    model = golden_model(golden)
    transformer = model.model.diffusion_model
    out, config = golden.outputs, golden.config
    noise, reference = golden.inputs["noise"], golden.inputs["ref_latent"]
    packed = torch.cat((pack(transformer, noise), transformer.process_reference(reference, 0)[0]), dim=1)
    errors.equal(packed, out["packed_input"])
    errors.equal(position_ids(transformer, noise, [reference]), out["img_ids"])

    for tag, truncate in config["truncates"].items():
        first_call = []
        hook = transformer.final_layer.register_forward_hook(lambda module, args, output: first_call.append(output))
        latents, sigmas = run_loop(golden, set_norm_limiter(model, NormLimiter(truncate)), config["cfg_guidance"], config["num_steps"])
        hook.remove()
        errors.equal(sigmas, out["timesteps"])
        # The host may order the rows of a batch as it likes; compare each expected row with the nearest one.
        rows = torch.cat(first_call)[:2]
        expected = out[f"{tag}.model_pred_step_0"]
        straight, swapped = ((order - expected).abs().max() for order in (rows, rows.flip(0)))
        errors.tensor(rows if straight <= swapped else rows.flip(0), expected)
        for step, latent in enumerate(latents):
            errors.tensor(pack(transformer, latent), out[f"{tag}.latents_after_step_{step}"])
        errors.tensor(latents[-1], out[f"{tag}.final_unpacked"])
    if config.get("t2i"):
        latents, _ = run_loop(golden, set_main_limiter(model, config), config["cfg_guidance"], config["num_steps"], reference=False)
        for step, latent in enumerate(latents):
            errors.tensor(pack(transformer, latent), out[f"t2i.latents_after_step_{step}"])


def load_vae(golden: Golden):
    """The golden weights as the host's VAE. It takes other sizes than the published ones only as an autoencoder with quant convolutions: here the identity."""
    c = golden.config
    z = c["z_channels"]
    params = {"double_z": True, "z_channels": z, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": c["ch"], "ch_mult": c["ch_mult"],
              "num_res_blocks": c["num_res_blocks"], "attn_resolutions": [], "dropout": 0.0}
    identity = {f"{name}.{part}": value for name, n in (("quant_conv", 2 * z), ("post_quant_conv", z))
                for part, value in (("weight", torch.eye(n)[:, :, None, None]), ("bias", torch.zeros(n)))}
    vae = comfy.sd.VAE(sd={**golden.weights, **identity}, config={"params": {"ddconfig": params, "embed_dim": z}}, dtype=torch.float32)
    # The host takes 8 for granted, and would cut a picture's sides to multiples of it.
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(c["ch_mult"]) - 1)
    return vae


def check_vae(golden: Golden, errors: Errors) -> None:
    """The host's VAE and latent scale. The pack's encoding (posterior mean) and decoding go through its encode() and decode()."""
    vae, scale = load_vae(golden), FluxLatent()
    image = golden.inputs["image"]
    errors.tensor(scale.process_in(vae.encode(image.movedim(1, -1))), golden.outputs["encoded_mean"])
    picture = vae.decode(scale.process_out(golden.inputs["latent"]))
    errors.tensor(picture.movedim(-1, 1), golden.outputs["decoded_01"])

    # What the pack does not use lies in the autoencoder below: moments, a sampled latent, values outside 0..1.
    network = vae.first_stage_model
    moments = network.encoder(image * 2 - 1)
    posterior = DiagonalGaussianDistribution(moments)
    errors.tensor(moments, golden.outputs["moments"])
    errors.tensor(scale.process_in(posterior.mean + posterior.std * golden.outputs["eps"]), golden.outputs["encoded_sampled"])
    errors.tensor(network.decode(scale.process_out(golden.inputs["latent"])), golden.outputs["decoded"])
    difference = truncate_uint8(picture).int() - golden.outputs["decoded_uint8"].int()
    # Truncation turns a rounding error at a step into one whole level, in a handful of values at most.
    if difference.abs().max() > 1 or (difference != 0).float().mean() > 1e-3:
        errors.max = max(errors.max, MISMATCH)


class BlankVAE:
    """Stands for a VAE where only picture sizes matter: decodes black pictures."""

    latent_channels = LATENT_CHANNELS
    latent_dim = 2

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, latent.shape[2] * 8, latent.shape[3] * 8, 3)


@functools.cache
def output_size(latent_hw: tuple[int, int], source: tuple[int, int]) -> list[int]:
    """Size (width, height) of the picture that the pack decodes for a source picture of the given size."""
    blank = torch.zeros(1, 1, 1, 3).expand(1, source[1], source[0], 3)
    result = decode_edit(BlankVAE(), {"samples": torch.zeros(1, LATENT_CHANNELS, *latent_hw)}, blank)
    return [result.shape[2], result.shape[1]]


def check_resize(table: dict, errors: Errors) -> None:
    def vision(size, first, second, grid, tokens):
        errors.equal([list(s) for s in vision_sizes(*size)], [first, second])
        errors.equal([1, second[1] // 14, second[0] // 14], grid)
        errors.equal(second[0] // 28 * (second[1] // 28), tokens)

    for row in table["rows"]:
        try:
            size = working_size(row["width"], row["height"], row["size_level"])
        except Step1XError:
            errors.equal(row.get("error") is not None, True)
            continue
        errors.equal(row.get("error") is None, True)
        errors.equal(list(size), row["resized"])
        errors.equal([size[1] // 8, size[0] // 8], row["latent_hw"])
        errors.equal([size[1] // 16, size[0] // 16], row["tokens_hw"])
        errors.equal(latent_tokens(size[1] // 8, size[0] // 8), row["image_seq_len"])
        errors.equal(output_size(tuple(row["latent_hw"]), (row["width"], row["height"])), row["output_size"])
        if row.get("mllm_error") is not None:
            try:
                vision_sizes(*size)
                errors.max = max(errors.max, MISMATCH)
            except Step1XError:
                pass
        else:
            vision(size, row["mllm_first_resize"], row["mllm_second_resize"], row["grid_thw"], row["image_tokens"])
    black = table["text_to_image_black_1024"]
    vision((BLACK_PICTURE, BLACK_PICTURE), black["first"], black["second"], black["grid_thw"], black["image_tokens"])


def check_tokenization(table: dict, errors: Errors) -> None:
    tokenizer = Step1XTokenizer()
    for row in table["rows"]:
        before, after = prompt_ids(row["prompt"] or "", tokenizer.token_ids)
        if row.get("reference_error") is not None:
            # The official code fails here; this pack must not.
            errors.equal(after.count(151655), 0)
            continue
        grid = row["grid_thw"][1] // 2, row["grid_thw"][2] // 2
        _, second = vision_sizes(*row["image_size"])
        errors.equal((second[1] // 28, second[0] // 28), grid)
        ids = [*before, *[151655] * row["image_tokens"], *after]
        errors.equal(ids, row["token_ids"])
        mask = attention_mask(torch.tensor(ids))
        errors.equal((mask == 0).nonzero().flatten().tolist(), row["attention_mask_zero_positions"])
        cond, kept = layout_states(torch.ones(1, len(ids), 4))
        errors.equal(int(kept.sum()), row["kept_length"])
        errors.equal(list(cond.shape), [1, table["max_length"], 4])
        positions = mrope_positions(mask, len(before), grid)
        end = row["mrope"]["vision_end_index"]
        errors.equal(positions[:, end:].tolist(), row["mrope"]["from_vision_end"])
        errors.equal(positions[:, len(before)].tolist(), row["mrope"]["first_image_token"])
        errors.equal(positions[:, end - 1].tolist(), row["mrope"]["last_image_token"])


def check_lora(golden: Golden, errors: Errors) -> None:
    """The host's LoRA machinery on the pack's MODEL."""
    model = golden_model(golden)
    key_map = lora_keys(model)
    for name, shape in golden.config["all_trainable_lora_names"].items():
        errors.equal(name in key_map, True)
        if name in key_map:
            key = key_map[name].removeprefix("diffusion_model.")
            expected = pad_weight(key, torch.empty(shape, device="meta"))
            errors.equal(list(comfy.utils.get_attr(model.model, key_map[name]).shape), list(expected.shape))
    for strength in golden.config["multipliers"]:
        patched = apply_lora(model, golden.inputs, strength)
        errors.equal(len(patched.patches), len(golden.config["changed_keys"]))
        for key in golden.config["changed_keys"]:
            name = f"diffusion_model.{key}"
            merged = comfy.lora.calculate_weight(patched.patches[name], golden.weights[key].clone(), name)
            errors.tensor(merged, golden.outputs[f"merged.{strength}.{key}"])


def check_keymap(golden: Golden, errors: Errors) -> None:
    source = {k[len("diffusers."):]: v for k, v in golden.inputs.items()}
    expected = {k[len("original."):]: v for k, v in golden.outputs.items()}
    converted = diffusers_to_original(source)
    errors.equal(sorted(converted), sorted(expected))
    for key in expected.keys() & converted.keys():
        errors.equal(torch.equal(converted[key], expected[key]), True)


def check_teacache(golden: Golden, errors: Errors) -> None:
    config = golden.config
    for threshold in config["thresholds"]:
        model = apply_teacache(set_main_limiter(golden_model(golden), config), threshold)
        cache = model.model_options["transformer_options"]["patches"]["post_input"][0].__self__
        assert isinstance(cache, TeaCache)
        ran, accumulated = [], []

        def after_step():
            (state,) = cache.states.values()
            ran.append(float(state.ran))
            accumulated.append(state.accumulated)

        latents, _ = run_loop(golden, model, config["cfg_guidance"], config["num_steps"], after_step=after_step)
        errors.equal(ran, golden.outputs[f"thr_{threshold}.blocks_ran"].tolist())
        errors.tensor(torch.tensor(accumulated), golden.outputs[f"thr_{threshold}.accumulated"])
        errors.tensor(pack(model.model.diffusion_model, latents[-1]), golden.outputs[f"thr_{threshold}.final_latents"])
        errors.equal(cache.states, {})


def check_time_embedding(golden: Golden, errors: Errors) -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        t = golden.inputs["t"].to(dtype)
        scaled = scale_time(t)
        errors.tensor(scaled, golden.outputs[f"connector_t.{name}"])
        features, expected = time_features(scaled), golden.outputs[f"connector_raw.{name}"]
        errors.waves(features, expected)
        # Rounded values are compared with the same file's and our own unrounded ones: one last bit of exp may carry a value across to the next.
        errors.equal(expected.to(dtype).float(), golden.outputs[f"dit.{name}"])
        errors.equal(timestep_embedding(t, 256), features.to(dtype))
        for weights, stored in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
            embedder = TimestepEmbedder(8, dtype=stored, operations=disable_weight_init)
            errors.equal(expected.to(stored).float(), golden.outputs[f"connector_{weights}_weights.{name}"])
            errors.equal(embedder.features(scaled).float(), features.to(stored).float())


CHECKS = {
    "cfg.safetensors": check_cfg,
    "connector_v1.0.safetensors": check_connector,
    "connector_v1.1.safetensors": check_connector,
    "denoise_loop_v1.0.safetensors": check_denoise_loop,
    "denoise_loop_v1.1.safetensors": check_denoise_loop,
    "dit_forward_v1.0.safetensors": check_dit_forward,
    "dit_forward_v1.1.safetensors": check_dit_forward,
    "ids.safetensors": check_ids,
    "keymap.safetensors": check_keymap,
    "lora.safetensors": check_lora,
    "resize.json": check_resize,
    "schedule.json": check_schedule,
    "teacache.safetensors": check_teacache,
    "time_embedding.safetensors": check_time_embedding,
    "tokenization.json": check_tokenization,
    "vae.safetensors": check_vae,
}
