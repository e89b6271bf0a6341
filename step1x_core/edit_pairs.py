"""Pairs of pictures before and after an edit: the two layouts in which they are read, and the cache of what the encoders make of them."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Step1XError
from .images import from_uint8

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SOURCES, TARGETS = "source", "target"
# Official names (spec train_eval.md 1).
REFERENCE, CAPTION = "ref_image_path", "caption"
CACHE_FOLDER = ".step1x_cache"
# Positions must not be rounded.
EXACT = ("text_ids",)


@dataclass(frozen=True)
class EditPair:
    source: Path
    target: Path
    instruction: str


def read_pairs(path: Path, root: Path | None = None) -> list[EditPair]:
    """The pairs of a dataset, in the order of their names.

    path: an official JSON file `{target: {"ref_image_path": source, "caption": instruction}}`, whose relative paths start at its folder; or a folder with
    such files; or one without, but with `source/NAME.png`, `target/NAME.png` and `target/NAME.txt`.
    root: where all files must lie; None: anywhere.

    Raises Step1XError for what is none of these, for broken JSON, missing pictures or texts, and files outside `root`.
    """
    if path.is_file():
        pairs = list(_read_json(path))
    elif path.is_dir():
        files = sorted(path.glob("*.json"))
        pairs = [pair for file in files for pair in _read_json(file)] if files else list(_read_folder(path))
    else:
        raise Step1XError(f"There is no dataset at {path}. Name a folder with '{SOURCES}' and '{TARGETS}', or a JSON file.")
    if not pairs:
        raise Step1XError(f"The dataset {path} holds no pairs. It needs '{SOURCES}/NAME.png', '{TARGETS}/NAME.png' and '{TARGETS}/NAME.txt', or a JSON file of pairs.")
    for pair in pairs:
        for file in (pair.source, pair.target):
            if root is not None and not Path(os.path.abspath(file)).is_relative_to(root):
                raise Step1XError(f"The picture {file} lies outside of {root}. Move the dataset there.")
            if not os.path.isfile(file):
                raise Step1XError(f"The picture {file} of the dataset {path} does not exist. Put it there, or take the pair out.")
    return pairs


def _read_json(path: Path) -> Iterator[EditPair]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise Step1XError(f"{path} could not be read as JSON ({error}). Correct that file.") from error
    if not isinstance(entries, dict):
        raise Step1XError(f'{path} is not a list of pairs: it must be {{"target.png": {{"{REFERENCE}": "source.png", "{CAPTION}": "instruction"}}}}.')
    for target, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(REFERENCE), str) or not isinstance(entry.get(CAPTION), str):
            raise Step1XError(f'The entry "{target}" of {path} has no "{REFERENCE}" or no "{CAPTION}". Both must be texts.')
        yield EditPair(path.parent / entry[REFERENCE], path.parent / target, entry[CAPTION])


def _pictures(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in PICTURE_SUFFIXES}


def _read_folder(folder: Path) -> Iterator[EditPair]:
    sources = _pictures(folder / SOURCES)
    for name, target in _pictures(folder / TARGETS).items():
        if name not in sources:
            raise Step1XError(f"{target} has no picture of that name in {folder / SOURCES}. Put it there, or take the pair out.")
        text = target.with_suffix(".txt")
        try:
            instruction = text.read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise Step1XError(f"The instruction {text} could not be read ({error}). Write it into that file, in UTF-8.") from error
        yield EditPair(sources[name], target, instruction)


def read_picture(path: Path) -> Tensor:
    """float32 [H, W, 3] in 0..1, upright. Raises Step1XError for what is no picture."""
    try:
        with Image.open(path) as picture:
            return from_uint8(np.asarray(ImageOps.exif_transpose(picture).convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Step1XError(f"The picture {path} could not be read ({error}). Replace the file, or take the pair out.") from error


def content_key(*parts: str | bytes | int) -> str:
    """A name that changes with any of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]


def dataset_fingerprint(path: Path) -> str:
    """Another text whenever a picture or an instruction of the dataset was changed, or where its faults are others."""
    try:
        pairs = read_pairs(path)
    except Step1XError as error:
        return str(error)
    stats = [(file, file.stat()) for pair in pairs for file in (pair.source, pair.target)]
    return content_key(*(pair.instruction for pair in pairs), *(f"{file}{stat.st_size}{stat.st_mtime_ns}" for file, stat in stats))


class Cache:
    """Tensors on disk under the name of what they were made of. A file is there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def load(self, key: str) -> dict[str, Tensor]:
        """Raises Step1XError for a file that was deleted or damaged since."""
        try:
            return load_file(self.path(key))
        except (OSError, SafetensorError) as error:
            raise Step1XError(f"{self.path(key)} cannot be read ({error}). Delete it and run the dataset node again.") from error

    def store(self, key: str, tensors: dict[str, Tensor]) -> None:
        write_tensors(self.path(key), tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written beside its place and then moved there. Raises Step1XError where the disk is full or write-protected."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise Step1XError(f"{path} cannot be written ({error}). Free space on the disk, or correct the rights of that folder.") from error


def pack_conditioning(conditioning: list) -> dict[str, Tensor]:
    """A conditioning of one entry -> its tensors, floating-point ones rounded to bfloat16 as the published weights would take them."""
    (cond, extra), = conditioning
    tensors = {"cond": cond} | {name: value for name, value in extra.items() if torch.is_tensor(value)}
    return {name: value.to("cpu", torch.bfloat16 if value.is_floating_point() and name not in EXACT else value.dtype) for name, value in tensors.items()}


@dataclass(frozen=True)
class CachedPair:
    """Keys into the cache. size: height and width of the latents. negative: the conditioning of the empty prompt, for pairs that are only edited and compared."""

    pair: EditPair
    conditioning: str
    source: str
    target: str
    size: tuple[int, int]
    negative: str | None = None


@dataclass
class EditDataset:
    """What a training reads. validation: pairs that are not trained on."""

    cache: Cache
    pairs: list[CachedPair]
    validation: list[CachedPair] = field(default_factory=list)

    def latents(self, item: CachedPair) -> tuple[Tensor, Tensor]:
        """Target and source, float32 [1, C, h, w] each."""
        return self.cache.load(item.target)["latent"], self.cache.load(item.source)["latent"]

    def conditioning(self, item: CachedPair, negative: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Language-model states bfloat16 [1, T, C_llm], and the tensors beside them, with the source's latent as the reference."""
        tensors = self.cache.load(item.negative if negative else item.conditioning)
        return tensors.pop("cond"), tensors | {"reference_latents": [self.cache.load(item.source)["latent"]]}
