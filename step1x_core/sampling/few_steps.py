"""What a few-step LoRA says about itself: the steps, CFG and schedule that it was distilled for, in its file's
metadata (docs/few_steps.md)."""

import json
import math
from dataclasses import dataclass, field

from ..errors import Step1XError

STEPS_KEY, CFG_KEY = "step1x_edit.steps", "step1x_edit.cfg"
SCHEDULE_KEY, TEACHER_KEY = "step1x_edit.schedule", "step1x_edit.teacher"
KEYS = (STEPS_KEY, CFG_KEY, SCHEDULE_KEY, TEACHER_KEY)
MAX_STEPS, MAX_CFG = 200, 100.0


@dataclass(frozen=True)
class FewSteps:
    """The settings that a LoRA was distilled for.

    schedule: sigmas from 1 to 0, one more than steps; None for the version's schedule at that many steps.
    teacher: what it imitates, {"version", "steps", "cfg"}; {} if unknown. Not part of a comparison.
    """

    steps: int
    cfg: float = 1.0
    schedule: tuple[float, ...] | None = None
    teacher: dict = field(default_factory=dict, compare=False)

    def metadata(self) -> dict[str, str]:
        """Return the entries of a safetensors file's metadata."""
        out = {STEPS_KEY: str(self.steps), CFG_KEY: f"{self.cfg:g}"}
        if self.schedule is not None:
            out[SCHEDULE_KEY] = ",".join(map(repr, self.schedule))
        return out | ({TEACHER_KEY: json.dumps(self.teacher)} if self.teacher else {})

    def describe(self) -> str:
        """Describe the settings, and whom they imitate, in a few words."""
        text = counted(self.steps, self.cfg)
        if self.schedule is not None:
            text += ", its own schedule"
        version, steps, cfg = (self.teacher.get(name) for name in ("version", "steps", "cfg"))
        teacher = ", ".join([str(version)] * (version is not None) + [f"{steps} steps"] * (steps is not None)
                            + [f"CFG {cfg}"] * (cfg is not None))
        return f"{text} (distilled from {teacher})" if teacher else text


def counted(steps: int, cfg: float) -> str:
    return f"{steps} step{'' if steps == 1 else 's'}, CFG {cfg:g}"


def number(text: str, kind: type):
    """Convert a text to a number; None if it is none, NaN or infinite."""
    try:
        value = kind(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def read_schedule(text: str) -> tuple[float, ...] | None:
    """Convert comma-separated sigmas to numbers; None unless they fall strictly from 1 to 0."""
    sigmas = tuple(number(part, float) for part in text.split(","))
    if None in sigmas or sigmas[0] != 1 or sigmas[-1] != 0:
        return None
    return sigmas if all(a > b for a, b in zip(sigmas, sigmas[1:])) else None


def read_teacher(text: str) -> dict | None:
    try:
        teacher = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return teacher if isinstance(teacher, dict) else None


def few_steps_of(metadata: dict[str, str] | None, name: str) -> FewSteps | None:
    """Return the few-step settings in a LoRA file's metadata; None for any other LoRA.

    name: the file's, for errors. Raises Step1XError for entries that cannot be read; the LoRA would sample with
    settings that it was not made for.
    """
    found = {key: metadata[key] for key in KEYS if key in (metadata or {})}
    if not found:
        return None

    def wrong(key: str, expected: str) -> Step1XError:
        return Step1XError(f"{name}: the metadata entry {key} is {str(found.get(key))[:60]!r}; expected {expected}. "
                           "Download the LoRA again, or ask its author.")

    steps, cfg = number(found.get(STEPS_KEY), int), number(found.get(CFG_KEY, "1"), float)
    if steps is None or not 1 <= steps <= MAX_STEPS:
        raise wrong(STEPS_KEY, f"a number of steps from 1 to {MAX_STEPS}")
    if cfg is None or not 0 < cfg <= MAX_CFG:
        raise wrong(CFG_KEY, f"a CFG above 0, at most {MAX_CFG:g}")
    schedule = read_schedule(found[SCHEDULE_KEY]) if SCHEDULE_KEY in found else None
    if SCHEDULE_KEY in found and (schedule is None or len(schedule) != steps + 1):
        raise wrong(SCHEDULE_KEY, f"{steps + 1} sigmas that fall from 1 to 0")
    teacher = read_teacher(found[TEACHER_KEY]) if TEACHER_KEY in found else {}
    if teacher is None:
        raise wrong(TEACHER_KEY, "a JSON object")
    return FewSteps(steps, cfg, schedule, teacher)
