"""The model files and folders that the loaders offer."""

import logging
import os
import re
import time
from pathlib import Path

import folder_paths

from ...checkpoints.files import is_model_folder, is_safetensors
from ...checkpoints.gguf_files import is_gguf, is_mmproj
from ...errors import Step1XError

log = logging.getLogger(__name__)

FOLDER_DEPTH = 3
# Folders of earlier packs in the models folder, by the host's folder whose kind of file they hold.
EARLIER_FOLDERS = {"diffusion_models": "Step1x-Edit", "text_encoders": "MLLM"}
# A folder read within this time of a change may change again with the same timestamp, because file systems have coarse
# clocks.
SETTLED_NS = 2_000_000_000
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")

# The pack's own miniature model, for a first try before anything is downloaded; the loaders list it last.
MINIATURE = "miniature/"
MINIATURE_WEIGHTS = Path(__file__).absolute().parents[3] / "miniature" / "weights"
MINIATURE_FILES = {
    "diffusion_models": "step1x-edit-demo.safetensors",
    "text_encoders": "qwen_2.5_vl_demo.safetensors",
    "vae": "ae_demo.safetensors",
}


# Scan results by folder and subfolder, with the timestamps of all folders that were read.
_scans: dict[tuple[Path, str], tuple[dict[Path, int], list[Path]]] = {}
_gguf_scans: dict[str, tuple[dict[str, int], list[tuple[str, str]]]] = {}


def folder_time(path: Path) -> int:
    """Return the modification time of a folder in ns, which changes when an entry is added or removed; -1 if there is
    no folder."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def model_folders(root: Path, subfolder: str) -> list[Path]:
    """Find Hugging Face model folders, and diffusers repositories with the model in `subfolder`, up to `FOLDER_DEPTH`
    levels below `root`.

    None of them is inside another. The host asks for a node's choices several times in each run; folders are read again
    only after a change.
    """
    kept = _scans.get((root, subfolder))
    if kept is None or any(folder_time(path) != changed for path, changed in kept[0].items()):
        times: dict[Path, int] = {}
        started = time.time_ns()
        found = scan(root, subfolder, times)
        _scans.pop((root, subfolder), None)
        if all(changed < started - SETTLED_NS for changed in times.values()):
            _scans[root, subfolder] = times, found
        return found
    return list(kept[1])


def scan(root: Path, subfolder: str, times: dict[Path, int], depth: int = FOLDER_DEPTH) -> list[Path]:
    """Scan for what `model_folders` returns. times: receives the timestamp of every folder read, taken before reading
    it."""
    times[root] = folder_time(root)
    found = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        times |= {path: folder_time(path) for path in (folder, folder / subfolder)}
        if is_model_folder(folder) or (folder / subfolder).is_dir() and is_model_folder(folder / subfolder):
            found.append(folder)
        elif depth > 1 and not (folder / "model_index.json").is_file():
            found += scan(folder, subfolder, times, depth - 1)
    return found


def earlier_folders(folder_name: str) -> list[Path]:
    """Return the folders in which earlier packs kept such files: in the models folder, and those that
    extra_model_paths.yaml adds under that name."""
    name = EARLIER_FOLDERS.get(folder_name)
    if name is None:
        return []
    registered, _ = folder_paths.folder_names_and_paths.get(name, ([], set()))
    return list(dict.fromkeys([Path(folder_paths.models_dir, name), *map(Path, registered)]))


def choices(folder_name: str, subfolder: str) -> dict[str, str]:
    """Return what a loader offers, name -> path: safetensors and GGUF files in the host's model folders and earlier packs'
    folders, and Hugging Face folders.

    A folder is listed as `name/`; its shards are not listed. Diffusers repositories, whose model is in `subfolder`, are
    also searched in the host's `diffusers` folder. Names from an earlier pack's folder start with that folder's name.
    Of equal names the first wins, in the host's order of folders.
    """
    earlier = earlier_folders(folder_name)
    roots = [
        (Path(root), "")
        for root in (*folder_paths.get_folder_paths(folder_name), *folder_paths.get_folder_paths("diffusers"))
    ]
    found = {}
    for root, prefix in [*roots, *((root, EARLIER_FOLDERS[folder_name] + "/") for root in earlier)]:
        for folder in model_folders(root, subfolder):
            found.setdefault(f"{prefix}{folder.relative_to(root).as_posix()}/", str(folder))
    folders = {Path(path) for path in found.values()}

    files = [
        (name, folder_paths.get_full_path(folder_name, name)) for name in folder_paths.get_filename_list(folder_name)
    ]
    for root in earlier:
        names, _ = folder_paths.recursive_search(str(root))
        files += [(os.path.join(EARLIER_FOLDERS[folder_name], name), str(root / name)) for name in sorted(names)]
    for root in folder_paths.get_folder_paths(folder_name):
        files += gguf_files(root)
    for name, path in files:
        if (
            path is not None
            and (is_safetensors(Path(name)) or is_gguf(Path(name)))
            and not is_mmproj(name)
            and not SHARD.search(name)
            and folders.isdisjoint(Path(path).parents)
        ):
            found.setdefault(name, path)
    return found


def gguf_files(root: str) -> list[tuple[str, str]]:
    """Return names and paths of the GGUF models below a folder; the host's own lists leave them out. mmproj files are
    found beside their model and not listed.

    Read again only after a change, as `model_folders`.
    """
    kept = _gguf_scans.get(root)
    if kept is None or any(folder_time(Path(path)) != changed for path, changed in kept[0].items()):
        started = time.time_ns()
        names, folders = folder_paths.recursive_search(root)
        times = {path: folder_time(Path(path)) for path in folders}
        found = [(name, os.path.join(root, name)) for name in sorted(names) if is_gguf(Path(name))]
        found = [(name, path) for name, path in found if not is_mmproj(name)]
        _gguf_scans.pop(root, None)
        if all(changed < started - SETTLED_NS for changed in times.values()):
            _gguf_scans[root] = times, found
        return found
    return list(kept[1])


def miniature_file(folder_name: str) -> Path:
    """Return the miniature's file of this kind, a key of MINIATURE_FILES."""
    return MINIATURE_WEIGHTS / folder_name / MINIATURE_FILES[folder_name]


def offered(folder_name: str, subfolder: str) -> list[str]:
    """Return what a loader lists: the names in `choices`, then the miniature if the pack was installed with it."""
    return [*choices(folder_name, subfolder), *([MINIATURE] if miniature_file(folder_name).is_file() else [])]


def resolve(name: str, folder_name: str, subfolder: str) -> str:
    """Return the path of a name from `offered` and log it. Raises Step1XError for any other name, so that a workflow
    cannot reach outside the model folders."""
    found = choices(folder_name, subfolder)
    if name == MINIATURE and name not in found and miniature_file(folder_name).is_file():
        found[name] = str(miniature_file(folder_name))
    if not isinstance(name, str) or name not in found:
        searched = (
            *folder_paths.get_folder_paths(folder_name),
            *folder_paths.get_folder_paths("diffusers"),
            *earlier_folders(folder_name),
        )
        raise Step1XError(
            f"'{name}' is not in the {folder_name} folder; searched: {', '.join(map(str, searched))}. Press R to "
            "refresh the node list, then choose the model again."
        )
    log.info("Step1X-Edit: '%s' resolves to %s", name, found[name])
    return found[name]


