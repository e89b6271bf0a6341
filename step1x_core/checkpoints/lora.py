"""LoRA files: the official rule for alpha, and the layer names of other trainers (docs/model.md, LoRA)."""

from torch import Tensor

ALPHA = ".alpha"

# DiffSynth's names, a for the image and b for the text. It fuses matrices as the original layout does.
_DIFFSYNTH_DOUBLE = {
    "norm1_a.linear": "img_mod.lin",
    "norm1_b.linear": "txt_mod.lin",
    "attn.a_to_qkv": "img_attn.qkv",
    "attn.b_to_qkv": "txt_attn.qkv",
    "attn.a_to_out": "img_attn.proj",
    "attn.b_to_out": "txt_attn.proj",
    "ff_a.0": "img_mlp.0",
    "ff_a.2": "img_mlp.2",
    "ff_b.0": "txt_mlp.0",
    "ff_b.2": "txt_mlp.2",
}
_DIFFSYNTH_SINGLE = {
    "norm.linear": "modulation.lin",
    "to_qkv_mlp": "linear1",
    "proj_out": "linear2",
}


def diffsynth_names(depth: int, depth_single: int) -> dict[str, str]:
    """Map the layer names of DiffSynth's transformer to the original names, for this number of double and single
    blocks."""
    double = {
        f"blocks.{i}.{theirs}": f"double_blocks.{i}.{ours}"
        for i in range(depth)
        for theirs, ours in _DIFFSYNTH_DOUBLE.items()
    }
    single = {
        f"single_blocks.{i}.{theirs}": f"single_blocks.{i}.{ours}"
        for i in range(depth_single)
        for theirs, ours in _DIFFSYNTH_SINGLE.items()
    }
    return double | single


def official_alphas(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Set an alpha of 0 to the rank of its module. The official merge reads 0 as unset, the host as "no effect".

    In forms other than plain LoRA the alpha is removed, which means the same.
    """
    out = dict(lora)
    for key, alpha in lora.items():
        if key.endswith(ALPHA) and alpha.item() == 0:
            down = key.removesuffix(ALPHA) + ".lora_down.weight"
            if down in lora:
                out[key] = alpha.new_tensor(lora[down].shape[0])
            else:
                out.pop(key)
    return out
