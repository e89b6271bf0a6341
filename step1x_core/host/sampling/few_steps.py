"""Few-step LoRAs: what the defaults of a model resolve to. The settings are attached to the model's patcher, which
carries them to its clones."""

import logging
import math
from pathlib import Path

from safetensors import safe_open

from ...errors import Step1XError
from ...sampling.few_steps import FewSteps, counted, few_steps_of
from ...versions import VERSIONS, Version
from ..status import show_status

log = logging.getLogger(__name__)

ATTACHMENT = "step1x_few_steps"


def model_version(model) -> Version:
    return VERSIONS[model.model.diffusion_model.version]


def read_few_steps(path) -> FewSteps | None:
    """Return the few-step settings in an intact LoRA file's metadata, None for other LoRAs.

    Raises Step1XError for entries that cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        return few_steps_of(file.metadata(), Path(path).name)


def few_steps(model) -> FewSteps | None:
    """Return the settings of the few-step LoRA that was applied to this model, if any."""
    return model.get_attachment(ATTACHMENT)


def version_defaults(model, steps: int, cfg: float) -> tuple[int, float]:
    """Replace steps and CFG of 0 by the defaults: those of a few-step LoRA, else of the model's version."""
    defaults = few_steps(model) or model_version(model)
    return steps or defaults.steps, cfg or defaults.cfg


def reads_negative(model, cfg: float) -> bool:
    """Return whether sampling this model at this CFG runs the negative prompt. 0 is the default CFG."""
    cfg = version_defaults(model, 0, cfg)[1]
    return not math.isclose(cfg, 1.0) or bool(model.model_options.get("disable_cfg1_optimization"))


def check_one_lora(model, settings: FewSteps) -> None:
    """Raise Step1XError if the model already has a few-step LoRA with other settings: its sampling can follow only
    one."""
    other = few_steps(model)
    if other is not None and other != settings:
        raise Step1XError(
            f"This LoRA was distilled for {settings.describe()}, but another one on the model for {other.describe()}; "
            "one sampling cannot follow both. Remove one of the two, or set its strength to 0."
        )


def attach(model, settings: FewSteps) -> None:
    """Make these the defaults of a model, in place, and show them on the running node.

    Raises Step1XError as `check_one_lora` does.
    """
    check_one_lora(model, settings)
    version, taught = model.model.diffusion_model.version, settings.teacher.get("version")
    if taught is not None and taught != version:
        log.warning(
            "This few-step LoRA was distilled from Step1X-Edit %s, but the model is %s; expect poor edits.",
            taught, version,
        )
    model.set_attachments(ATTACHMENT, settings)
    log.info("This is a few-step LoRA: %s", settings.describe())
    show_status(settings.describe())


def refuse_few_steps(model, node: str) -> None:
    """Raise Step1XError if this model has a few-step LoRA; `node` skips steps that hardly change anything, of which
    there are none."""
    settings = few_steps(model)
    if settings is not None:
        raise Step1XError(
            f"'{node}' cannot be combined with a few-step LoRA ({counted(settings.steps, settings.cfg)}): every step "
            "changes too much to be skipped. Set the mode of 'Step1X-Edit Speed' to 'custom: nothing skipped' or "
            "'exact', or remove the LoRA."
        )
