"""Tensor names of checkpoints: converts the diffusers layout to the original one (docs/model.md, Diffusers names)."""

import re

import torch
from torch import Tensor

# Names that differ from those of FLUX in diffusers.
EMBEDDERS = {
    "time_embed.in_layer": "time_in.in_layer",
    "time_embed.out_layer": "time_in.out_layer",
    "vec_embed.in_layer": "vector_in.in_layer",
    "vec_embed.out_layer": "vector_in.out_layer",
}

_PLAIN = {
    **EMBEDDERS,
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
}

_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}

_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}

_SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
}

_SINGLE_NORMS = {
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}

# Fused matrices of the original layout and the matrices they are stacked from.
_DOUBLE_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE_FUSED = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}

_FINAL_MODULATION = "norm_out.linear"


def diffusers_modules(module: str) -> tuple[str, ...]:
    """Return the diffusers name of a linear layer of the original layout; several, in order, if the original fuses
    matrices. A name that both share is returned as it is."""
    match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
    if match is None:
        renamed = {ours: theirs for theirs, ours in _PLAIN.items()} | {"final_layer.adaLN_modulation.1": _FINAL_MODULATION}
        return (renamed.get(module, module),)
    kind, number, name = match.groups()
    single = kind == "single"
    plain = {ours: (theirs,) for theirs, ours in (_SINGLE if single else _DOUBLE).items()}
    names = (plain | (_SINGLE_FUSED if single else _DOUBLE_FUSED))[name]
    return tuple(f"{'single_' if single else ''}transformer_blocks.{number}.{theirs}" for theirs in names)


def is_diffusers_layout(keys) -> bool:
    return any(k.startswith("transformer_blocks.") for k in keys)


def swap_halves(tensor: Tensor) -> Tensor:
    """Swap the halves of the final modulation: diffusers stores (scale, shift), the original (shift, scale)."""
    scale, shift = tensor.chunk(2, dim=0)
    return torch.cat((shift, scale), dim=0)


def diffusers_to_original(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a transformer state dict from the diffusers layout. Consumes `state_dict`; unknown keys keep their
    names."""
    out = {}

    def fuse(block, target, sources):
        for kind in ("weight", "bias"):
            keys = [f"{block}.{source}.{kind}" for source in sources]
            if all(k in state_dict for k in keys):
                out[f"{target}.{kind}"] = torch.cat([state_dict.pop(k) for k in keys], dim=0)

    blocks = sorted({m.group(0) for k in state_dict if (m := re.match(r"(single_)?transformer_blocks\.\d+", k))})
    for block in blocks:
        single = block.startswith("single_")
        target = block.replace("single_transformer_blocks", "single_blocks").replace(
            "transformer_blocks", "double_blocks"
        )
        for fused, sources in (_SINGLE_FUSED if single else _DOUBLE_FUSED).items():
            fuse(block, f"{target}.{fused}", sources)
        for source, name in (_SINGLE if single else _DOUBLE).items():
            for kind in ("weight", "bias"):
                if f"{block}.{source}.{kind}" in state_dict:
                    out[f"{target}.{name}.{kind}"] = state_dict.pop(f"{block}.{source}.{kind}")
        for source, name in (_SINGLE_NORMS if single else _DOUBLE_NORMS).items():
            if f"{block}.{source}.weight" in state_dict:
                out[f"{target}.{name}.scale"] = state_dict.pop(f"{block}.{source}.weight")

    for key in list(state_dict):
        module, _, kind = key.rpartition(".")
        tensor = state_dict.pop(key)
        if module == _FINAL_MODULATION:
            out[f"final_layer.adaLN_modulation.1.{kind}"] = swap_halves(tensor)
        else:
            out[f"{_PLAIN.get(module, module)}.{kind}"] = tensor
    return out
