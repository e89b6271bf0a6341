"""What the host checks in a widget and nowhere else: it lets NaN pass, and whatever another node hands over."""

import numbers

from comfy_api.latest import io

from ..step1x_core.errors import Step1XError

# Of an optional input without a wire. A loader that finds no text encoder gives None, which must not pass for it.
NOT_CONNECTED = object()


def fits(entry: io.Input, value) -> bool:
    if isinstance(entry, io.Boolean.Input):
        # Other packs hand over 0 and 1; a text is true whatever it says.
        return isinstance(value, numbers.Integral) and value in (0, 1)
    if isinstance(value, bool) and not isinstance(entry, io.Combo.Input):
        return False
    if isinstance(entry, io.Int.Input):
        return isinstance(value, numbers.Integral) and entry.min <= value <= entry.max
    if isinstance(entry, io.Float.Input):
        return isinstance(value, numbers.Real) and entry.min <= value <= entry.max
    if isinstance(entry, io.Combo.Input):
        return value in entry.options
    return isinstance(value, str)


def wanted(entry: io.Input) -> str:
    if isinstance(entry, io.Boolean.Input):
        return "true or false"
    if isinstance(entry, io.Int.Input):
        return f"a whole number from {entry.min} to {entry.max}"
    if isinstance(entry, io.Float.Input):
        return f"a number from {entry.min} to {entry.max}"
    return "one of the entries of its list" if isinstance(entry, io.Combo.Input) else "text"


def check_widgets(node: type[io.ComfyNode], **values) -> None:
    """Raise Step1XError for values that the node's widgets do not offer.

    values: by the names of the inputs, which are numbers, texts, switches and lists of choices.
    """
    for entry in node.define_schema().inputs:
        if entry.id in values:
            check_widget(entry, values[entry.id], entry.id)


def check_widget(entry: io.Input, value, name: str) -> None:
    """name: the input's, below that of the choice that opens it."""
    if isinstance(entry, io.DynamicCombo.Input):
        check_choice(entry, value, name)
    elif not fits(entry, value):
        raise Step1XError(f"Input '{name}' is {str(value)[:60]!r}, but it takes {wanted(entry)}. "
                          "Correct it, or the node that it comes from.")


def check_choice(entry: io.DynamicCombo.Input, value, name: str) -> None:
    """value: as the executor hands it over, {the choice's id: its key, and what the widgets hold that this key opens}.

    For a key that there is not, and for one from another node, it hands over nothing.
    """
    opened = {option.key: option.inputs for option in entry.options}
    key = value.get(entry.id) if isinstance(value, dict) else None
    if not isinstance(key, str) or key not in opened:
        raise Step1XError(f"The input '{name}' has none of its choices: {', '.join(opened)}. "
                          "Choose one in the node; another node cannot hand it over.")
    for nested in opened[key]:
        check_widget(nested, value.get(nested.id), f"{name}.{nested.id}")


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=200,
        tooltip="0 uses the default: that of a few-step LoRA, else the version's, which is 28, or 50 for v1.2. "
        "Any other value is the number of denoising steps.",
    )


def cfg_input() -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="0 uses the default: that of a few-step LoRA, else the version's, which is 6, 4 for "
        "v1.2-preview and 3 for RealRestorer. Higher values follow the instruction more strictly; 1 disables guidance.",
    )


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input(
        "seed", default=42, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip
    )


def negative_prompt_input() -> io.String.Input:
    return io.String.Input(
        "negative_prompt",
        multiline=True,
        dynamic_prompts=True,
        default="",
        advanced=True,
        tooltip="What guidance steers away from. The model was trained with an empty one for edits.",
    )


def size_level_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("size_level", default=1024, min=64, max=2048, step=16, tooltip=tooltip)
