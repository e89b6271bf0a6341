"""Writes miniature checkpoints with random weights and exactly the key layout of the published files.

The pictures they make are meaningless; they let the whole path run on a machine without the real weights.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

# The file names that the shipped workflows ask for.
V10_FILE = "step1x-edit-i1258.safetensors"
V11_FILE = "step1x-edit-v1p1-official.safetensors"
V12_FILE = "step1x-edit-v1p2.safetensors"
MLLM_FILE = "qwen_2.5_vl_7b.safetensors"
MLLM_FP8_FILE = "qwen_2.5_vl_7b_fp8_scaled.safetensors"
V12_FOLDER = "Step1X-Edit-v1p2"
RESTORER_FOLDER = "RealRestorer"
VAE_FILE = "ae.safetensors"
LORA_FILE = "step1x-edit-lora.safetensors"
FEW_STEP_LORA_FILE = "step1x-edit-lightning.safetensors"
UPSCALER_FILE = "RealESRGAN_x4plus.safetensors"

VOCABULARY = 152064
TURN_END_ID = 151645


@dataclass
class TransformerSize:
    hidden: int
    head_dim: int
    depth: int
    depth_single: int
    text: int
    connector: int
    connector_depth: int
    vector: int
    channels: int = 64
    mlp_ratio: float = 4


FULL_TRANSFORMER = TransformerSize(
    hidden=3072, head_dim=128, depth=19, depth_single=38, text=3584, connector=4096, connector_depth=2, vector=768
)
TINY_TRANSFORMER = TransformerSize(
    hidden=64, head_dim=32, depth=2, depth_single=2, text=64, connector=128, connector_depth=2, vector=32
)


def transformer_shapes(version: str, size: TransformerSize) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an original single file (docs/model.md, Key names)."""
    shapes = {}

    def linear(name, rows, columns):
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def norm(name, width):
        shapes[f"{name}.weight"] = (width,)
        shapes[f"{name}.bias"] = (width,)

    h, c, mlp = size.hidden, size.connector, int(size.hidden * size.mlp_ratio)
    linear("img_in", h, size.channels)
    linear("time_in.in_layer", h, 256)
    linear("time_in.out_layer", h, h)
    linear("vector_in.in_layer", h, size.vector)
    linear("vector_in.out_layer", h, h)
    linear("txt_in", h, c)
    for i in range(size.depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * h, h)
            linear(f"{block}_attn.qkv", 3 * h, h)
            shapes[f"{block}_attn.norm.query_norm.scale"] = (size.head_dim,)
            shapes[f"{block}_attn.norm.key_norm.scale"] = (size.head_dim,)
            linear(f"{block}_attn.proj", h, h)
            linear(f"{block}_mlp.0", mlp, h)
            linear(f"{block}_mlp.2", h, mlp)
    for i in range(size.depth_single):
        block = f"single_blocks.{i}"
        linear(f"{block}.linear1", 3 * h + mlp, h)
        linear(f"{block}.linear2", h, h + mlp)
        shapes[f"{block}.norm.query_norm.scale"] = (size.head_dim,)
        shapes[f"{block}.norm.key_norm.scale"] = (size.head_dim,)
        linear(f"{block}.modulation.lin", 3 * h, h)
    linear("final_layer.linear", size.channels, h)
    linear("final_layer.adaLN_modulation.1", 2 * h, h)

    if version == "v1.0":
        shapes["connector.scale_factor"] = (1,)
    linear("connector.S.input_embedder", c, size.text)
    linear("connector.S.t_embedder.mlp.0", c, 256)
    linear("connector.S.t_embedder.mlp.2", c, c)
    linear("connector.S.c_embedder.linear_1", c, size.text)
    linear("connector.S.c_embedder.linear_2", c, c)
    for i in range(size.connector_depth):
        block = f"connector.S.individual_token_refiner.blocks.{i}"
        norm(f"{block}.norm1", c)
        norm(f"{block}.norm2", c)
        linear(f"{block}.self_attn_qkv", 3 * c, c)
        linear(f"{block}.self_attn_proj", c, c)
        linear(f"{block}.mlp.fc1", 4 * c, c)
        linear(f"{block}.mlp.fc2", c, 4 * c)
        linear(f"{block}.adaLN_modulation.1", 2 * c, c)
    linear("connector.global_proj_out", size.vector, size.text)
    if version == "v1.2":
        linear("text_token_mapping", c, size.text)
    return shapes


# A Hugging Face config.json in miniature.
TINY_MLLM = {
    "hidden_size": TINY_TRANSFORMER.text,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "out_hidden_size": TINY_TRANSFORMER.text,
    },
}


def mllm_shapes(config: dict, lm_head: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2.5-VL file as ComfyUI and older transformers name them."""
    hidden, inter, vision = config["hidden_size"], config["intermediate_size"], config["vision_config"]
    head_dim = hidden // config["num_attention_heads"]
    kv = head_dim * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if lm_head:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    v, v_inter = vision["hidden_size"], vision["intermediate_size"]
    shapes["visual.patch_embed.proj.weight"] = (v, 3, 2, 14, 14)
    for i in range(vision["depth"]):
        block = f"visual.blocks.{i}"
        for name, rows, columns in (
            ("attn.qkv", 3 * v, v),
            ("attn.proj", v, v),
            ("mlp.gate_proj", v_inter, v),
            ("mlp.up_proj", v_inter, v),
            ("mlp.down_proj", v, v_inter),
        ):
            shapes[f"{block}.{name}.weight"] = (rows, columns)
            shapes[f"{block}.{name}.bias"] = (rows,)
        shapes[f"{block}.norm1.weight"] = (v,)
        shapes[f"{block}.norm2.weight"] = (v,)
    shapes["visual.merger.ln_q.weight"] = (v,)
    shapes["visual.merger.mlp.0.weight"] = (4 * v, 4 * v)
    shapes["visual.merger.mlp.0.bias"] = (4 * v,)
    shapes["visual.merger.mlp.2.weight"] = (hidden, 4 * v)
    shapes["visual.merger.mlp.2.bias"] = (hidden,)
    return shapes


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a 16-channel TAESD, which the stock VAE loader opens."""
    shapes = {"vae_scale": (), "vae_shift": ()}

    def conv(name, rows, columns, bias=True):
        shapes[f"{name}.weight"] = (rows, columns, 3, 3)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def blocks(prefix, indexes):
        for i in indexes:
            for layer in (0, 2, 4):
                conv(f"{prefix}.{i}.conv.{layer}", 64, 64)

    conv("taesd_encoder.0", 64, 3)
    for i in (2, 6, 10):
        conv(f"taesd_encoder.{i}", 64, 64, bias=False)
    blocks("taesd_encoder", (1, 3, 4, 5, 7, 8, 9, 11, 12, 13))
    conv("taesd_encoder.14", 16, 64)
    conv("taesd_decoder.1", 64, 16)
    for i in (7, 12, 17):
        conv(f"taesd_decoder.{i}", 64, 64, bias=False)
    blocks("taesd_decoder", (3, 4, 5, 8, 9, 10, 13, 14, 15, 18))
    conv("taesd_decoder.19", 3, 64)
    return shapes


def flux_vae_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the FLUX VAE, full size (docs/model.md, VAE)."""
    shapes = {}

    def conv(name, rows, columns, kernel=3):
        shapes[f"{name}.weight"] = (rows, columns, kernel, kernel)
        shapes[f"{name}.bias"] = (rows,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, rows, columns):
        norm(f"{name}.norm1", columns)
        conv(f"{name}.conv1", rows, columns)
        norm(f"{name}.norm2", rows)
        conv(f"{name}.conv2", rows, rows)
        if rows != columns:
            conv(f"{name}.nin_shortcut", rows, columns, 1)

    def middle(name, width):
        block(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for layer in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{layer}", width, width, 1)
        block(f"{name}.block_2", width, width)

    widths = (128, 256, 512, 512)
    conv("encoder.conv_in", widths[0], 3)
    for i, (previous, width) in enumerate(zip((widths[0], *widths), widths)):
        block(f"encoder.down.{i}.block.0", width, previous)
        block(f"encoder.down.{i}.block.1", width, width)
        if i < 3:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", 2 * 16, widths[-1])

    conv("decoder.conv_in", widths[-1], 16)
    middle("decoder.mid", widths[-1])
    for i, (previous, width) in enumerate(zip((*widths[1:], widths[-1]), widths)):
        for j in range(3):
            block(f"decoder.up.{i}.block.{j}", width, width if j else previous)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", 3, widths[0])
    return shapes


def pixel_repeater() -> dict[str, torch.Tensor]:
    """ESRGAN weights that repeat each pixel four times in both directions."""
    def identity(rows, columns):
        weight = torch.zeros(rows, columns, 3, 3)
        weight[range(3), range(3), 1, 1] = 1
        return weight

    weights = {"conv_first": identity(8, 3), "conv_body": torch.zeros(8, 8, 3, 3), "conv_last": identity(3, 8)}
    weights |= {name: identity(8, 8) for name in ("conv_up1", "conv_up2", "conv_hr")}
    weights |= {
        f"body.0.rdb{block}.conv{i + 1}": torch.zeros(32 if i < 4 else 8, 8 + 32 * i, 3, 3)
        for block in (1, 2, 3)
        for i in range(5)
    }
    return {f"{name}.weight": w for name, w in weights.items()} | {
        f"{name}.bias": torch.zeros(len(w)) for name, w in weights.items()
    }


def scaled_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ComfyUI stores it: matrices in fp8 with a scale each, the rest as it was."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, weight in weights.items():
        out[key] = weight
        if weight.ndim == 2:
            scale = weight.float().abs().max() / 448
            out |= {key: (weight / scale).to(torch.float8_e4m3fn), key.removesuffix("weight") + "scale_weight": scale}
    return out


def random_weights(
    shapes: dict[str, tuple[int, ...]], seed: int, dtype=torch.float32, device="cpu"
) -> dict[str, torch.Tensor]:
    """Weights that keep activations at about unit size: ones for norms, 1/sqrt(fan_in) for matrices, small biases."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device)
        if name == "vae_scale":
            weight = torch.ones(())
        elif name == "vae_shift":
            weight = torch.zeros(())
        elif name.endswith("scale_factor"):
            weight = torch.full(shape, -0.91)
        elif len(shape) == 1:
            is_norm = "norm" in name or "ln_q" in name
            weight = noise * 0.1 + (1.0 if is_norm and not name.endswith("bias") else 0.0)
        elif "embed_tokens" in name:
            weight = noise
        else:
            fan_in = torch.Size(shape[1:]).numel()
            weight = noise * fan_in**-0.5
        weights[name] = weight.to(dtype)
    return weights


def write_transformer(
    path: Path, version: str = "v1.1", size: TransformerSize = TINY_TRANSFORMER, seed: int = 1, dtype=torch.float32
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(transformer_shapes(version, size), seed, dtype), path)


def write_mllm(
    path: Path, config: dict = TINY_MLLM, seed: int = 2, dtype=torch.bfloat16, terse: bool = False, scaled: bool = False
) -> None:
    """terse: replies end after some ten tokens; else they babble on to the end of their budget. scaled: the language model's layers are in scaled fp8."""
    weights = random_weights(mllm_shapes(config), seed, dtype)
    if terse:
        weights["lm_head.weight"][TURN_END_ID] *= 10
    if scaled:
        weights |= scaled_fp8({key: weight for key, weight in weights.items() if key.startswith("model.layers.")})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"step1x_edit_config": json.dumps(config)})


def write_vae(path: Path, seed: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(vae_shapes(), seed), path)


def write_lora(path: Path, size: TransformerSize = TINY_TRANSFORMER, seed: int = 4, few_steps: int = 0) -> None:
    """A LoRA of rank 4 in kohya's layout for the fused attention layers. few_steps: what its metadata says it was distilled for, 0 nothing."""
    shapes = {}
    for i in range(size.depth):
        for stream in ("img", "txt"):
            name = f"lora_unet_double_blocks_{i}_{stream}_attn_qkv"
            shapes |= {f"{name}.lora_down.weight": (4, size.hidden), f"{name}.lora_up.weight": (3 * size.hidden, 4)}
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"step1x_edit.steps": str(few_steps), "step1x_edit.cfg": "1"} if few_steps else None
    save_file(random_weights(shapes, seed), path, metadata=settings)


def made_up_edit(version: str, size: int, lengths: tuple[int, int], width: int) -> tuple:
    """Both prompts' conditioning, of so many text tokens each, and the latent of an edit of size x size latent places, of random numbers. width: of the states."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, size, size, generator=generator)

    def prompt(length):
        if version in ("v1.0", "v1.1"):
            mask = (torch.arange(640) < length).long()[None]
            return torch.randn(1, 640, width, generator=generator) * mask[..., None], {"attention_mask": mask}
        states = torch.randn(1, length, width, generator=generator)
        return states, {
            "text_ids": torch.arange(length).neg()[None, :, None].expand(1, -1, 3).float(),
            "text_embeds": states,
            "text_mask": torch.zeros(1, length).long(),
        }

    return *([[states, {**extra, "reference_latents": [latent]}]] for states, extra in map(prompt, lengths)), {
        "samples": latent
    }


def write_upscaler(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(pixel_repeater(), path)


def write_all(models: Path, prefix: str = "", terse: bool = False) -> None:
    """All files the shipped workflows name, in ComfyUI's folder layout, with a prefix to their names; files that exist are kept. terse: see write_mllm."""
    for path, write in (
        (models / "diffusion_models" / (prefix + V10_FILE), lambda p: write_transformer(p, "v1.0")),
        (models / "diffusion_models" / (prefix + V11_FILE), lambda p: write_transformer(p, "v1.1")),
        (models / "diffusion_models" / (prefix + V12_FILE), lambda p: write_transformer(p, "v1.2")),
        (models / "text_encoders" / (prefix + MLLM_FILE), lambda p: write_mllm(p, terse=terse)),
        (models / "text_encoders" / (prefix + MLLM_FP8_FILE), lambda p: write_mllm(p, terse=terse, scaled=True)),
        (models / "vae" / (prefix + VAE_FILE), write_vae),
        (models / "loras" / (prefix + LORA_FILE), write_lora),
        (models / "loras" / (prefix + FEW_STEP_LORA_FILE), lambda p: write_lora(p, few_steps=4)),
        (models / "upscale_models" / (prefix + UPSCALER_FILE), write_upscaler),
    ):
        if not path.exists():
            partial = path.with_suffix(".part")
            write(partial)
            partial.replace(path)
    if not prefix:
        write_repository(models)
        write_restorer(models / "diffusers" / RESTORER_FOLDER)


def write_repository(models: Path) -> None:
    """The diffusers folder of v1.2 that the shipped workflows name, of the files beside it: the names of tensors need not be those of diffusers."""
    folder = models / "diffusers" / V12_FOLDER
    for source, part, name in (
        ("diffusion_models", "transformer", V12_FILE),
        ("text_encoders", "text_encoder", MLLM_FILE),
        ("vae", "vae", VAE_FILE),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text("{}", encoding="utf-8")
        if not (folder / part / name).exists():
            shutil.copy(models / source / name, folder / part / name)
    (folder / "model_index.json").write_text('{"_class_name": "Step1XEditPipelineV1P2"}', encoding="utf-8")


def write_restorer(folder: Path, shards: int = 2) -> None:
    """The repository of RealRestorer without text encoder and VAE: v1.1's tensors under `inner_model.`, in shards."""
    weights = random_weights(transformer_shapes("v1.1", TINY_TRANSFORMER), seed=6)
    part, index = folder / "transformer", {}
    part.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    for number in range(shards):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({f"inner_model.{name}": weights[name] for name in names[number::shards]}, part / file)
        index |= {f"inner_model.{name}": file for name in names[number::shards]}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    (part / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model_index.json").write_text('{"_class_name": "RealRestorerPipeline"}', encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="a ComfyUI models folder")
    write_all(parser.parse_args().models)
