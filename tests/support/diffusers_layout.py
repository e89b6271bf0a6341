"""Checkpoints in the diffusers layout, for the loading tests."""

import json

from safetensors.torch import save_file

from step1x_core.checkpoints.keys import swap_halves


def to_diffusers(weights):
    """The inverse of the key conversion, written out for the test."""
    names = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in": "time_embed",
        "vector_in": "vec_embed",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
        "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
        "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
        "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
        "modulation.lin": "norm.linear",
        "linear2": "proj_out",
        "norm.query_norm.scale": "attn.norm_q.weight",
        "norm.key_norm.scale": "attn.norm_k.weight",
        "final_layer.linear": "proj_out",
    }
    out = {}
    for key, tensor in weights.items():
        target = key.replace("double_blocks.", "transformer_blocks.").replace("single_blocks.", "single_transformer_blocks.")
        if ".qkv." in key:
            parts = ("add_q_proj", "add_k_proj", "add_v_proj") if "txt_attn" in key else ("to_q", "to_k", "to_v")
            block, kind = target.split("img_attn.")[0].split("txt_attn.")[0], key.rsplit(".", 1)[1]
            for name, chunk in zip(parts, tensor.chunk(3)):
                out[f"{block}attn.{name}.{kind}"] = chunk.contiguous()
        elif ".linear1." in key:
            block, kind = target.split("linear1")[0], key.rsplit(".", 1)[1]
            h = tensor.shape[0] // 7
            for name, chunk in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), tensor.split([h, h, h, 4 * h])):
                out[f"{block}{name}.{kind}"] = chunk.contiguous()
        elif key.startswith("final_layer.adaLN"):
            out[f"norm_out.linear.{key.rsplit('.', 1)[1]}"] = swap_halves(tensor)
        elif key.startswith("connector."):
            out[key] = tensor
        else:
            for old in sorted(names, key=len, reverse=True):
                if old in target:
                    target = target.replace(old, names[old])
                    break
            out[target] = tensor
    return out


def diffusers_repository(path, weights, pipeline="Step1XEditPipeline", shards=3):
    folder = path / "transformer"
    folder.mkdir(parents=True)
    names, index = sorted(weights), {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({k: weights[k] for k in names[i::shards]}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names[i::shards], file))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"_class_name": "Step1XEditTransformer2DModel", "axes_dims_rope": [4, 14, 14]}))
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return path
