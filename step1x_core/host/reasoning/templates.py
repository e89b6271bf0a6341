"""Finds the user's own instruction texts for thinking and reflection."""

import hashlib
from pathlib import Path

import folder_paths


def template_folder() -> Path | None:
    """Return the folder with the user's own instruction texts (see templates.py), or None if there is none."""
    folder = Path(folder_paths.get_user_directory(), "step1x_edit", "templates")
    return folder if folder.is_dir() else None


def template_fingerprint() -> str:
    """Return a text that changes whenever a file in that folder changes, so that the host repeats questions asked with
    the old texts."""
    folder = template_folder()
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*.txt")) if folder else []:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
