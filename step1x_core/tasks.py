"""The kinds of edits, by the names of GEdit-Bench, which pairs are sorted by, too."""

TASK_TYPES = ("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change", "subject-add", "subject-remove",
              "subject-replace", "text_change", "tone_transfer")


def ordered_types(items: list) -> list[str]:
    """The task types that occur, the official ones first and in their order."""
    found = dict.fromkeys(item.task_type for item in items)
    return [name for name in TASK_TYPES if name in found] + [name for name in found if name not in TASK_TYPES]
