"""LoRA files by the official rules (spec v1.md f.1)."""

from torch import Tensor

ALPHA = ".alpha"


def official_alphas(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give modules whose stored alpha is 0 an alpha equal to their rank: the official merge reads 0 as unset, the host as "no effect"."""
    out = dict(lora)
    for key, alpha in lora.items():
        down = key.removesuffix(ALPHA) + ".lora_down.weight"
        if key.endswith(ALPHA) and alpha.item() == 0 and down in lora:
            out[key] = alpha.new_tensor(lora[down].shape[0])
    return out
