"""The model versions, how they differ, and the constants they share."""

from dataclasses import dataclass

# Sampling defaults of v1.0 and v1.1 (official inference code); those of every version are in `VERSIONS`.
DEFAULT_STEPS = 28
DEFAULT_CFG = 6.0

# Norm-limited guidance (docs/model.md, Guidance).
GUIDANCE_TRUNCATE = 0.93
GUIDANCE_NORM_POWER = 0.4
# v1.2 compares the same 0.93 with times that run to 1000: its guidance is limited at every step
# (docs/model.md, v1.2 sampling).
GUIDANCE_TRUNCATE_V12 = GUIDANCE_TRUNCATE / 1000

# Connector time input is 0..1 and is scaled like the transformer's (docs/model.md, Connector).
TIME_FACTOR = 1000.0

# The head width of the transformer and of the connector in every published checkpoint.
HEAD_DIM = 128


@dataclass(frozen=True)
class PromptLayout:
    """How a prompt is laid out for the language model, and the settings of an edit that depend on it.

    prompts/layouts.py builds the sequences.

    name: as loaders, caches and latents store it.
    owners: the versions trained with it, as a sentence names them.
    text_positions: whether text tokens have positions of their own in the transformer. The conditioning then carries
    them, with the input embeddings.
    shows_original: whether the language model sees the original image instead of the one at working size.
    resizes_floats: whether the edited image is resized bilinearly as floats instead of with Lanczos as 8-bit values.
    truncates: whether the result is truncated to 8-bit values before it is resized, instead of rounded.
    """

    name: str
    owners: str
    text_positions: bool
    shows_original: bool
    resizes_floats: bool
    truncates: bool


LAYOUT_V11 = PromptLayout(
    "v1.1", "v1.0 or v1.1", text_positions=False, shows_original=False, resizes_floats=False, truncates=True
)
LAYOUT_V12 = PromptLayout(
    "v1.2", "v1.2", text_positions=True, shows_original=True, resizes_floats=True, truncates=False
)
LAYOUTS = {layout.name: layout for layout in (LAYOUT_V11, LAYOUT_V12)}


@dataclass(frozen=True)
class Version:
    """Settings that differ between model versions.

    reference_offset: (t, y, x) added to the position ids of the reference image's tokens.
    layout: how the prompt is laid out for the language model.
    steps, cfg: sampling defaults.
    guidance_truncate: noise level above which guidance is norm-limited.
    uncond_at_cfg1: whether limited guidance still runs the unconditional pass at CFG 1.
    coarse_time: whether the network gets the time as the official code passes it, rounded to bfloat16 over 0..1000.
    draws: whether the version was also trained for text to image.
    """

    reference_offset: tuple[int, int, int]
    layout: PromptLayout = LAYOUT_V11
    steps: int = DEFAULT_STEPS
    cfg: float = DEFAULT_CFG
    guidance_truncate: float = GUIDANCE_TRUNCATE
    uncond_at_cfg1: bool = True
    coarse_time: bool = False
    draws: bool = True


VERSIONS: dict[str, Version] = {
    # The reference shares the target's positions; the network tells them apart by content.
    "v1.0": Version((0, 0, 0), draws=False),
    # The official position table starts from ones on all three axes (docs/model.md, Sequence and position ids).
    "v1.1": Version((1, 1, 1)),
    # One network; whether it has the text-token mapping is read off the weights
    # (docs/model.md, Telling versions apart).
    "v1.2-preview": Version(
        (1, 0, 0), LAYOUT_V12, 28, 4.0, GUIDANCE_TRUNCATE_V12, uncond_at_cfg1=False, coarse_time=True
    ),
    "v1.2": Version((1, 0, 0), LAYOUT_V12, 50, 6.0, GUIDANCE_TRUNCATE_V12, uncond_at_cfg1=False, coarse_time=True),
    # A fine-tune of v1.1 that restores photographs (docs/model.md, Versions): the same network, another CFG.
    "RealRestorer": Version((1, 1, 1), cfg=3.0, draws=False),
}
# The version that a name identifies whatever else it contains: a fine-tune may also name the version it comes from.
FINE_TUNES = {"realrestorer": "RealRestorer"}


def describe_settings(version: str, steps: int, cfg: float | None = None, distilled=None) -> str:
    """Describe the steps and the CFG that sampling uses; 0 stands for the default, None leaves CFG out.

    distilled: steps and cfg of a few-step LoRA, whose defaults replace those of the version.
    """
    defaults = distilled or VERSIONS[version]
    origin = "of the few-step LoRA" if distilled else f"of {version}"
    count = f"{steps or defaults.steps} step{'s' if (steps or defaults.steps) != 1 else ''}"
    if not steps and cfg == 0:
        return f"{count}, CFG {defaults.cfg:g} (defaults {origin})"
    parts = [count if steps else f"{count} (default {origin})"]
    if cfg is not None:
        parts.append(f"CFG {cfg:g}" if cfg else f"CFG {defaults.cfg:g} (default {origin})")
    return ", ".join(parts)
