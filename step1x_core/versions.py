"""The model versions and what differs between them, and the constants that all share."""

from dataclasses import dataclass

# Sampling defaults of v1.0 and v1.1 (official inference code); those of every version are in `VERSIONS`.
DEFAULT_STEPS = 28
DEFAULT_CFG = 6.0

# Norm-limited guidance (official inference code, spec v1.md e.4).
GUIDANCE_TRUNCATE = 0.93
GUIDANCE_NORM_POWER = 0.4
# v1.2 compares the same 0.93 with times that run to 1000: its guidance is limited at every step (spec v12.md e).
GUIDANCE_TRUNCATE_V12 = GUIDANCE_TRUNCATE / 1000

# Connector time input is 0..1 and is scaled like the transformer's (spec v1.md b.1).
TIME_FACTOR = 1000.0

# The head width of the transformer and of the connector in every published checkpoint.
HEAD_DIM = 128


@dataclass(frozen=True)
class Version:
    """What differs between model versions.

    reference_offset: (t, y, x) added to the position ids of the reference picture's tokens.
    layout: how the instruction is laid out for the language model, "v1.1" (with v1.0) or "v1.2" (with its preview).
    steps, cfg: defaults of sampling.
    guidance_truncate: noise level above which guidance is norm limited.
    uncond_at_cfg1: whether the limited guidance still runs the unconditional pass at CFG 1.
    """

    reference_offset: tuple[int, int, int]
    layout: str = "v1.1"
    steps: int = DEFAULT_STEPS
    cfg: float = DEFAULT_CFG
    guidance_truncate: float = GUIDANCE_TRUNCATE
    uncond_at_cfg1: bool = True


VERSIONS: dict[str, Version] = {
    # The reference shares the target's positions; the network tells them apart by content.
    "v1.0": Version((0, 0, 0)),
    # The official position table starts from ones on all three axes (spec v1.md a.4).
    "v1.1": Version((1, 1, 1)),
    # One network; whether it has the text-token mapping is read off the weights (spec v12.md a.4).
    "v1.2-preview": Version((1, 0, 0), "v1.2", 28, 4.0, GUIDANCE_TRUNCATE_V12, uncond_at_cfg1=False),
    "v1.2": Version((1, 0, 0), "v1.2", 50, 6.0, GUIDANCE_TRUNCATE_V12, uncond_at_cfg1=False),
}


def describe_settings(version: str, steps: int, cfg: float | None = None) -> str:
    """Steps and CFG that sampling uses, in words: 0 stands for the default of this version, None leaves CFG out."""
    defaults, origin = VERSIONS[version], f"of {version}"
    count = f"{steps or defaults.steps} step{'s' if (steps or defaults.steps) != 1 else ''}"
    if not steps and cfg == 0:
        return f"{count}, CFG {defaults.cfg:g} (defaults {origin})"
    parts = [count if steps else f"{count} (default {origin})"]
    if cfg is not None:
        parts.append(f"CFG {cfg:g}" if cfg else f"CFG {defaults.cfg:g} (default {origin})")
    return ", ".join(parts)
