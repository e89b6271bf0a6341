"""Pairs of pictures before and after an edit: the two layouts in which they are read, and the cache of what the
encoders make of them."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import Step1XError
from ..files import PICTURE_SUFFIXES, content_key, open_picture, safe_path
from ..images import from_uint8

SOURCES, TARGETS = "source", "target"
# Official names (docs/model.md, LoRA training).
REFERENCE, CAPTION = "ref_image_path", "caption"


@dataclass(frozen=True)
class EditPair:
    """target: None where only a source and an instruction are given, as for a distillation."""

    source: Path
    target: Path | None
    instruction: str

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.source,) if self.target is None else (self.source, self.target)


def read_pairs(path: Path, root: Path | None = None) -> list[EditPair]:
    """The pairs of a dataset, in the order of their names.

    path: an official JSON file `{target: {"ref_image_path": source, "caption": instruction}}`, whose relative paths
    start at its folder; or a folder with such files; or one without, but with `source/NAME.png`, `target/NAME.png` and
    `target/NAME.txt`.
    root: where all files must lie; None: anywhere.

    Raises Step1XError for what is none of these, for broken JSON, missing pictures or texts, and files outside `root`.
    """
    if path.is_file():
        pairs = list(_read_json(path, root))
    elif path.is_dir():
        files = sorted(path.glob("*.json"))
        pairs = [pair for file in files for pair in _read_json(file, root)] if files else list(_read_folder(path, root))
    else:
        raise Step1XError(
            f"There is no dataset at {path}. Name a folder with '{SOURCES}' and '{TARGETS}', or a JSON file."
        )
    if not pairs:
        raise Step1XError(f"The dataset {path} holds no pairs. It needs '{SOURCES}/NAME.png', '{TARGETS}/NAME.png' and "
                          f"'{TARGETS}/NAME.txt', or a JSON file of pairs.")
    return _existing(pairs, path)


def read_sources(path: Path, root: Path | None = None) -> list[EditPair]:
    """The sources and instructions of a dataset, without targets, in the order of their names.

    path: a folder with `source/NAME.png` and `source/NAME.txt`, which holds one instruction a line; or any dataset of
    pairs, whose targets are not read and need not exist. root: as for `read_pairs`.

    Raises Step1XError as `read_pairs` does.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
    pairs = (
        [replace(pair, target=None) for file in files for pair in _read_json(file, root)]
        if files
        else list(_read_texts(path, root))
    )
    if not pairs:
        raise Step1XError(
            f"The dataset {path} holds no sources. It needs '{SOURCES}/NAME.png' and '{SOURCES}/NAME.txt' with one instruction per line, "
            "or pairs as for training."
        )
    return _existing(pairs, path)


def _existing(pairs: list[EditPair], path: Path) -> list[EditPair]:
    for pair in pairs:
        for file in pair.files:
            if not os.path.isfile(file):
                raise Step1XError(
                    f"The image {file} of the dataset {path} does not exist. Put it there, or remove the pair."
                )
    return pairs


def _read_texts(folder: Path, root: Path | None) -> Iterator[EditPair]:
    """One entry for each line of the text beside a source or, where there is none, beside its target."""
    for name, sources in _pictures(folder / SOURCES).items():
        source = safe_path(folder, os.path.relpath(_only(sources), folder), root, f"The dataset {folder}")
        texts = [folder / part / f"{name}.txt" for part in (SOURCES, TARGETS)]
        text = next((file for file in texts if file.is_file()), texts[0])
        for line in _read_text(
            safe_path(folder, os.path.relpath(text, folder), root, f"The dataset {folder}")
        ).splitlines():
            if line.strip():
                yield EditPair(source, None, line.strip())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise Step1XError(
            f"The instruction {path} could not be read ({error}). Write it into that file, in UTF-8."
        ) from error


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
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get(REFERENCE), str)
            or not isinstance(entry.get(CAPTION), str)
        ):
            raise Step1XError(
                f'The entry "{target}" of {path} has no "{REFERENCE}" or no "{CAPTION}". Both must be strings.'
            )
        yield EditPair(
            *(safe_path(path.parent, name, root, str(path)) for name in (entry[REFERENCE], target)), entry[CAPTION]
        )


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
        raise Step1XError(
            f"The images {' and '.join(path.name for path in paths)} in {paths[0].parent} have the same name, "
            "so the pair is ambiguous. Rename or remove all but one."
        )
    return paths[0]


def _read_folder(folder: Path, root: Path | None) -> Iterator[EditPair]:
    sources = _pictures(folder / SOURCES)
    for name, targets in _pictures(folder / TARGETS).items():
        target = _only(targets)
        if name not in sources:
            raise Step1XError(
                f"{target} has no image of that name in {folder / SOURCES}. Put it there, or remove the pair."
            )
        text = target.with_suffix(".txt")
        source, target, text = (
            safe_path(folder, os.path.relpath(file, folder), root, f"The dataset {folder}")
            for file in (_only(sources[name]), target, text)
        )
        yield EditPair(source, target, _read_text(text))


def decode_picture(data: bytes, path: Path) -> Tensor:
    """Decode a file's content to float32 [H, W, 3] in 0..1, upright. Raises Step1XError if it is not an image; path:
    for the error."""
    return from_uint8(np.asarray(open_picture(data, str(path))))


def dataset_fingerprint(path: Path, root: Path | None = None, read: Callable = read_pairs) -> str:
    """Another text whenever a picture or an instruction of the dataset was changed, or where its faults are others.
    root: see `read_pairs`;
    read: it or `read_sources`."""
    try:
        pairs = read(path, root)
        stats = [(file, file.stat()) for pair in pairs for file in pair.files]
    except (Step1XError, OSError) as error:
        return str(error)
    return content_key(
        *(pair.instruction for pair in pairs), *(f"{file}{stat.st_size}{stat.st_mtime_ns}" for file, stat in stats)
    )


