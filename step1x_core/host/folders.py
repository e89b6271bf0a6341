"""Model files and folders that the loaders offer."""

from pathlib import Path

import folder_paths

from ..checkpoint import SAFETENSORS_SUFFIXES, is_model_folder
from ..config import Step1XError


def choices(folder_name: str, subfolder: str) -> dict[str, str]:
    """What a loader can offer, name -> path: safetensors files of one of the host's model folders, and Hugging Face folders.

    A folder is listed as `name/`; its shards are not listed one by one. Diffusers repositories, whose model
    is in `subfolder`, are looked for in the host's `diffusers` folder, too.
    """
    found = {}
    for root in (*folder_paths.get_folder_paths(folder_name), *folder_paths.get_folder_paths("diffusers")):
        for folder in sorted(Path(root).iterdir()) if Path(root).is_dir() else ():
            if folder.is_dir() and (is_model_folder(folder) or (folder / subfolder).is_dir() and is_model_folder(folder / subfolder)):
                found[folder.name + "/"] = str(folder)
    for name in folder_paths.get_filename_list(folder_name):
        path = folder_paths.get_full_path(folder_name, name)
        if path is not None and name.lower().endswith(SAFETENSORS_SUFFIXES) and Path(name).parts[0] + "/" not in found:
            found[name] = path
    return found


def resolve(name: str, folder_name: str, subfolder: str) -> str:
    """Path of a name from `choices`; any other name is refused, so a workflow cannot reach outside the model folders."""
    found = choices(folder_name, subfolder)
    if name not in found:
        raise Step1XError(f"'{name}' is not in the {folder_name} folder (any more). Refresh the node list and choose the model again.")
    return found[name]
