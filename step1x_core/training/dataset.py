"""Pairs of pictures before and after an edit: the two layouts in which they are read, and the cache of what the encoders make of them."""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import Step1XError
from ..files import PICTURE_SUFFIXES, safe_path, unwritable, write_whole
from ..images import from_uint8

SOURCES, TARGETS = "source", "target"
# Official names (spec train_eval.md 1).
REFERENCE, CAPTION = "ref_image_path", "caption"
CACHE_FOLDER = ".step1x_cache"
# Positions must not be rounded.
EXACT = ("text_ids",)
# EXIF: the tag, and its values for a picture that lies on its side.
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
# What the last run did not use may stay up to the size of what it did use, and at least so many bytes: to go back to other settings or datasets is quick.
SPARE_BYTES = 4 * 2**30
# Seconds after which a half-written file belongs to nobody any more.
LEFTOVER_AGE = 24 * 3600


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
        pairs = list(_read_json(path, root))
    elif path.is_dir():
        files = sorted(path.glob("*.json"))
        pairs = [pair for file in files for pair in _read_json(file, root)] if files else list(_read_folder(path, root))
    else:
        raise Step1XError(f"There is no dataset at {path}. Name a folder with '{SOURCES}' and '{TARGETS}', or a JSON file.")
    if not pairs:
        raise Step1XError(f"The dataset {path} holds no pairs. It needs '{SOURCES}/NAME.png', '{TARGETS}/NAME.png' and "
                          f"'{TARGETS}/NAME.txt', or a JSON file of pairs.")
    for pair in pairs:
        for file in (pair.source, pair.target):
            if not os.path.isfile(file):
                raise Step1XError(f"The image {file} of the dataset {path} does not exist. Put it there, or remove the pair.")
    return pairs


def _read_json(path: Path, root: Path | None) -> Iterator[EditPair]:
    safe_path(path.parent, path.name, root, "The dataset")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise Step1XError(f"{path} could not be read as JSON ({error}). Correct the file.") from error
    if not isinstance(entries, dict):
        raise Step1XError(f'{path} is not a table of pairs. Expected {{"target.png": '
                          f'{{"{REFERENCE}": "source.png", "{CAPTION}": "instruction"}}}}.')
    for target, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(REFERENCE), str) or not isinstance(entry.get(CAPTION), str):
            raise Step1XError(f'The entry "{target}" of {path} has no "{REFERENCE}" or no "{CAPTION}". Both must be strings.')
        yield EditPair(*(safe_path(path.parent, name, root, str(path)) for name in (entry[REFERENCE], target)), entry[CAPTION])


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures of a folder by their names without a suffix."""
    found = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    return found


def _only(paths: list[Path]) -> Path:
    """The one picture of a name: of `1.png` and `1.jpg` nobody can tell which belongs to `1.txt`."""
    if len(paths) > 1:
        raise Step1XError(f"The images {' and '.join(path.name for path in paths)} in {paths[0].parent} have the same name, "
                          "so the pair is ambiguous. Rename or remove all but one.")
    return paths[0]


def _read_folder(folder: Path, root: Path | None) -> Iterator[EditPair]:
    sources = _pictures(folder / SOURCES)
    for name, targets in _pictures(folder / TARGETS).items():
        target = _only(targets)
        if name not in sources:
            raise Step1XError(f"{target} has no image of that name in {folder / SOURCES}. Put it there, or remove the pair.")
        text = target.with_suffix(".txt")
        source, target, text = (safe_path(folder, os.path.relpath(file, folder), root, f"The dataset {folder}") for file in (_only(sources[name]), target, text))
        try:
            instruction = text.read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise Step1XError(f"The instruction {text} could not be read ({error}). Write it into that file, in UTF-8.") from error
        yield EditPair(source, target, instruction)


def read_picture(path: Path) -> Tensor:
    """float32 [H, W, 3] in 0..1, upright. Raises Step1XError for what is no picture."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return decode_picture(data, path)


def unreadable(path: Path, error: Exception) -> Step1XError:
    return Step1XError(f"The image {path} could not be read ({error}). Replace the file, or remove the pair.")


# Pillow's decoders raise these on damaged files.
DECODING_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def decode_picture(data: bytes, path: Path) -> Tensor:
    """A file's content -> float32 [H, W, 3] in 0..1, upright. Raises Step1XError for what is no picture; path: for the error."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return from_uint8(np.asarray(ImageOps.exif_transpose(picture).convert("RGB")))
    except DECODING_ERRORS as error:
        raise unreadable(path, error) from error


def picture_size(data: bytes, path: Path) -> tuple[int, int]:
    """Width and height of a picture when it is upright, without decoding it. Raises Step1XError as `decode_picture` does."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            size = picture.size
            return size[::-1] if picture.getexif().get(ORIENTATION) in SIDEWAYS else size
    except DECODING_ERRORS as error:
        raise unreadable(path, error) from error


def content_key(*parts: str | bytes | int) -> str:
    """A name that changes with any of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]


def dataset_fingerprint(path: Path, root: Path | None = None) -> str:
    """Another text whenever a picture or an instruction of the dataset was changed, or where its faults are others. root: see `read_pairs`."""
    try:
        pairs = read_pairs(path, root)
        stats = [(file, file.stat()) for pair in pairs for file in (pair.source, pair.target)]
    except (Step1XError, OSError) as error:
        return str(error)
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

    def prune(self, used: set[str], spare: int = SPARE_BYTES) -> None:
        """Mark what is used, and delete of the rest what was used longest ago, until it takes no more than the used files or `spare` bytes do."""
        rest, taken = [], 0
        for path in self.folder.glob("??/*"):
            try:
                if path.suffix == ".safetensors" and path.stem in used:
                    os.utime(path)
                    taken += path.stat().st_size
                elif path.suffix == ".safetensors":
                    rest.append((path.stat().st_mtime, path.stat().st_size, path))
                elif path.suffix == ".part" and path.stat().st_mtime < time.time() - LEFTOVER_AGE:
                    path.unlink()
            except OSError:
                pass  # another process was there first, or the disk is write-protected: it is only tidying
        room = max(taken, spare)
        for _, size, path in sorted(rest, reverse=True):
            room -= size
            if room < 0:
                try:
                    path.unlink(missing_ok=True)
                except OSError:
                    pass


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written beside its place and then moved there. Raises Step1XError where the disk is full or write-protected."""
    try:
        write_whole(path, lambda partial: save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata))
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


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
    # A name for the pictures and the instruction, whatever encoders they went through.
    content: str = ""


@dataclass
class EditDataset:
    """What a training reads. validation: pairs that are not trained on."""

    cache: Cache
    pairs: list[CachedPair]
    validation: list[CachedPair] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A name for what is trained on: pictures, instructions, sizes and the order of the pairs."""
        return content_key(*(part for item in self.pairs for part in (item.content or f"{item.conditioning} {item.source} {item.target}", *item.size)))

    def latents(self, item: CachedPair) -> tuple[Tensor, Tensor]:
        """Target and source, float32 [1, C, h, w] each."""
        return self.cache.load(item.target)["latent"], self.cache.load(item.source)["latent"]

    def conditioning(self, item: CachedPair, negative: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Language-model states bfloat16 [1, T, C_llm], and the tensors beside them, with the source's latent as the reference."""
        tensors = self.cache.load(item.negative if negative else item.conditioning)
        return tensors.pop("cond"), tensors | {"reference_latents": [self.cache.load(item.source)["latent"]]}
