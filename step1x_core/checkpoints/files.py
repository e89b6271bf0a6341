"""Finds and checks checkpoint files before anything is loaded: single safetensors files and Hugging Face folders of
shards."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open

from ..errors import Step1XError
from .gguf_files import is_gguf

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass
class Checkpoint:
    """The files of one model, all in one folder. config: the folder's config.json, {} for a single file."""

    path: Path
    files: list[Path]
    config: dict = field(default_factory=dict)
    pipeline: str | None = None


def is_safetensors(path: Path) -> bool:
    """Return whether this is the name of a safetensors file, ignoring case."""
    return path.suffix.lower() in SAFETENSORS_SUFFIXES


def is_index(path: Path) -> bool:
    return path.name.lower().endswith(INDEX_SUFFIX)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Step1XError(
            f"{path.name} in {path.parent} could not be read ({error}). Download that file again."
        ) from error
    if not isinstance(content, dict):
        raise Step1XError(f"{path.name} in {path.parent} has unexpected content. Download that file again.")
    return content


def shard_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder: those in its index, or all of them without an index.

    Raises Step1XError for a missing shard and for an index that points outside the folder.
    """
    indexes = sorted(filter(is_index, folder.iterdir()))
    if not indexes:
        return sorted(filter(is_safetensors, folder.iterdir()))
    weight_map = read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Step1XError(f"{indexes[0].name} in {folder} lists no weights. Download that file again.")
    for name in weight_map.values():
        if not isinstance(name, str) or PureWindowsPath(name).name != name or not is_safetensors(Path(name)):
            raise Step1XError(
                f"{indexes[0].name} in {folder} lists {name!r}, which is not a safetensors file of that folder. "
                "Download the index again."
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        # Unlike Path.is_file, this accepts names that are too long for a file.
        if not os.path.isfile(folder / name):
            raise Step1XError(
                f"{name} is missing from {folder}; the index lists {len(names)} shards. Download that file."
            )
    return [folder / name for name in names]


def is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(is_safetensors(p) or is_index(p) for p in folder.iterdir())


def find_checkpoint(path: str | Path, subfolder: str) -> Checkpoint:
    """Resolve a file, a model folder, or a diffusers repository with the model in `subfolder`.

    Raises Step1XError if the path is none of these.
    """
    path = Path(path)
    if path.is_file():
        if not is_safetensors(path) and not is_gguf(path):
            raise Step1XError(
                f"{path.name} is not a safetensors file. Only safetensors files are supported, and GGUF files of the "
                "model and of the language model; download the model in one of these formats."
            )
        return Checkpoint(path, [path])
    if not path.is_dir():
        raise Step1XError(f"{path} does not exist. Press R to refresh the node list, then choose the model again.")
    pipeline = None
    if (path / "model_index.json").is_file():
        pipeline = read_json(path / "model_index.json").get("_class_name")
    folder = path / subfolder if (path / subfolder).is_dir() else path
    files = shard_files(folder)
    if not files:
        raise Step1XError(
            f"{folder} contains no safetensors file. Choose a model folder, which holds config.json and *.safetensors."
        )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return Checkpoint(folder, files, config, pipeline)


def check_file(path: Path) -> None:
    """Raise Step1XError unless the file has an intact safetensors header that matches its size."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError as error:
        raise Step1XError(
            f"{path} does not exist. Press R to refresh the node list, then choose the model again."
        ) from error
    except (SafetensorError, OSError) as error:
        raise Step1XError(
            f"{path.name} is damaged, incomplete or not a safetensors file ({error}). Download it again and compare "
            "its size."
        ) from error


def check_types(name: str, tensors: dict[str, torch.Tensor], keys: Iterable[str]) -> None:
    """Raise Step1XError if a tensor is neither floating point nor 8-bit, as quantised weights are; the host would cast
    it and produce noise."""
    for key in keys:
        tensor = tensors[key]
        if not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.int8):
            raise Step1XError(
                f"{name} stores {key} as {tensor.dtype}, which is not a weight dtype. The file may be damaged or "
                "belong to another model; download it again."
            )


def check_tensors(name: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Check the tensor names and shapes of a checkpoint against those a model needs. Extra tensors (scales of quantised
    files) are accepted.

    Raises Step1XError for the first missing tensor, or the first one of another shape.
    """
    missing = [key for key in expected if key not in found]
    if missing:
        raise Step1XError(
            f"{name} lacks {len(missing)} of {len(expected)} tensors, for example {missing[0]}. It may be incomplete "
            "or belong to another model; download it again."
        )
    wrong = [key for key in expected if expected[key] != found[key]]
    if wrong:
        key = wrong[0]
        raise Step1XError(
            f"{name} does not fit the model: {key} has shape {list(found[key])}, expected {list(expected[key])} "
            f"({len(wrong)} tensors differ). The file belongs to another model; choose another file."
        )
