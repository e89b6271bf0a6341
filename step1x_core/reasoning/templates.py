"""The instruction texts of the language model's calls: plain UTF-8 files with named fields (docs/model.md, Calls).

A file `data/templates/<language>/<call>.<role>.txt` is replaced by a file of the same relative name in the user's
folder. A field is a name in braces, such as {instruction}. Braces around anything but a plain word are text, so JSON
needs no escaping.
"""

import re
from functools import cache
from pathlib import Path

from .. import languages
from ..errors import Step1XError

LANGUAGES = tuple(language.name for language in languages.LANGUAGES)

# The fields of each file. Each of them must appear, and no other.
FIELDS = {
    "rewrite.system": (),
    "rewrite.user": ("instruction",),
    "description.system": (),
    "description.user": ("instruction",),
    "consistency.system": (),
    "consistency.user": ("instruction", "description"),
    "reflection.system": (),
    "reflection.user": ("instruction", "score", "reason"),
    "edit_score.system": (),
    "edit_score.user": ("instruction",),
    "quality_score.system": (),
    "quality_score.user": (),
}

_FIELD = re.compile(r"\{(\w+)\}")
_PACK_FOLDER = Path(__file__).parent.parent / "data" / "templates"


def read_template(path: Path, name: str) -> str:
    """Read one template file, trimmed. Raises Step1XError if it cannot be read or its fields differ from those that
    `name` requires."""
    try:
        # Editors on Windows may write a byte order mark.
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise Step1XError(
            f"The template {path} cannot be read ({problem}). Save it as a UTF-8 text file, or remove it."
        ) from problem
    found, allowed = set(_FIELD.findall(text)), FIELDS[name]
    listed = ", ".join(f"{{{field}}}" for field in allowed) or "no fields at all"
    for problem, fields in (("lacks", set(allowed) - found), ("has the unknown field", found - set(allowed))):
        if fields:
            raise Step1XError(f"The template {path} {problem} {{{min(fields)}}}. Its fields must be exactly: {listed}.")
    return text


@cache
def packaged_template(language: str, name: str) -> str:
    return read_template(_PACK_FOLDER / language / f"{name}.txt", name)


def load_templates(language: str, overrides: Path | None = None) -> dict[str, str]:
    """Load all texts of a language by name ("rewrite.system"). overrides: a folder with files that replace the pack's.

    Everything is read and checked at once, so that a faulty file is found before the first image is made.

    Raises Step1XError for a folder that does not exist and for a faulty file.
    """
    if overrides is not None and not overrides.is_dir():
        raise Step1XError(
            f"The template folder {overrides} does not exist. Correct the path, or leave the input empty."
        )
    texts = {}
    for name in FIELDS:
        own = overrides / language / f"{name}.txt" if overrides is not None else None
        texts[name] = read_template(own, name) if own and own.exists() else packaged_template(language, name)
    return texts


def fill(template: str, values: dict[str, str]) -> str:
    """Replace the fields with their values. Braces in a value are plain text."""
    return _FIELD.sub(lambda field: values[field[1]], template)
