"""Pictures of many pairs in a temporary file in place of main memory: the system brings back what is looked at and
drops it when memory is short."""

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import Step1XError
from .record import Pair


def spooled(pairs: Iterable[Pair], folder: Path) -> tuple[Pair, ...]:
    """The pairs, taken one after the other, with read-only pictures that lie in a file in the folder. The file ends
    with the last of its pictures.

    A source that several pairs in a row share is stored once. Raises Step1XError where the disk is full or
    write-protected.
    """
    kept = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One file for all: each mapping takes one of the process's open files.
        with tempfile.TemporaryFile(dir=folder) as file:
            kept.extend(_written(pairs, file))
            if not kept:
                return ()
            file.flush()
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as problem:
        raise Step1XError(
            f"The pairs cannot be kept in {folder} ({problem}). Free space on the disk, or make fewer pairs at a time."
        ) from problem

    def picture(place: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(content, np.uint8, int(np.prod(shape)), place).reshape(shape)

    return tuple(replace(pair, source=picture(*source), target=picture(*target)) for pair, source, target in kept)


def _written(pairs: Iterable[Pair], file) -> Iterator[tuple[Pair, tuple, tuple]]:
    """Each pair without its pictures, and where they are in the file: place and shape of source and target."""
    empty = np.empty((0, 0, 3), np.uint8)
    earlier = []

    def store(pixels: np.ndarray) -> tuple[int, tuple[int, ...]]:
        known = next((where for one, where in earlier if one is pixels), None)
        if known:
            return known
        where = file.tell(), pixels.shape
        file.write(np.ascontiguousarray(pixels).data)
        return where

    for pair in pairs:
        source, target = store(pair.source), store(pair.target)
        # The picture itself is the source of one pair and the target of another.
        earlier = [(pair.source, source), (pair.target, target)]
        yield replace(pair, source=empty, target=empty), source, target
