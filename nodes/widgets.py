"""What the host checks in a widget and nowhere else: it lets NaN pass, and whatever another node hands over."""

import numbers

from comfy_api.latest import io

from ..step1x_core.errors import Step1XError


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
        if entry.id in values and not fits(entry, values[entry.id]):
            raise Step1XError(f"The input '{entry.id}' brings {str(values[entry.id])[:60]!r}, but it takes {wanted(entry)}. Correct it, or the node that it comes from.")


def steps_input() -> io.Int.Input:
    return io.Int.Input("steps", default=0, min=0, max=200,
                        tooltip="0 uses the version's default: 28, or 50 for v1.2. Any other value is the number of denoising steps.")


def cfg_input() -> io.Float.Input:
    return io.Float.Input("cfg", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                          tooltip="0 uses the version's default: 6, or 4 for v1.2-preview. Higher values follow the instruction more strictly; 1 disables guidance.")
