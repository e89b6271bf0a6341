"""Norm-limited classifier-free guidance (docs/model.md, Guidance)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..versions import GUIDANCE_NORM_POWER, GUIDANCE_TRUNCATE


def norm_divisor(norm: Tensor, power: float = GUIDANCE_NORM_POWER) -> Tensor:
    """Return the divisor for a guidance difference of this norm: norm**power above 1, else 1."""
    return norm.clamp(min=1.0) ** power


def patch_norm(difference: Tensor) -> Tensor:
    """Return the L2 norm of [B, C, H, W] over the channels of each 2x2 patch (one transformer token) as [B, 1, H, W].

    An odd side ends in half a patch, as with the transformer's padding.
    """
    height, width = difference.shape[-2:]
    energy = difference.float().square().sum(dim=1, keepdim=True)
    energy = torch.nn.functional.pad(energy, (0, width % 2, 0, height % 2))
    energy = torch.nn.functional.avg_pool2d(energy, 2, divisor_override=1)
    norm = energy.sqrt().repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    return norm[..., :height, :width]


@dataclass(frozen=True)
class NormLimiter:
    """Pre-CFG hook that divides the guidance difference of each token by norm**power while sigma is above `truncate`.

    It moves the conditional prediction to `uncond + (cond - uncond) / divisor` and leaves the rest to the host's CFG.
    That equals the official formula, works together with other hooks and leaves the CFG-function slot free.
    """

    truncate: float = GUIDANCE_TRUNCATE
    power: float = GUIDANCE_NORM_POWER

    def active(self, sigma: Tensor) -> Tensor:
        """Return where sigma is above `truncate`.

        Compared in float32, so that a sigma equal to the threshold is not above it. `full` writes on the device;
        copying a number there would wait for the whole previous step.
        """
        return sigma > torch.full((), self.truncate, dtype=torch.float32, device=sigma.device)

    def divisor(self, difference: Tensor, sigma: Tensor) -> Tensor:
        """Return what the guidance difference of velocities [B, C, H, W] is divided by: [B, 1, H, W]. sigma: [B or 1,
        1,
        1, 1]."""
        return torch.where(self.active(sigma), norm_divisor(patch_norm(difference), self.power), 1.0)

    def __call__(self, args: dict) -> list[Tensor]:
        """Return the limited predictions. args: the host's pre-CFG arguments; `conds_out` holds denoised latents [B, C,
        H, W]."""
        out = list(args["conds_out"])
        if len(args["conds"]) < 2 or args["conds"][1] is None:
            return out
        cond, uncond = out[:2]
        sigma = args["sigma"].reshape(-1, *[1] * (cond.ndim - 1))
        # The norm is defined on velocities; denoised = x - sigma * velocity.
        out[0] = uncond + (cond - uncond) / self.divisor((cond - uncond) / sigma, sigma)
        return out
