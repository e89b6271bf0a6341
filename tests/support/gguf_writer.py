"""Writes tiny models as GGUF files with llama.cpp's own package and names. Only for tests that have `gguf`."""

import numpy as np
import torch

# Numbers of a matrix from which it takes too long to quantise here.
WORDS = 1_000_000
# What the converter of llama.cpp calls the vision tower's layers, with the number of the block in the name's middle.
VISION = {
    "norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "visual.merger.ln_q": "v.post_ln", "visual.merger.mlp.0": "mm.0",
    "visual.merger.mlp.2": "mm.2",
}  # fmt: skip


def language_tensors(gguf, weights: dict) -> dict:
    """Language model by llama.cpp's names, as gguf's own table has them."""
    layers = len({key.split(".")[2] for key in weights if key.startswith("model.layers.")})
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, layers)
    names = {key: table.get_name(key, try_suffixes=(".weight", ".bias")) for key in weights if "visual." not in key}
    assert all(names.values())
    return {name: weights[key] for key, name in names.items()}


def vision_tensors(weights: dict) -> dict:
    """The vision tower as the mmproj file has it: q, k and v apart, the patch embedding in two frames."""
    out = {}
    for key, tensor in weights.items():
        if not key.startswith("visual."):
            continue
        module, _, kind = key.rpartition(".")
        if module == "visual.patch_embed.proj":
            out |= {"v.patch_embd.weight": tensor[:, :, 0], "v.patch_embd.weight.1": tensor[:, :, 1]}
        elif module.startswith("visual.blocks."):
            _, _, number, layer = module.split(".", 3)
            if layer == "attn.qkv":
                out |= {f"v.blk.{number}.attn_{part}.{kind}": chunk for part, chunk in zip("qkv", tensor.chunk(3))}
            else:
                out[f"v.blk.{number}.{VISION[layer]}.{kind}"] = tensor
        else:
            out[f"{VISION[module]}.{kind}"] = tensor
    return out


def write(gguf, path, architecture: str, tensors: dict, kind: str, fields: dict) -> dict:
    """Write a file; matrices whose rows fit get the type `kind`, but for tables of words. Returns the values that the file stands for."""
    writer, stored = gguf.GGUFWriter(path, architecture), {}
    for name, value in fields.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(name, value)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        data = tensor.float().contiguous().numpy()
        if 1 < data.ndim and data.size < WORDS and data.shape[-1] % 32 == 0:
            packed = gguf.quants.quantize(data, quantised)
            writer.add_tensor(name, packed, raw_dtype=quantised)
            data = gguf.quants.dequantize(packed, quantised)
        else:
            data = data.astype(np.float16) if data.ndim > 1 else data
            writer.add_tensor(name, data)
        stored[name] = torch.from_numpy(np.ascontiguousarray(data, np.float32)).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def write_language_model(gguf, folder, weights: dict, config: dict, kind: str = "Q8_0"):
    """Model and mmproj file of a tiny Qwen2.5-VL; returns the model's path."""
    vision = config["vision_config"]
    path = folder / f"Qwen2.5-VL-tiny-{kind}.gguf"
    write(gguf, path, "qwen2vl", language_tensors(gguf, weights), kind, {
        "qwen2vl.attention.head_count": config["num_attention_heads"],
        "qwen2vl.rope.freq_base": config["rope_theta"],
        "qwen2vl.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen2vl.rope.dimension_sections": [*config["rope_scaling"]["mrope_section"], 0],
    })  # fmt: skip
    write(gguf, folder / "Qwen2.5-VL-tiny-mmproj-F16.gguf", "clip", vision_tensors(weights), "F16", {
        "clip.vision.attention.head_count": vision["num_heads"],
        "clip.vision.n_wa_pattern": vision["fullatt_block_indexes"][0] + 1,
    })  # fmt: skip
    return path
