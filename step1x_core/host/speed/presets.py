"""The modes of 'Step1X-Edit Speed' as model patches."""

import logging
from dataclasses import replace

from ...speed.presets import PRESETS, SpeedSettings, described
from ...speed.region import RegionSettings
from ..sampling.sampler import set_guidance_interval
from .fp8_attention import missing_for_fp8, set_fp8_attention
from .int8_attention import set_int8_attention
from .region import apply_region
from .teacache import apply_teacache

log = logging.getLogger(__name__)


def settings_of(choice: dict) -> SpeedSettings:
    """The settings behind a choice as the executor hands it over: {"mode": its key, and what its widgets hold}."""
    if choice["mode"] in PRESETS:
        return PRESETS[choice["mode"]]
    region = None
    if "similarity" in choice:
        region = RegionSettings(choice["similarity"], choice["warmup"], choice["refreshes"], choice["reuse"])
    fp8, int8 = (choice.get("attention") == name for name in ("fp8", "int8"))
    return SpeedSettings(choice.get("threshold"), region, fp8, choice["start_percent"], choice["end_percent"], int8)


def apply_speed(model, mode: str, settings: SpeedSettings):
    """A clone of a Step1X-Edit model with these settings, or the model itself where they leave nothing out.

    The log says what was chosen.
    What is set takes the place of an earlier setting of its kind; the others stay. A preset goes on without fp8
    attention where that cannot run. Raises Step1XError where fp8 or int8 attention is asked for by itself and cannot
    run, and if the guided part ends before it starts.
    """
    missing = missing_for_fp8(model.load_device) if settings.fp8_attention and mode in PRESETS else None
    if missing:
        settings = replace(settings, fp8_attention=False)
    if settings.threshold is not None:
        model = apply_teacache(model, settings.threshold)
    if settings.region is not None:
        model = apply_region(model, settings.region)
    if settings.fp8_attention:
        model = set_fp8_attention(model)
    if settings.int8_attention:
        model = set_int8_attention(model)
    if not settings.guides_all:
        model = set_guidance_interval(model, settings.start, settings.end)
    log.info(described(mode, settings, missing))
    return model
