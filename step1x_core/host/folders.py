"""Model files and folders that the loaders offer, and the user's own instruction texts."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ..checkpoint import is_model_folder, is_safetensors
from ..config import Step1XError

FOLDER_DEPTH = 3
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def model_folders(root: Path, subfolder: str, depth: int = FOLDER_DEPTH) -> Iterator[Path]:
    """Hugging Face model folders and diffusers repositories with the model in `subfolder`, at most `depth` levels below `root`; none lies within another."""
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        if is_model_folder(folder) or (folder / subfolder).is_dir() and is_model_folder(folder / subfolder):
            yield folder
        elif depth > 1 and not (folder / "model_index.json").is_file():
            yield from model_folders(folder, subfolder, depth - 1)


def choices(folder_name: str, subfolder: str) -> dict[str, str]:
    """What a loader can offer, name -> path: safetensors files of one of the host's model folders, and Hugging Face folders.

    A folder is listed as `name/`; shards are not listed one by one. Diffusers repositories, whose model
    is in `subfolder`, are looked for in the host's `diffusers` folder, too.
    """
    found = {}
    for root in map(Path, (*folder_paths.get_folder_paths(folder_name), *folder_paths.get_folder_paths("diffusers"))):
        for folder in model_folders(root, subfolder):
            found[folder.relative_to(root).as_posix() + "/"] = str(folder)
    folders = {Path(path) for path in found.values()}
    for name in folder_paths.get_filename_list(folder_name):
        path = folder_paths.get_full_path(folder_name, name)
        if path is not None and is_safetensors(Path(name)) and not SHARD.search(name) and folders.isdisjoint(Path(path).parents):
            found[name] = path
    return found


def resolve(name: str, folder_name: str, subfolder: str) -> str:
    """Path of a name from `choices`; any other name is refused, so a workflow cannot reach outside the model folders."""
    found = choices(folder_name, subfolder)
    if name not in found:
        raise Step1XError(f"'{name}' is not in the {folder_name} folder (any more). Refresh the node list and choose the model again.")
    return found[name]


def template_folder() -> Path | None:
    """The folder with the user's own instruction texts (see templates.py), None where there is no such folder."""
    folder = Path(folder_paths.get_user_directory(), "step1x_edit", "templates")
    return folder if folder.is_dir() else None


def template_fingerprint() -> str:
    """Another text whenever a file in that folder changes: the host then asks again what was asked with the old one."""
    folder = template_folder()
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*.txt")) if folder else []:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
