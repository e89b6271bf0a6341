"""The golden checks of v1.2's network, guidance and sampling, through the product's own code and the host's sampler."""

import json
import re
import tempfile
from pathlib import Path

import comfy.sample
import comfy.samplers
import torch
from golden_checks import READ_ALL, pack
from golden_files import Errors, Golden
from golden_shapes import pad_weight, patches_in_row, position_ids, row_of_patches, split_tokens, token_grid
from safetensors.torch import save_file

from step1x_core.checkpoints.detection import CONFIG_KEY, detect_config
from step1x_core.checkpoints.keys import diffusers_to_original
from step1x_core.host.checkpoints.loading import load_model, model_shapes
from step1x_core.host.network.transformer import official_time, position_bits
from step1x_core.host.sampling.sampler import flow_sigmas, set_norm_limiter
from step1x_core.network.connector import scale_time
from step1x_core.sampling.guidance import NormLimiter, norm_divisor
from step1x_core.sampling.schedule import latent_tokens, shift_mu
from step1x_core.versions import TIME_FACTOR, VERSIONS


def golden_model(golden: Golden):
    """The weights, in the diffusers layout, as a MODEL, through a checkpoint file and the pack's loader."""
    c = golden.config["config"]
    values = {"version": "v1.2" if golden.config["enable_text_token_mapping"] else "v1.2-preview", "axes_dim": c["axes_dims_rope"],
              "connector_heads": c["connector_heads_num"], "theta": golden.config.get("rope_theta", 10000)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.safetensors"
        save_file(
            {name: pad_weight(name, weight) for name, weight in golden.weights.items()},
            path,
            metadata={CONFIG_KEY: json.dumps(values)},
        )
        model = load_model(path)
        model.model.diffusion_model.to(torch.float32)
    return model


def rope_parts(network, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [L, head_dim] of positions [L, 3], each repeated for the two features of a pair."""
    matrices = network.pe_embedder(ids[None])[0, 0]
    return tuple(matrices[..., row, 0].repeat_interleave(2, dim=-1) for row in (0, 1))


def check_transformer(golden: Golden, errors: Errors) -> None:
    network = golden_model(golden).model.diffusion_model
    seen = {}

    def store(name):
        def hook(module, args, output):
            seen[name] = output.clone() if torch.is_tensor(output) else tuple(part.clone() for part in output)
        return hook

    for name, module in (
        ("connector", network.connector),
        ("txt_in", network.txt_in),
        ("time", network.time_in),
        ("vector", network.vector_in),
        ("final", network.final_layer),
        ("double", network.double_blocks[0]),
        ("single", network.single_blocks[0]),
    ):
        module.register_forward_hook(store(name))
    network.txt_in.register_forward_pre_hook(lambda module, args: seen.update(context_in=args[0].clone()))

    given, out = golden.inputs, golden.outputs
    rows, columns = golden.config["latent_tokens_hw"]
    count, channels = rows * columns, out["sample"].shape[-1]
    target, references = split_tokens(network, given["hidden_states"], given["img_ids"], (rows, columns))
    velocity = network(
        target,
        given["timestep"],
        given["encoder_hidden_states"],
        ref_latents=references,
        text_mask=given["prompt_embeds_mask"],
        text_ids=position_bits(given["txt_ids"][None]),
        text_embeds=given["text_embeddings"],
        quoted_mask=given["text_mask"],
        transformer_options=READ_ALL,
    )

    errors.equal(position_ids(network, target, references)[0].float(), given["img_ids"])
    errors.tensor(pack(network, velocity)[..., :channels], out["sample"][:, :count])
    errors.tensor(seen["final"][..., :channels], out["sample"])
    errors.tensor(seen["connector"][0], out["connector_hidden"])
    errors.tensor(seen["connector"][1], out["connector_global"])
    errors.tensor(seen["context_in"], out["context_in"])
    errors.tensor(seen["txt_in"], out["context_out"])
    errors.tensor(seen["time"] + seen["vector"], out["temb"])
    for found, name in zip(seen["double"], ("double0_img", "double0_txt"), strict=True):
        errors.tensor(found, out[name])
    text = given["txt_ids"].shape[0]
    errors.tensor(seen["single"][:, :text], out["single0_txt"])
    errors.tensor(seen["single"][:, text:], out["single0_img"])
    for found, name in zip(rope_parts(network, torch.cat((given["txt_ids"], given["img_ids"]))), ("rope_cos", "rope_sin"), strict=True):
        errors.tensor(found, out[name])


def check_denoise_loop(golden: Golden, errors: Errors) -> None:
    """The whole loop through the host's sampler, with conditionings of different lengths."""
    model = golden_model(Golden(golden.path.parent / golden.config["weights_file"]))
    network = model.model.diffusion_model
    given, out = golden.inputs, golden.outputs
    # The reference may be of another size than the target; what size shows in the table of its ids.
    noise, reference = (network.unpack(given[name], *(2 * side for side in token_grid(out[ids])))
                        for name, ids in (("noise_packed", "latent_ids"), ("reference_latents_packed", "reference_ids")))
    errors.equal(network.process_img(noise)[1][0].float(), out["latent_ids"])
    errors.equal(network.process_reference(reference, 0)[1][0].float(), out["reference_ids"])

    conds = []
    for side in ("cond", "uncond"):
        part = {name.removeprefix(f"{side}."): tensor for name, tensor in given.items() if name.startswith(f"{side}.")}
        conds.append(
            [
                [
                    part["embedding"],
                    {
                        "text_ids": part["txt_ids"][None],
                        "text_embeds": part["text_embeds"],
                        "text_mask": part["text_masks"],
                        "reference_latents": [model.model.process_latent_out(reference)],
                    },
                ]
            ]
        )
    model = set_norm_limiter(model, NormLimiter(golden.config["timesteps_truncate"] / TIME_FACTOR, golden.config["process_norm_power"]))
    sigmas = flow_sigmas(golden.config["steps"], noise)
    errors.tensor(sigmas, out["sigmas"])
    latents, velocities = [], []

    def callback(step, denoised, x, total):
        latents.append(x.clone())
        velocities.append((x - denoised) / sigmas[step])

    result = comfy.sample.sample_custom(
        model,
        noise,
        golden.config["true_cfg_scale"],
        comfy.samplers.sampler_object("euler"),
        sigmas,
        *conds,
        torch.zeros_like(noise),
        callback=callback,
        disable_pbar=True,
        seed=0,
    )
    latents = [*latents[1:], model.model.process_latent_in(result)]
    for step, (latent, velocity) in enumerate(zip(latents, velocities, strict=True)):
        errors.tensor(pack(network, velocity), out["guided_velocity"][step])
        errors.tensor(pack(network, latent), out["latents_per_step"][step])
    errors.tensor(pack(network, latents[-1]), out["final_latents_packed"])
    errors.tensor(latents[-1], out["final_latents_unpacked"])


def check_guidance(golden: Golden, errors: Errors) -> None:
    """The pack's hook and the host's CFG function on velocities."""
    for index, case in enumerate(golden.config["cases"]):
        sigma = torch.tensor([case["timestep"] / TIME_FACTOR])
        cond, uncond = (row_of_patches(golden.inputs[f"{index}.{side}"]) for side in ("cond", "uncond"))
        limiter = NormLimiter(case["timesteps_truncate"] / TIME_FACTOR, case["process_norm_power"])
        conds_out = limiter({"conds": [True, True], "conds_out": [-sigma * cond, -sigma * uncond], "sigma": sigma})
        guided = -comfy.samplers.cfg_function(None, *conds_out, case["true_cfg_scale"], torch.zeros_like(cond), sigma) / sigma
        expected = golden.outputs[f"{index}.guided"]
        errors.tensor(patches_in_row(guided, expected.shape[-1]), expected)
        errors.equal(limiter.truncate < sigma.item(), case["norm_limited"])
    for name, expected in golden.outputs.items():
        if name.startswith("process_diff_norm_"):
            errors.tensor(norm_divisor(golden.inputs["diff_norm"], float(name.rsplit("_", 1)[1])), expected)


def check_sigmas(golden: Golden, errors: Errors) -> None:
    for index, case in enumerate(golden.config["cases"]):
        latent = torch.zeros(1, 16, case["height"] // 8, case["width"] // 8)
        errors.equal(latent_tokens(*latent.shape[-2:]), case["image_seq_len"])
        errors.tensor(torch.tensor(shift_mu(case["image_seq_len"])), torch.tensor(case["mu"]))
        sigmas = flow_sigmas(case["steps"], latent)
        errors.tensor(sigmas, golden.outputs[f"{index}.sigmas"])
        errors.tensor(sigmas[:-1] * TIME_FACTOR, golden.outputs[f"{index}.timesteps"])
        # In bfloat16 the last digit of a sigma decides to which side a time rounds: exact, from the official times.
        times = official_time(golden.outputs[f"{index}.timesteps"] / TIME_FACTOR, torch.bfloat16)
        errors.equal(times.float(), golden.outputs[f"{index}.timestep_model_arg_bf16_as_f32"])
        errors.equal(scale_time(times).float(), golden.outputs[f"{index}.timestep_times_1000_bf16_as_f32"])


def check_conversion(golden: Golden, errors: Errors) -> None:
    source = {name.removeprefix("diffusers."): tensor for name, tensor in golden.outputs.items()}
    expected = {name.removeprefix("original."): tensor for name, tensor in golden.weights.items()}
    converted = diffusers_to_original(source)
    errors.equal(sorted(converted), sorted(expected))
    for name in expected.keys() & converted.keys():
        errors.equal(torch.equal(converted[name], expected[name]), True)


def check_full_size(table: dict, errors: Errors) -> None:
    """The published key list against the model class, with and without the text-token mapping."""
    state_dict = {}
    for pattern, entry in table["keys"].items():
        for index in range(entry["count"]):
            state_dict[re.sub(r"\{\w+\}", str(index), pattern)] = torch.empty(entry["shape"], device="meta")
    errors.equal(len(state_dict), table["n_keys"])
    plain = {name: tensor for name, tensor in state_dict.items() if not name.startswith("text_token_mapping")}
    for weights, count, version in (
        (state_dict, table["n_parameters"], "v1.2"),
        (plain, table["n_parameters_without_text_token_mapping"], "v1.1"),
    ):
        original = diffusers_to_original(dict(weights))
        config = detect_config(original)
        errors.equal(config.version, version)
        shapes = model_shapes(config)
        errors.equal({name.replace("_norm.scale", "_norm.weight"): tuple(tensor.shape) for name, tensor in original.items()}, shapes)
        errors.equal(sum(torch.Size(shape).numel() for shape in shapes.values()), count)
    defaults = table["default_config"]
    errors.equal(
        [
            config.hidden_size // config.num_heads,
            config.num_heads,
            config.depth,
            config.depth_single_blocks,
            config.axes_dim,
        ],
        [
            defaults["attention_head_dim"],
            defaults["num_attention_heads"],
            defaults["num_layers"],
            defaults["num_single_layers"],
            list(defaults["axes_dims_rope"]),
        ],
    )
    errors.equal(
        [
            config.connector_heads,
            config.connector_depth,
            config.connector_in_channels,
            config.connector_hidden_size,
            VERSIONS["v1.2"].reference_offset,
        ],
        [
            defaults["connector_heads_num"],
            defaults["connector_depth"],
            defaults["connector_in_channels"],
            defaults["connector_hidden_size"],
            (1, 0, 0),
        ],
    )


CHECKS = {
    "denoise_loop.safetensors": check_denoise_loop,
    "full_size_keys.json": check_full_size,
    "guidance.safetensors": check_guidance,
    "sigmas.safetensors": check_sigmas,
    "state_dict_conversion.safetensors": check_conversion,
    "transformer_final.safetensors": check_transformer,
    "transformer_preview.safetensors": check_transformer,
}
