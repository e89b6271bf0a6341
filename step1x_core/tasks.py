"""The kinds of edits, named as in GEdit-Bench; training pairs are sorted by them, too."""

TASK_TYPES = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)


def ordered_types(items: list) -> list[str]:
    """Return the task types of these items, the official ones first and in their order."""
    found = dict.fromkeys(item.task_type for item in items)
    return [name for name in TASK_TYPES if name in found] + [name for name in found if name not in TASK_TYPES]
