"""The encoded pairs on disk, by what they were encoded of."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import Step1XError
from ..files import content_key, unwritable, write_whole
from .dataset import EditPair

# Positions must not be rounded.
EXACT = ("text_ids",)
# What the last run did not use may stay up to the size of what it did use, and at least so many bytes: to go back to
# other settings or datasets is quick.
SPARE_BYTES = 4 * 2**30
# Seconds after which a half-written file belongs to nobody any more.
LEFTOVER_AGE = 24 * 3600


class Cache:
    """Tensors on disk under the name of what they were made of. A file is there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def beside(self, name: str) -> "Cache":
        """A cache of its own in this one's folder, which `prune` leaves alone. name: longer than two characters."""
        return Cache(self.folder / name)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def load(self, key: str) -> dict[str, Tensor]:
        """Raises Step1XError for a file that was deleted or damaged since."""
        try:
            return load_file(self.path(key))
        except (OSError, SafetensorError) as error:
            raise Step1XError(
                f"{self.path(key)} cannot be read ({error}). Delete it and run the dataset node again."
            ) from error

    def store(self, key: str, tensors: dict[str, Tensor]) -> None:
        write_tensors(self.path(key), tensors)

    def prune(self, used: set[str], spare: int = SPARE_BYTES) -> None:
        """Mark what is used, and delete of the rest what was used longest ago, until it takes no more than the used
        files or `spare` bytes do."""
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
    """A safetensors file, written beside its place and then moved there. Raises Step1XError where the disk is full or
    write-protected."""
    try:
        write_whole(
            path,
            lambda partial: save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata
            ),
        )
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def pack_conditioning(conditioning: list) -> dict[str, Tensor]:
    """A conditioning of one entry -> its tensors, floating-point ones rounded to bfloat16 as the published weights
    would take them."""
    (cond, extra), = conditioning
    tensors = {"cond": cond} | {name: value for name, value in extra.items() if torch.is_tensor(value)}
    return {
        name: value.to("cpu", torch.bfloat16 if value.is_floating_point() and name not in EXACT else value.dtype)
        for name, value in tensors.items()
    }


@dataclass(frozen=True)
class CachedPair:
    """Keys into the cache. target: None for a source without one. size: height and width of the latents. negative: the
    conditioning of the empty prompt, for sources without targets and for pairs that are only edited and compared."""

    pair: EditPair
    conditioning: str
    source: str
    target: str | None
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
        return content_key(
            *(
                part
                for item in self.pairs
                for part in (item.content or f"{item.conditioning} {item.source} {item.target}", *item.size)
            )
        )

    def latents(self, item: CachedPair) -> tuple[Tensor, Tensor]:
        """Target and source, float32 [1, C, h, w] each. Raises Step1XError where the item has no target."""
        if item.target is None:
            raise Step1XError("The dataset holds sources and instructions, but training on pairs needs targets. "
                              "Choose the mode 'few steps', or turn off 'sources_only' in 'Step1X-Edit Dataset'.")
        return self.cache.load(item.target)["latent"], self.source(item)

    def source(self, item: CachedPair) -> Tensor:
        """Float32 [1, C, h, w]."""
        return self.cache.load(item.source)["latent"]

    def conditioning(self, item: CachedPair, negative: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Language-model states bfloat16 [1, T, C_llm], and the tensors beside them, with the source's latent as the
        reference."""
        tensors = self.cache.load(item.negative if negative else item.conditioning)
        return tensors.pop("cond"), tensors | {"reference_latents": [self.cache.load(item.source)["latent"]]}


CACHE_FOLDER = ".step1x_cache"
