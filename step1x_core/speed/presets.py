"""What the modes of 'Step1X-Edit Speed' stand for, and the sentence that says it. Needs no torch.

The numbers behind the presets are in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .region import RegionSettings

BALANCED, FAST, EXACT = "balanced", "fast", "exact"
ALL_STEPS, TEACACHE, REGION = "custom: nothing skipped", "custom: TeaCache", "custom: region"


@dataclass(frozen=True)
class SpeedSettings:
    """One way to save work.

    threshold: TeaCache's, or None for no TeaCache. region: settings of region denoising, or None. At most one of the
    two.
    fp8_attention: attention in e4m3. int8_attention: the host's, with queries and keys in int8. start, end: the guided part of the steps, 0 <= start <= end <= 1.
    """

    threshold: float | None = None
    region: RegionSettings | None = None
    fp8_attention: bool = False
    start: float = 0.0
    end: float = 1.0
    int8_attention: bool = False

    @property
    def guides_all(self) -> bool:
        return self.start == 0 and self.end == 1


PRESETS = {
    # On the miniature model no edit is lost at this threshold, nor at 0.5.
    BALANCED: SpeedSettings(threshold=0.3),
    # One of 60 is lost.
    FAST: SpeedSettings(threshold=0.3, fp8_attention=True, end=0.5),
    EXACT: SpeedSettings(),
}


def described(mode: str, settings: SpeedSettings, missing: str | None = None) -> str:
    """The line for the log. settings: what is applied; missing: why fp8 attention, which the mode asks for, is left
    out."""
    parts = []
    if settings.threshold is not None:
        parts.append(f"TeaCache {settings.threshold:g}")
    if settings.region is not None:
        parts.append(f"region denoising at similarity {settings.region.similarity:g}")
    if not settings.guides_all:
        first = f"from {100 * settings.start:.0f} " if settings.start else ""
        parts.append(f"guidance {first}to {100 * settings.end:.0f} % of the steps")
    if settings.fp8_attention:
        parts.append("fp8 attention")
    if settings.int8_attention:
        parts.append("int8 attention")
    line = f"Step1X-Edit Speed: {mode}: {', '.join(parts) or 'nothing is left out'}"
    return f"{line}; fp8 attention is not available here ({missing})" if missing else line
