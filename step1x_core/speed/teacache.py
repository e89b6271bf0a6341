"""TeaCache: skip the blocks of a model call if its input hardly changed (docs/model.md, TeaCache)."""

from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_THRESHOLD = 0.2

# FLUX's polynomial from the TeaCache authors, highest power first; the official Step1X-Edit code uses it unchanged.
COEFFICIENTS = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


def estimated_change(relative: float) -> float:
    """Return the predicted relative change of the blocks' output for a relative change of their input."""
    estimate = 0.0
    for coefficient in COEFFICIENTS:
        estimate = estimate * relative + coefficient
    return estimate


def first_block_norm(img: Tensor) -> Tensor:
    """Apply the image norm of the first double block: [B, N, C] in float32, without modulation, so it does not depend
    on the timestep."""
    return torch.nn.functional.layer_norm(img.float(), img.shape[-1:], eps=1e-6)


@dataclass
class TeaCacheState:
    """State of one stream of model calls in one sampling run. img: the embedded image tokens of the current call."""

    threshold: float
    accumulated: float = 0.0
    ran: bool = True
    img: Tensor | None = None
    previous: Tensor | None = None
    residual: Tensor | None = None

    def begin(self, img: Tensor, forced: bool) -> bool:
        """Decide whether the call with embedded image tokens img [B, N, C] must run the blocks; returns True if so.

        forced: whether this is the first or the last call of a run, which are never skipped.
        """
        current = first_block_norm(img)
        # With several GPUs, a prompt may move to another one.
        fits = (
            self.previous is not None
            and self.previous.shape == current.shape
            and self.previous.device == current.device
            and self.residual is not None
        )
        if forced or not fits:
            self.ran = True
        else:
            relative = ((current - self.previous).abs().mean() / self.previous.abs().mean()).item()
            self.accumulated += estimated_change(relative)
            self.ran = self.accumulated >= self.threshold
        if self.ran:
            self.accumulated = 0.0
        self.previous = current
        return self.ran
